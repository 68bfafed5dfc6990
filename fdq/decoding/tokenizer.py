"""Text to tokens and back, with the `tokenizers` package of the extra `cli`.

Only a checkpoint's tokenizer.json is read: it says everything, and running it needs no code of
the checkpoint's author.
"""

import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

from fdq.decoding import checks, detokenizer, special_tokens
from fdq.decoding.text_stages import Stage


class Tokenizer:
    """A checkpoint's tokenizer: `encode`, `decode`, and the tokens that begin and end a text.

    Attributes:
      vocab_size: counts added tokens as well.
      first_token_ids: what `encode` puts before a text with `bos=True`: one BOS, nothing, or what
        else the tokenizer has there.
      stop_token_ids: tokens that end a text, by any of the checkpoint's files.
    """

    def __init__(
        self, backend: Any, *, bos_token_id: int | None = None, stop_token_ids: Sequence[int] = ()
    ):
        self._backend = backend
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.first_token_ids: tuple[int, ...] = () if bos_token_id is None else (bos_token_id,)
        self.stop_token_ids = tuple(stop_token_ids)
        added = backend.get_added_tokens_decoder().values()
        self._special = {token.content for token in added if token.special}

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Self:
        """The tokenizer of the checkpoint in `directory`, or whose tokenizer.json it is.

        Raises:
          FileNotFoundError: there is no tokenizer.json.
          ValueError: it cannot be read, or the files beside it name special tokens in a way that
            cannot be meant.
        """
        folder = pathlib.Path(directory)
        folder = folder.parent if folder.name == "tokenizer.json" else folder
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(_no_tokenizer(folder))
        backend_class = _backend_class()
        try:
            backend = backend_class.from_file(str(path))
        except Exception as error:  # the Rust side raises bare Exception
            raise ValueError(f"{path}: `tokenizers` cannot read it: {error}") from error
        # Settings of whoever saved it, which would cut prompts or fill them up.
        backend.no_truncation()
        backend.no_padding()
        find = backend.token_to_id
        made = cls(backend, stop_token_ids=special_tokens.stop_token_ids(folder, find))
        post_processor = detokenizer.settings(backend.post_processor)
        made.first_token_ids = special_tokens.first_token_ids(folder, post_processor, find)
        return made

    @property
    def bos_token_id(self) -> int | None:
        """The first token of every text, None where the tokenizer puts none in front."""
        return self.first_token_ids[0] if self.first_token_ids else None

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Tokens of `text`; with `bos` the tokens that begin a text come first, once.

        A text that already begins with one of them, such as one from a chat template, gets no
        more. What the tokenizer would add after the text is left out.

        Raises:
          TypeError: no text, or one that is no UTF-8 (half of a surrogate pair).
        """
        if not isinstance(text, str) or not _is_utf8(text):
            raise TypeError(f"expected text, found {text!r:.100}.")
        ids = list(self._backend.encode(text, add_special_tokens=False).ids)
        begun = bool(ids) and ids[0] in self.first_token_ids
        return [*self.first_token_ids, *ids] if bos and not begun else ids

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of `tokens`; special tokens, and those that are unknown, are left out.

        Raises:
          TypeError, ValueError: something that is no token's number.
        """
        stream = self.stream()
        return stream.feed(tokens) + stream.finish()

    def vocabulary(self) -> dict[str, int]:
        """The number of each token by how the tokenizer spells it, added tokens included."""
        return self._backend.get_vocab(with_added_tokens=True)

    def is_special(self, token: int) -> bool:
        """Whether a token stands for no text: text is cut there, and `decode` leaves it out."""
        return self._backend.id_to_token(token) in self._special

    def stream(self) -> "TextStream":
        """A decoder that is fed tokens as they come and returns text as soon as it is certain."""
        return TextStream(self._strings, detokenizer.stages(self._backend.decoder))

    def _strings(self, tokens: Iterable[int]) -> list[str]:
        """What the decoder is given: strings of tokens, without special and unknown ones."""
        numbers = (checks.token("token", token) for token in tokens)
        strings = map(self._backend.id_to_token, numbers)
        return [s for s in strings if s is not None and s not in self._special]


class TextStream:
    """Decodes tokens that come one after the other; made by `Tokenizer.stream`.

    The pieces, joined, are `Tokenizer.decode` of all tokens, whatever the decoder and the special
    tokens among them; the cost of a token does not grow with the text.
    """

    def __init__(self, strings: Callable[[Iterable[int]], list[str]], stages: list[Stage]):
        self._strings = strings
        self._stages = stages
        self._finished = False

    def feed(self, tokens: Iterable[int]) -> str:
        """Takes the next tokens; returns the text that no token to come can change, perhaps none.

        Raises:
          ValueError: the stream is finished.
        """
        if self._finished:
            raise ValueError("This stream is finished; Tokenizer.stream() makes another.")
        return detokenizer.run(self._stages, self._strings(tokens))

    def finish(self) -> str:
        """The text held back; replacement characters stand for bytes that are no character."""
        if self._finished:
            return ""
        self._finished = True
        return detokenizer.run(self._stages, [], last=True)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _backend_class() -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Text needs the package `tokenizers`: pip install tokenizers. "
            "Token ids work without it.",
            name=error.name,
        ) from error
    return tokenizers.Tokenizer


def _no_tokenizer(folder: pathlib.Path) -> str:
    message = f"No tokenizer: {folder} has no tokenizer.json."
    if not folder.is_dir():
        return f"{folder} is not a directory."
    if any((folder / name).is_file() for name in ("tokenizer.model", "spiece.model")):
        message += (
            " It has a SentencePiece model; transformers converts it: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    return message + " Token ids work without one."
