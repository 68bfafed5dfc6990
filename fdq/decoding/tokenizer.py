"""Text to tokens and back, with the `tokenizers` package of the extra `fdq[cli]`.

Only a checkpoint's tokenizer.json is read: it says everything, and running it needs no code of
the checkpoint's author.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, Self


class Tokenizer:
    """A checkpoint's tokenizer: `encode`, `decode`, and the tokens that begin and end a text.

    `vocab_size` counts added tokens as well.
    """

    def __init__(
        self, backend: Any, *, bos_token_id: int | None = None, stop_token_ids: Sequence[int] = ()
    ):
        self._backend = backend
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.bos_token_id = bos_token_id
        self.stop_token_ids = tuple(stop_token_ids)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Self:
        """The tokenizer of the checkpoint in `directory`, or whose tokenizer.json it is."""
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
        config = _read_json(folder / "tokenizer_config.json")
        generation = _read_json(folder / "generation_config.json")
        model_config = _read_json(folder / "config.json")

        def token_id(key: str) -> Any:
            token = config.get(key)
            content = token.get("content") if isinstance(token, dict) else token
            found = backend.token_to_id(content) if isinstance(content, str) else None
            return model_config.get(f"{key}_id") if found is None else found

        stops = generation.get("eos_token_id", token_id("eos_token"))
        stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
        return cls(backend, bos_token_id=token_id("bos_token"), stop_token_ids=stops)

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Tokens of `text`; with `bos` the token that begins a text comes first, if there is one.

        Whatever the tokenizer itself would add around the text is left out.
        """
        ids = list(self._backend.encode(text, add_special_tokens=False).ids)
        return [self.bos_token_id, *ids] if bos and self.bos_token_id is not None else ids

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of `tokens`; special tokens are left out."""
        return self._backend.decode([int(t) for t in tokens], skip_special_tokens=True)

    def stream(self) -> "TextStream":
        """A decoder that is fed tokens as they come and returns text as soon as it is certain."""
        return TextStream(self)


class TextStream:
    """Decodes a growing list of tokens into pieces whose concatenation is the whole text.

    A character may take several tokens (bytes of UTF-8): text that ends in a replacement character
    is held back until it is complete. Only the tokens since the last certain piece are decoded
    again, so the cost of a token does not grow with the text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._context = 0  # first token that is decoded again: it may decide about a space
        self._shown = 0  # tokens whose text has been returned

    def feed(self, tokens: Iterable[int]) -> str:
        """Appends `tokens`; returns the text that became certain, perhaps none."""
        self._tokens.extend(int(t) for t in tokens)
        known, text = self._texts()
        if text.endswith("\ufffd"):
            return ""
        self._context, self._shown = self._shown, len(self._tokens)
        return text[len(known) :]

    def finish(self) -> str:
        """The text held back, replacement characters included."""
        known, text = self._texts()
        self._shown = len(self._tokens)
        return text[len(known) :]

    def _texts(self) -> tuple[str, str]:
        decode = self._tokenizer.decode
        again = self._tokens[self._context :]
        return decode(again[: self._shown - self._context]), decode(again)


def _backend_class() -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Text needs the `tokenizers` package, which the extra `cli` installs: "
            "pip install 'fdq[cli]'. Token ids work without it.",
            name=error.name,
        ) from error
    return tokenizers.Tokenizer


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in `path`, empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}.")
    return value


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
