"""The text that `evaluate` reads: how it is cut into windows, and whether a model can read it."""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any, Self

import numpy as np

# Bounds the float32 logits of one batch of windows; two models' logits exist at a time.
_LOGIT_BYTES_PER_BATCH = 128 * 2**20
_MAX_BATCH = 64


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """A text, [length] int32, and how it is cut into batches of windows."""

    tokens: np.ndarray
    window: int
    stride: int
    batch: int

    @classmethod
    def of(
        cls, tokens: Any, window: int, stride: int | None, batch: int | None, model: Any
    ) -> Self:
        """Checked arguments of `evaluate`, and what is meant where they are None."""
        tokens = _check_tokens(tokens)
        vocab = check_vocabulary(model, tokens, "model")
        if window < 1:
            raise ValueError(f"`window` (={window}) must be positive.")
        stride = max(1, window // 2) if stride is None else stride
        if not 1 <= stride <= window:
            raise ValueError(f"`stride` (={stride}) must be between 1 and `window` (={window}).")
        if batch is not None and batch < 1:
            raise ValueError(f"`batch` (={batch}) must be positive.")
        window = min(window, len(tokens) - 1)
        cut = cls(tokens=tokens, window=window, stride=min(stride, window), batch=batch or 1)
        if batch is not None:
            return cut
        fits = _LOGIT_BYTES_PER_BATCH // (4 * window * (vocab or 2**17))
        most = max(1, min(_MAX_BATCH, fits))
        # Batches of equal size waste the least on filling up the last.
        windows = len(cut.starts())
        return dataclasses.replace(cut, batch=-(-windows // -(-windows // most)))

    def starts(self) -> list[int]:
        """First positions of the windows."""
        starts, last = [0], len(self.tokens) - 1 - self.window
        while starts[-1] < last:
            starts.append(min(starts[-1] + self.stride, last))
        return starts

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Batches of (inputs, targets, mask), each [batch, window]; mask is 1.0 where to score.

        Inputs are tokens[s : s + window], targets the same one later. The last window is moved
        back to end with the text, and the last batch is filled up with copies that score nothing,
        so that all batches have one shape.
        """
        tokens, window, starts = self.tokens, self.window, self.starts()
        inputs = np.stack([tokens[s : s + window] for s in starts])
        targets = np.stack([tokens[s + 1 : s + 1 + window] for s in starts])
        mask = np.zeros(inputs.shape, np.float32)
        done = 0
        for row, s in enumerate(starts):
            mask[row, done - s :] = 1.0
            done = s + window
        fill = ((0, -len(starts) % self.batch), (0, 0))
        inputs, targets = (np.pad(a, fill, mode="edge") for a in (inputs, targets))
        mask = np.pad(mask, fill)
        for first in range(0, len(inputs), self.batch):
            rows = slice(first, first + self.batch)
            yield inputs[rows], targets[rows], mask[rows]


def check_tokenizers(model: Any, reference: Any, tokens: np.ndarray) -> None:
    """Raises ValueError where two models' tokens stand for different texts.

    `model` and `reference` are files, each None where a model has none; `tokens` are the text.
    """
    if model == reference or not all(path and os.path.exists(path) for path in (model, reference)):
        return
    from fdq.decoding.tokenizer import Tokenizer

    tokenizers = [Tokenizer.load(path) for path in (model, reference)]
    one, other = (tokenizer.vocabulary() for tokenizer in tokenizers)
    differ = [text for text in one.keys() | other.keys() if one.get(text) != other.get(text)]
    if differ:
        text = min(differ)
        raise ValueError(
            f"The tokenizers of {model} and of the reference {reference} differ in {len(differ):,} "
            f"tokens: {text!r} is {one.get(text, 'none')} in the one and {other.get(text, 'none')} "
            "in the other. Compare a model with the one that it was made from."
        )
    text = tokenizers[0].decode(tokens.tolist())
    if tokenizers[0].encode(text) != tokenizers[1].encode(text):
        raise ValueError(
            f"The tokenizers of {model} and of the reference {reference} have the same tokens but "
            "cut this text differently. Compare a model with the one that it was made from."
        )


def check_recorded(recorded: Windows, cut: Windows) -> None:
    """Raises ValueError where logits were recorded over another text or other windows."""
    found = (recorded.window, recorded.stride, recorded.batch)
    expected = (cut.window, cut.stride, cut.batch)
    if found != expected or not np.array_equal(recorded.tokens, cut.tokens):
        raise ValueError(
            f"The reference was recorded over {len(recorded.tokens)} tokens with (window, stride, "
            f"batch) = {found}, but these are {len(cut.tokens)} tokens with {expected}. "
            "Record it again over the same tokens and windows."
        )


def check_vocabulary(model: Any, tokens: np.ndarray, role: str) -> int | None:
    """The vocabulary's size if the model's config says it; tokens must lie inside."""
    vocab = getattr(getattr(model, "config", None), "vocab_size", None)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or (vocab is not None and high >= vocab):
        raise ValueError(
            f"The tokens run from {low} to {high}, but the {role}'s vocabulary is 0 to "
            f"{'?' if vocab is None else vocab - 1}. Was the text encoded with its tokenizer?"
        )
    return vocab


def _check_tokens(tokens: Any) -> np.ndarray:
    array = np.asarray(tokens)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer) or len(array) < 2:
        raise ValueError(
            "`tokens` must be one text of at least 2 tokens, as a vector of integers; got shape "
            f"{array.shape} and dtype {array.dtype}."
        )
    return array.astype(np.int32)
