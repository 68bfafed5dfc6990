"""Weights as a device reads them fastest: types of their own, made of QTensors and turned back.

GPUs want `WordsWeight`. CPUs with matrix units (AMX) want `TransposedWeight`, int8 codes `[N, K]`:
0.7 ms at 4096 x 4096 against 1.1 ms for the element-wise fusion over `[K, N]`; without them it is
the slower of the two (AMD Zen 4: 3.0 ms against 2.4 ms).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from fdq.formats import row_order
from fdq.formats.qtensor import QTensor, QuantizedWeight, materialize
from fdq.schemes.scheme import WeightSpec

if TYPE_CHECKING:
    from pallas_kernels.weights.kernel_weight import KernelWeight


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PreparedWeight(QuantizedWeight):
    """A weight in the layout of a device; `data` is a pytree, in a module a Variable of it.

    The data are of the rows as the codes have them, `row_order` is as in a QTensor.
    """

    data: Any
    row_order: Any = dataclasses.field(default=None, kw_only=True)
    spec: WeightSpec = dataclasses.field(kw_only=True, metadata={"static": True})
    padding: int = dataclasses.field(default=0, kw_only=True, metadata={"static": True})

    @classmethod
    def unsupported(cls, q: QTensor) -> str | None:
        """Why a weight has no such layout; None if it has."""
        raise NotImplementedError

    @classmethod
    def of(cls, q: QuantizedWeight) -> Self:
        """A weight in this layout; a QTensor of `jax.ShapeDtypeStruct` s gives an abstract one."""
        spec = q.spec
        q, order = q.canonical().without_order()
        convert = functools.partial(cls._convert, spec=q.spec, shape=(q.shape[-2], q.shape[-1]))
        data = jax.eval_shape(convert, q.arrays()) if q.is_abstract else convert(q.arrays())
        return cls(data, row_order=order, spec=spec, padding=q.padding)

    def canonical(self) -> QTensor:
        """The inverse of `of`, bit for bit."""
        held, convert = materialize(self), self._restore
        arrays = jax.eval_shape(convert, held.data) if self.is_abstract else convert(held.data)
        order = {} if held.row_order is None else {row_order.NAME: held.row_order}
        return QTensor(spec=self.spec, padding=self.padding, **arrays, **order)

    def without_order(self) -> tuple[Self, Any]:
        """The weight of the codes' rows, and their order."""
        if not self.spec.row_order:
            return self, None
        spec = dataclasses.replace(self.spec, row_order=False)
        return self.replace(spec=spec, row_order=None), self.row_order

    @staticmethod
    def _convert(arrays: dict[str, Any], *, spec: WeightSpec, shape: tuple[int, int]) -> Any:
        raise NotImplementedError

    @staticmethod
    def _restore(data: Any) -> dict[str, Any]:
        raise NotImplementedError

    def arrays(self) -> dict[str, Any]:
        """The data, and the order of rows where there is one."""
        order = {} if self.row_order is None else {row_order.NAME: self.row_order}
        return {"data": self.data, **order}

    def replace(self, **changes: Any) -> Self:
        """A copy with other data."""
        return dataclasses.replace(self, **changes)

    @property
    def shape(self) -> tuple[int, ...]:
        """`(..., K, N)`."""
        return tuple(self.data.shape)


@jax.tree_util.register_dataclass
class WordsWeight(PreparedWeight):
    """A `KernelWeight`; kernels are imported at the first, as Mosaic takes a third of a second."""

    layout = "mosaic_gpu"

    @classmethod
    def unsupported(cls, q: QuantizedWeight) -> str | None:
        """Where no kernel reads the format."""
        if q.spec.zero_point == "offset":
            return "no kernel reads codes with offsets"
        from pallas_kernels.weights.kernel_weight import unsupported

        return unsupported(q.spec.format, **_scaling(q.spec))

    # One function for all weights: those of equal shapes share what was compiled.
    @staticmethod
    @functools.partial(jax.jit, static_argnames=("spec", "shape"))
    def _convert(arrays: dict[str, Any], *, spec: WeightSpec, shape: tuple[int, int]) -> Any:
        from pallas_kernels.weights.kernel_weight import to_kernel

        settings: Any = {"format": spec.format, "zero_point": spec.zero_point, **_scaling(spec)}
        return to_kernel(arrays, k=shape[0], n=shape[1], **settings)

    @staticmethod
    def _restore(data: KernelWeight) -> dict[str, Any]:
        from pallas_kernels.weights.kernel_weight import from_kernel

        return from_kernel(data)

    @property
    def code_dtype(self) -> Any:
        """Dtype of the codes as checkpoints hold them."""
        return jnp.dtype(materialize(self).data.layout.code_dtype)


def _scaling(spec: WeightSpec) -> dict[str, Any]:
    names = ("granularity", "group_size", "block_size")
    return {name: getattr(spec, name) for name in names}


def kernel_weight(w: QuantizedWeight) -> KernelWeight:
    """The words of a weight; of a QTensor they are made here, which costs a copy."""
    return materialize(w if isinstance(w, WordsWeight) else WordsWeight.of(w)).data


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transposed:
    """Codes int8 `[N, K]`; the scale as in a checkpoint."""

    codes: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """`(..., K, N)`."""
        *lead, n, k = self.codes.shape
        return (*lead, k, n)


@jax.tree_util.register_dataclass
class TransposedWeight(PreparedWeight):
    """int8 for CPUs with matrix units: `data` is a `Transposed`."""

    layout = "transposed"

    @classmethod
    def unsupported(cls, q: QuantizedWeight) -> str | None:
        """Other than plain int8."""
        spec = q.spec
        if spec.format != "int8" or spec.granularity not in ("channel", "tensor"):
            return "only int8 with scales per channel or tensor is transposed"
        return None if spec.zero_point == "none" else "codes with zero points are not transposed"

    @staticmethod
    def _convert(arrays: dict[str, Any], *, spec: WeightSpec, shape: tuple[int, int]) -> Transposed:
        return Transposed(jnp.swapaxes(arrays["codes"], -1, -2), arrays["scale"])

    @staticmethod
    def _restore(data: Transposed) -> dict[str, Any]:
        return {"codes": jnp.swapaxes(data.codes, -1, -2), "scale": data.scale}

    @property
    def code_dtype(self) -> Any:
        """int8."""
        return jnp.dtype(jnp.int8)


PREPARED = (WordsWeight, TransposedWeight)
for _kind in PREPARED:
    nnx.register_data_type(_kind)
