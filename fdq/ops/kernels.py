"""What the implementations that are kernels of `pallas_kernels` have in common.

A kernel is traced where the user asks for it, and on GPUs wherever it can run, is preferred by the
tuning table and passes its self-check. Kernels are imported when the first is looked at.
"""

from __future__ import annotations

from typing import Any

from fdq.cache.cache_tensor import CacheTensor
from fdq.ops.choice import trace_target
from fdq.ops.implementation import Implementation
from pallas_kernels.device import default_device
from pallas_kernels.tuning import choices

MOSAIC_GPU = "mosaic_gpu"


class Kernel[A](Implementation[A]):
    """An implementation by Pallas kernels for NVIDIA GPUs."""

    name = MOSAIC_GPU

    def skipped(self) -> str | None:
        """On everything that is no GPU."""
        return None if trace_target().platform == "gpu" else "the device is not a GPU"


def tuned(kernel: str, format: str, rows: int, weights: int) -> choices.Choice:
    """The row of the tuning table for the device of the trace; see `choices.choose`."""
    kind = default_device().device_kind
    return choices.choose(kind, kernel, format, rows=rows, weights=weights)


def slower(kernel: str, format: str, rows: int, weights: int) -> str | None:
    """Where the tuning table says that XLA is faster; None if the kernel is."""
    choice = tuned(kernel, format, rows, weights)
    return None if choice.use == MOSAIC_GPU else choice.source


def cache_unsupported(k: CacheTensor, v: CacheTensor) -> str | None:
    """Why kernels do not read or write such a cache; None if they do."""
    from pallas_kernels.cache.words import HEAD_DIMS

    if (k.spec, k.codes.dtype) != (v.spec, v.codes.dtype):
        return f"the kernels take keys and values of one format, found {k.spec} and {v.spec}"
    if k.spec is not None and k.kernel is None:
        name = k.format.name if k.format.kernel is None else str(k.spec)
        return f"no kernel reads a {name} cache"
    if k.head_dim not in HEAD_DIMS:
        return f"the kernels take head_dim {', '.join(map(str, HEAD_DIMS))}, found {k.head_dim}"
    return None


def kernel_arrays(tensor: CacheTensor) -> Any:
    """Keys or values as kernels take them."""
    from pallas_kernels.cache.arrays import CacheArrays

    return CacheArrays(tensor.codes, tensor.scale, tensor.zero, tensor.format.kernel)


def kind_of(k: CacheTensor) -> str:
    """What the tuning table calls a cache's format."""
    return k.codes.dtype.name if k.spec is None else k.spec.format
