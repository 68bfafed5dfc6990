"""A program of the append kernel that a test compiles in a child process."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.append.cache_update import append
from pallas_kernels.cache.arrays import CacheArrays

B, HEADS, KV_HEADS, SLOTS, D = 2, 4, 2, 1024, 128
FORMATS = {
    "int8": ("int8", D, ["float32"]),
    "int4": ("uint8", D // 2, ["float32", "uint8"]),
    None: ("float16", D, []),
}


def arguments(cache_format):
    """Abstract caches, row, angles and slots."""
    dtype, width, small = FORMATS[cache_format]
    codes = jax.ShapeDtypeStruct((B, KV_HEADS, SLOTS, width), dtype)
    small = [jax.ShapeDtypeStruct((B, KV_HEADS, SLOTS), d) for d in small]
    side = CacheArrays(codes, *small, format=cache_format)
    row = jax.ShapeDtypeStruct((B, (HEADS + 2 * KV_HEADS) * D), "float16")
    angles = jax.ShapeDtypeStruct((B, D // 2), "float32")
    return (side, side), row, angles, jax.ShapeDtypeStruct((B,), "int32")


def append_in_a_loop(caches, row, angles, slots):
    """Eight tokens, each depending on the one before."""

    def step(i, state):
        caches, row = state
        out = append(
            row,
            jnp.cos(angles),
            jnp.sin(angles),
            slots + i,
            *caches,
            heads=HEADS,
            interleaved=True,
        )
        row = row.at[:, : HEADS * D].add(out.q.reshape(B, -1))
        return out[1:], row

    return lax.fori_loop(0, 8, step, (caches, row))
