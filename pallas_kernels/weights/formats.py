"""Every format that matrix kernels read: a row for each file of words."""

from __future__ import annotations

from pallas_kernels.weights import codebook_words, convolutional_words, float_words, integer_words
from pallas_kernels.weights.word_format import WordFormat

_FILES = (integer_words, convolutional_words, codebook_words, float_words)

WORD_FORMATS: dict[str, WordFormat] = {row.name: row for file in _FILES for row in file.FORMATS}
"""By name. A format of your own joins them: `WORD_FORMATS["mine"] = MyWords(name="mine", ...)`."""
