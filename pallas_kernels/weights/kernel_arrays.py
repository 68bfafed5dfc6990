"""The type of weights laid out for kernels, apart from what makes them: it imports no Mosaic."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from pallas_kernels.weights.layout import WeightLayout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KernelWeight:
    """A quantized weight `[..., K, N]` as kernels read it, a pytree; see `kernel_weight`."""

    words: Any
    scale: Any  # None if a column has but one
    zero: Any  # int32 [..., ceil(groups / 4), N'], or None
    column_scale: Any  # or None
    constants: tuple[Any, ...]  # float32 [..., 1, N'] each, in the order of `WordFormat.columns`
    kept: dict[str, Any]  # canonical arrays that no kernel reads, for the way back
    layout: WeightLayout = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """`(..., K, N)`."""
        return (*self.words.shape[:-2], self.layout.k, self.layout.n)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self))
