"""2-bit codes with zero points: four channels a byte, the first in the lowest bits."""

from __future__ import annotations

from fdq.cache.packed_integer import PackedInteger


class Int2Cache(PackedInteger):
    """Asymmetric 2-bit integers, codes 0 .. 3; scale = (max - min) / 3."""

    name = "int2"
    grammar_name = "2"
    synonyms = ("int2", "uint2")
    bound = 3.0
    planes = 4
