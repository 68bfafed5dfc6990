"""What the arrays of a weight stand for, in the canonical layout and in the kernels'."""

from __future__ import annotations

import dataclasses

from pallas_kernels.weights.formats import WORD_FORMATS
from pallas_kernels.weights.scales import PACKED_SCALES, PackedScale
from pallas_kernels.weights.word_format import Stored, WordFormat

COLUMNS = 128
"""N is padded to a multiple of it."""

SEGMENT = 128
"""Most rows of K that a kernel sums before it applies bias, zero point and scale."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightLayout(Stored):
    """Of a weight `[k, n]` of a format, a key of `WORD_FORMATS`; static."""

    format: str
    k: int
    n: int

    @property
    def words(self) -> WordFormat:
        """How the codes are read."""
        return WORD_FORMATS[self.format]

    @property
    def group(self) -> int | None:
        """Rows of K that share a scale; None: a whole column does."""
        if self.granularity == "group":
            return self.group_size
        return self.block_size[0] if self.block_size is not None else None

    @property
    def segment(self) -> int:
        """Rows of K that are summed before bias, zero point and scale: a power of two."""
        return SEGMENT if self.group is None else min(self.group & -self.group, SEGMENT)

    @property
    def segment_units(self) -> int:
        """Units of the format in a segment."""
        return self.segment // self.words.rows

    @property
    def segments(self) -> int:
        """Segments of a column."""
        return -(-self.k // self.segment)

    @property
    def groups(self) -> int:
        """Groups of a column."""
        return 1 if self.group is None else -(-self.k // self.group)

    @property
    def padded_n(self) -> int:
        """Columns of the kernel's arrays."""
        return -(-self.n // COLUMNS) * COLUMNS

    @property
    def packed_scale(self) -> PackedScale | None:
        """How scales of groups lie in int32 words; None where they are floats."""
        return PACKED_SCALES.get(self.scale_dtype) if self.granularity == "group" else None

    @property
    def bias(self) -> float:
        """What is subtracted from every decoded code."""
        return self.words.bias(self.zero_point)

    @property
    def canonical_shapes(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of the canonical arrays, by name."""
        small = self.groups, self.n
        if self.granularity == "tensor":
            small = 1, 1
        elif self.block_size is not None:
            small = self.groups, -(-self.n // self.block_size[1])
        packed = self.packed_scale
        shapes = {
            "codes": (self.words.code_rows(self.k), self.n),
            "scale": small if packed is None else (packed.byte_rows(self.groups), self.n),
        }
        if self.zero_point == "integer":
            shapes["zero"] = small
        return shapes | self.words.extra_shapes(self.n)
