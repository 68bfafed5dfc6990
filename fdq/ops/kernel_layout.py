"""The layout ``mosaic_gpu``: a QTensor whose codes are a ``KernelWeight`` of ``pallas_kernels``.

Kernels are imported when the first is asked for: Mosaic takes a third of a second.
"""

from __future__ import annotations

import functools
from typing import Any

import jax

from fdq.formats.qtensor import LAYOUTS, Layout, QTensor, canonical, materialize
from fdq.schemes.scheme import WeightSpec

MOSAIC_GPU = "mosaic_gpu"


def layout_obstacle(q: QTensor) -> str | None:
    """Why no kernel reads this weight, in one line; None if one does."""
    from pallas_kernels.weights.kernel_weight import unsupported

    spec = q.spec
    return unsupported(
        spec.format,
        granularity=spec.granularity,
        group_size=spec.group_size,
        block_size=spec.block_size,
    )


def kernel_weight(q: QTensor) -> Any:
    """The ``KernelWeight`` of a QTensor; of a canonical one it is made here, which costs a copy."""
    q = materialize(q)
    if q.layout == MOSAIC_GPU:
        return q.codes
    return _to_kernel(canonical(q)).codes


def _to_kernel(q: QTensor) -> QTensor:
    q = materialize(q)
    convert = functools.partial(_convert, spec=q.spec, shape=q.shape[-2:])
    abstract = isinstance(q.codes, jax.ShapeDtypeStruct)
    codes = jax.eval_shape(convert, q.arrays()) if abstract else convert(q.arrays())
    return QTensor(codes=codes, spec=q.spec, padding=q.padding, layout=MOSAIC_GPU)


# One function for all weights: those of equal shapes share what was compiled.
@functools.partial(jax.jit, static_argnames=("spec", "shape"))
def _convert(arrays: dict[str, Any], *, spec: WeightSpec, shape: tuple[int, int]) -> Any:
    from pallas_kernels.weights.kernel_weight import to_kernel

    return to_kernel(
        arrays,
        format=spec.format,
        granularity=spec.granularity,
        group_size=spec.group_size,
        block_size=spec.block_size,
        zero_point=spec.zero_point,
        k=shape[0],
        n=shape[1],
    )


def _from_kernel(q: QTensor) -> QTensor:
    from pallas_kernels.weights.kernel_weight import from_kernel

    weight = materialize(q).codes
    abstract = isinstance(weight.words, jax.ShapeDtypeStruct)
    arrays = jax.eval_shape(from_kernel, weight) if abstract else from_kernel(weight)
    return QTensor(spec=q.spec, padding=q.padding, **arrays)


LAYOUTS[MOSAIC_GPU] = Layout(
    shape=lambda q: tuple(q.codes.shape),
    to_canonical=_from_kernel,
    from_canonical=_to_kernel,
)
