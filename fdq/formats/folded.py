"""A quantized kernel whose axes are not `[..., K, N]`, as a matrix that is."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fdq.formats.qtensor import QTensor, dequantize
from fdq.schemes.fold import Fold
from fdq.schemes.scheme import WeightSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FoldedWeight:
    """Stands for a kernel `[..., *sizes]`; `q` is the QTensor `[..., K, N]` of the folded one.

    Its scales are along the contracted axes, whatever their order in the kernel is. Attention
    kernels of Linen, `[D, H, d]`, and weights of Equinox and torch, `[out, in]`, are such ones; of
    the latter `w @ x` is a product with `q`, and `w.T` is `q`.
    """

    q: QTensor
    fold: Fold = dataclasses.field(metadata={"static": True})
    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    __array_ufunc__ = None  # NumPy leaves operators to this class

    @property
    def spec(self) -> WeightSpec:
        """How it is stored."""
        return self.q.spec

    @property
    def padding(self) -> int:
        """As of a QTensor."""
        return self.q.padding

    def arrays(self) -> dict[str, Any]:
        """Those of `q`."""
        return self.q.arrays()

    def replace(self, **arrays: Any) -> FoldedWeight:
        """A copy with other arrays."""
        return dataclasses.replace(self, q=self.q.replace(**arrays))

    def canonical(self) -> FoldedWeight:
        """With plain arrays, as checkpoints hold them."""
        return dataclasses.replace(self, q=self.q.canonical())

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel."""
        return (*self.q.shape[:-2], *self.sizes)

    @property
    def ndim(self) -> int:
        """Rank of the kernel."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """As of a QTensor."""
        return self.q.dtype

    @property
    def code_dtype(self) -> Any:
        """As of a QTensor."""
        return self.q.code_dtype

    @property
    def nbytes(self) -> int:
        """Bytes that the arrays take."""
        return self.q.nbytes

    def dequantize(self, dtype: Any = jnp.float32) -> Any:
        """The kernel `[..., *sizes]`; a ShapeDtypeStruct if `q` holds those."""
        if self.q.is_abstract:
            return jax.ShapeDtypeStruct(self.shape, dtype)
        return self.fold.unfolded(dequantize(self.q, dtype), self.sizes)

    def astype(self, dtype: Any) -> Any:
        """The decoded kernel."""
        return self.dequantize(dtype)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        """Refused: NumPy would make an array of one object."""
        raise TypeError(f"{self!r} is no array of numbers: decode it, np.asarray(w.dequantize()).")

    def get_value(self) -> FoldedWeight:
        """Itself, as of a QTensor."""
        return self

    @property
    def value(self) -> FoldedWeight:
        """Itself, as of a QTensor."""
        return self

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.q.size

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, scales included, by weight."""
        return self.q.bits_per_weight

    @property
    def T(self) -> QTensor:
        """`q`, of a kernel `[out, in]`."""
        self._check_transposed(".T")
        return self.q

    def __matmul__(self, x: Any) -> Any:
        """`w [out, in] @ x`, x `[in]` or `[in, M]`."""
        self._check_transposed("@")
        x = x if hasattr(x, "shape") else jnp.asarray(x)
        if x.ndim not in (1, 2) or x.shape[0] != self.shape[1]:
            raise ValueError(
                f"{self!r} @ x: expected x [{self.shape[1]}] or [{self.shape[1]}, M], found "
                f"{list(x.shape)}."
            )
        return (x.T @ self.q).T

    def __rmatmul__(self, x: Any) -> Any:
        """Refused unless the kernel is one: `x @ w` contracts its last axis but one."""
        raise TypeError(
            f"x @ {self!r}: its contracted axes are others; use x @ w.q with x [..., K] and "
            "reshape the result, or w.dequantize()."
        )

    def _check_transposed(self, operator: str) -> None:
        if self.fold.order != (1, 0) or self.q.ndim != 2:
            raise TypeError(
                f"{operator} is for kernels [out, in]; this is {self!r}. Use w.q, [..., K, N], or "
                "w.dequantize()."
            )

    def __repr__(self) -> str:
        """One line without the arrays."""
        return f"FoldedWeight({list(self.sizes)} as {self.q!r})"


nnx.register_data_type(FoldedWeight)
