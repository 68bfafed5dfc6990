"""FastDeploy's WINT8 and WINT4, bit for bit (Paddle's op `weight_quantize`).

Symmetric, codes in +-127 or +-7, halves rounded away from zero, and the scale rounded to the dtype
of the weight. The two kernels differ: the GPU divides by the absmax that was not rounded,
`round(w / a * 7)`, the CPU by the rounded scale, `round(w / T(a / 7))`. Source: Paddle's
`weight_quantize_kernel_gpu_impl.h` and `weight_quantize_kernel_impl.h`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fdq.formats import Arrays, ScaledFormat, exact_arithmetic, grouping, packing
from fdq.quantizers.quantizer import Quantizer, Statistics, format_of
from fdq.schemes.scheme import WeightSpec

BOUNDS = {"int8": 127.0, "int4": 7.0}


class FastDeploy(Quantizer):
    """FastDeploy's rounding, of its GPU kernel or of its CPU kernel."""

    def __init__(self, name: str, *, divides_by_rounded: bool):
        self.name = name
        self.divides_by_rounded = divides_by_rounded

    def unsupported(self, spec: WeightSpec, dtype: Any = jnp.float32) -> str | None:
        """Formats that FastDeploy has not, and scales that the spec could not hold."""
        if spec.format not in BOUNDS or spec.zero_point != "none":
            return (
                f"is for int8 and int4 without zero points, found {spec.format} with "
                f"zero_point={spec.zero_point!r}"
            )
        if spec.granularity not in ("channel", "group"):
            return f"has scales per channel or group, found {spec.granularity!r}"
        if spec.scale_dtype not in ("float32", str(jnp.dtype(dtype))):
            return (
                f"rounds scales to the weight's dtype {jnp.dtype(dtype)}, which scale_dtype="
                f"{spec.scale_dtype!r} would round again (use scale_dtype='float32')"
            )
        return None

    def matrix(self, w: jax.Array, spec: WeightSpec, statistics: Statistics) -> Arrays:
        """The scale is rounded to the dtype of the weight; codes are canonical, not interleaved."""
        del statistics
        bound = jnp.float32(BOUNDS[spec.format])
        dtype = w.dtype
        w = w.astype(jnp.float32)
        k, n = w.shape[-2:]
        largest = grouping.absolute_maximum(grouping.to_groups(w, spec))
        scale = round_to(exact_arithmetic.quotient(largest, bound), dtype)
        used = jnp.where(scale > 0, scale, jnp.float32(1.0))
        if not self.divides_by_rounded:
            divisor = jnp.where(largest > 0, largest, jnp.float32(1.0))
            ratio = exact_arithmetic.quotient(w, grouping.expand(divisor, spec, k, n))
            levels = exact_arithmetic.product(jnp.full_like(ratio, bound), ratio)
        else:
            levels = exact_arithmetic.quotient(w, grouping.expand(used, spec, k, n))
        levels = jnp.clip(round_half_away(levels), -bound, bound)
        format = format_of(spec)
        assert isinstance(format, ScaledFormat)
        codes = format.to_codes(levels, spec, None)
        return {"codes": packing.pack(codes, format.bits), "scale": used.astype(spec.scale_dtype)}


FASTDEPLOY = FastDeploy("fastdeploy", divides_by_rounded=False)
FASTDEPLOY_CPU = FastDeploy("fastdeploy-cpu", divides_by_rounded=True)


def round_half_away(x: jax.Array) -> jax.Array:
    """Rounds halves away from zero, as C's `round` (`floor(x + 0.5)` fails at 0.49999997)."""
    magnitude = jnp.abs(x)
    whole = jnp.floor(magnitude)
    up = (magnitude - whole >= jnp.float32(0.5)).astype(jnp.float32)
    return jnp.sign(x) * (whole + up)


def round_to(x: jax.Array, dtype: Any) -> jax.Array:
    """float32 rounded to what `dtype` can hold, in a way that XLA does not optimize away."""
    if jnp.dtype(dtype) == jnp.dtype("bfloat16"):
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return jax.lax.optimization_barrier(x.astype(dtype)).astype(jnp.float32)
