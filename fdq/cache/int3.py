"""3-bit codes with zero points: eight channels in three bytes, the first in the lowest bits.

Of a token the first bytes of all such groups come first, then the second and the third ones.
"""

from __future__ import annotations

from fdq.cache.packed_integer import PackedInteger


class Int3Cache(PackedInteger):
    """Asymmetric 3-bit integers, codes 0 .. 7; scale = (max - min) / 7."""

    name = "int3"
    grammar_name = "3"
    synonyms = ("int3", "uint3")
    bound = 7.0
    planes = 8
