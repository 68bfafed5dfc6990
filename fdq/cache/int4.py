"""4-bit codes with zero points: `value = (code - zero) * scale`, codes 0 .. 15.

Codes are packed along D, the even channel in the low nibble. Dynamic scales and zero points take
40 / D bits an element.
"""

from __future__ import annotations

from fdq.cache.packed_integer import PackedInteger


class Int4Cache(PackedInteger):
    """Asymmetric 4-bit integers, two channels a byte; scale = (max - min) / 15."""

    name = kernel = "int4"
    grammar_name = "4"
    synonyms = ("int4", "uint4")
    bound = 15.0
    planes = 2
