"""FastDeploy's WINT8 and WINT4, bit for bit (Paddle's op ``weight_quantize``).

Symmetric, codes in +-127 or +-7, halves rounded away from zero, and the scale rounded to the dtype
of the weight. The two kernels differ: the GPU divides by the absmax that was not rounded,
``round(w / a * 7)``, the CPU by the rounded scale, ``round(w / T(a / 7))``. Source: Paddle's
``weight_quantize_kernel_gpu_impl.h`` and ``weight_quantize_kernel_impl.h``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fdq.formats import FORMATS, Arrays, exact_arithmetic, grouping, packing
from fdq.schemes.scheme import WeightSpec

COMPAT = ("fastdeploy", "fastdeploy-cpu")
BOUNDS = {"int8": 127.0, "int4": 7.0}


def check(
    spec: WeightSpec, compat: str, dtype: Any, method: str | None, important: bool, path: str
) -> None:
    """Raises ValueError where FastDeploy has no such format, or the spec could not hold it."""
    if compat not in COMPAT:
        raise ValueError(f"{path}: unknown compat {compat!r}; use one of {', '.join(COMPAT)}.")
    if spec.format not in BOUNDS or spec.zero_point != "none":
        raise ValueError(
            f"{path}: compat={compat!r} is for int8 and int4 without zero points, found "
            f"{spec.format} with zero_point={spec.zero_point!r}. Drop compat for this tensor."
        )
    if spec.granularity not in ("channel", "group"):
        raise ValueError(
            f"{path}: compat={compat!r} has scales per channel or group, found "
            f"{spec.granularity!r}."
        )
    if method is not None or important:
        raise ValueError(
            f"{path}: compat={compat!r} fixes how scales are chosen; drop method and importance."
        )
    if spec.scale_dtype not in ("float32", str(jnp.dtype(dtype))):
        raise ValueError(
            f"{path}: compat={compat!r} rounds scales to the weight's dtype {jnp.dtype(dtype)}, "
            f"which scale_dtype={spec.scale_dtype!r} would round again; use scale_dtype='float32'."
        )


def quantize(w: jax.Array, spec: WeightSpec, compat: str) -> Arrays:
    """Quantizes ``[..., K, N]`` of the checkpoint's own dtype.

    Args:
      w: the weight; its dtype is what the scale is rounded to.
      spec: int8 or int4, per channel or group.
      compat: ``"fastdeploy"`` (GPU kernel) or ``"fastdeploy-cpu"``.

    Returns:
      ``codes`` and ``scale`` in the canonical layout (not FastDeploy's interleaved one).
    """
    bound = jnp.float32(BOUNDS[spec.format])
    dtype = w.dtype
    w = w.astype(jnp.float32)
    k, n = w.shape[-2:]
    largest = grouping.absolute_maximum(grouping.to_groups(w, spec))
    scale = round_to(exact_arithmetic.quotient(largest, bound), dtype)
    used = jnp.where(scale > 0, scale, jnp.float32(1.0))
    if compat == "fastdeploy":
        divisor = jnp.where(largest > 0, largest, jnp.float32(1.0))
        ratio = exact_arithmetic.quotient(w, grouping.expand(divisor, spec, k, n))
        levels = exact_arithmetic.product(jnp.full_like(ratio, bound), ratio)
    else:
        levels = exact_arithmetic.quotient(w, grouping.expand(used, spec, k, n))
    levels = jnp.clip(round_half_away(levels), -bound, bound)
    format = FORMATS[spec.format]
    codes = format.to_codes(levels, spec, None)
    return {
        "codes": packing.pack(codes, format.bits),
        "scale": used.astype(spec.scale_dtype),
    }


def round_half_away(x: jax.Array) -> jax.Array:
    """Rounds halves away from zero, as C's ``round`` (``floor(x + 0.5)`` fails at 0.49999997)."""
    magnitude = jnp.abs(x)
    whole = jnp.floor(magnitude)
    up = (magnitude - whole >= jnp.float32(0.5)).astype(jnp.float32)
    return jnp.sign(x) * (whole + up)


def round_to(x: jax.Array, dtype: Any) -> jax.Array:
    """float32 rounded to what ``dtype`` can hold, in a way that XLA does not optimize away."""
    if jnp.dtype(dtype) == jnp.dtype("bfloat16"):
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return jax.lax.optimization_barrier(x.astype(dtype)).astype(jnp.float32)
