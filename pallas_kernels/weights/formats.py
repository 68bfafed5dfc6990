"""Every format that matrix kernels read: a row for each file of words."""

from __future__ import annotations

from pallas_kernels.weights import codebook_words, convolutional_words, float_words, integer_words
from pallas_kernels.weights.word_format import WordFormat

_ALL: tuple[WordFormat, ...] = (
    *integer_words.FORMATS,
    *convolutional_words.FORMATS,
    *codebook_words.FORMATS,
    *float_words.FORMATS,
)

WORD_FORMATS: dict[str, WordFormat] = {format.name: format for format in _ALL}
"""By name. A format of your own joins them: `WORD_FORMATS["mine"] = MyWords(name="mine", ...)`."""
