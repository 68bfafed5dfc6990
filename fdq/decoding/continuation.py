"""What generated tokens add to the text of a prompt."""

from collections.abc import Iterable, Sequence
from typing import Any


class Continuation:
    """The text that tokens add to a prompt, in pieces, as the tokens come.

    Prompt and continuation together are the decoding of the tokens of both, wherever that begins
    with the prompt. Some tokenizers do not give a prompt back: they lower its case, leave out its
    special tokens or what they do not know. The continuation then is what follows the decoding of
    the prompt's tokens alone, and where tokens that come later change even that (a byte that makes
    the bytes before it no UTF-8), what follows the part that they leave as it is.

    Args:
      tokenizer: has `decode` and `stream`, as `Tokenizer` does.
      prompt: the text that was continued.
      tokens: its tokens, with those that the tokenizer puts in front.
    """

    def __init__(self, tokenizer: Any, prompt: str, tokens: Sequence[int]):
        self._starts = (prompt, tokenizer.decode(tokens))
        self._stream = tokenizer.stream()
        self._text = self._stream.feed(tokens)  # of which nothing has been passed on
        self._began = False

    def feed(self, tokens: Iterable[int]) -> str:
        """Appends `tokens`; returns the text that became certain, perhaps none."""
        piece = self._stream.feed(tokens)
        return self._pass_on(piece, last=False) if piece else ""

    def finish(self) -> str:
        """The text held back."""
        return self._pass_on(self._stream.finish(), last=True)

    def _pass_on(self, piece: str, *, last: bool) -> str:
        if self._began:
            return piece
        self._text += piece
        common = 0
        for start in self._starts:
            common = _common_length(self._text, start)
            if common == len(start):
                break
            if common == len(self._text) and not last:
                return ""  # it may still begin with `start`
        self._began = True
        return self._text[common:]


def _common_length(a: str, b: str) -> int:
    """How many characters both begin with."""
    differing = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differing, min(len(a), len(b)))
