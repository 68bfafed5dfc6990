"""Float32 arithmetic whose last bit does not depend on the compiler.

XLA's CPU and GPU backends may fuse ``a * b + c`` into one rounding, in one program and not in the
next. Where a sum after a product decides a code, both must give what NumPy gives.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def product(small: jax.Array, x: jax.Array) -> jax.Array:
    """``small * x`` rounded once to float32, whatever is added to it later.

    Args:
      small: float32 integers of magnitude at most 4096.
      x: float32, broadcastable (or of the same rank with axes of size 1).
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    high = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFFF000), jnp.float32)
    low = x - high
    # Both products are exact, so fused or not the sum is rounded once; and it is a sum, which
    # cannot be fused into a following sum.
    return small * high + small * low
