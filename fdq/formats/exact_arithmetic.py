"""Float32 arithmetic that means what it says, to the last bit.

XLA may fuse `a * b + c` into one rounding in one program and not in the next, and replaces a
division by a constant or by something broadcast by a product with its reciprocal. Where a code or a
stored scale depends on the last bit, both must give what NumPy and other libraries give.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def product(small: jax.Array, x: jax.Array) -> jax.Array:
    """`small` float32 integers up to 4096 times x, rounded once, whatever is added to it later."""
    high, low = halves(x)
    # Both products are exact, so fused or not the sum is rounded once; and it is a sum, which
    # cannot be fused into a following sum.
    return small * high + small * low


def halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Float32 numbers as sums of two whose products with a small integer are exact."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    high = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFFF000), jnp.float32)
    return high, x - high


def quotient(a: jax.Array, b: jax.Array | float) -> jax.Array:
    """`a / b` rounded once to float32; both of the same rank, or `b` a number."""
    # The divisor is no longer a broadcast, as far as XLA can see. NaN stays NaN.
    return a / jnp.where(a != a, a, jnp.asarray(b, jnp.float32))
