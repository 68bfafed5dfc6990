"""`rope_append`: what stands between the product of queries, keys and values and attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fdq.cache.cache_tensor import CacheTensor
from fdq.ops.implementation import Op
from fdq.ops.rope_append.mosaic_gpu import MosaicGpu
from fdq.ops.rope_append.xla import RopeAppendArguments, Xla
from fdq.ops.rows import Rows, Sums, as_array
from pallas_kernels.typing import Array, Float

ROPE_APPEND: Op[RopeAppendArguments] = Op("rope_append", MosaicGpu(), Xla())
"""Implementations return the queries and both halves of the cache."""


def rope_append(
    qkv: Rows,
    angles: tuple[Float[Array, "b t pairs"], Float[Array, "b t pairs"]],
    k: CacheTensor,
    v: CacheTensor,
    start: jax.Array,
    *,
    interleaved: bool,
    q_norm: Float[Array, " d"] | None = None,
    k_norm: Float[Array, " d"] | None = None,
    epsilon: float = 1e-6,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t h d"], CacheTensor, CacheTensor]:
    """Rotates queries and keys, and writes keys and values to the cache of a layer.

    Args:
      qkv: `[B, T, (H + 2 KH) D]`, queries, keys and values in this order; the `Sums` of a product
        are added up here.
      angles: cosines and sines of the positions, float32 `[B, T, R / 2]` each, where the first R
        of a head's D channels are rotated.
      k: what the layer has stored, `[B, KH, S, D]`; written in place where it is donated.
      v: as k.
      start: slot that the first of the T tokens goes to: a scalar for all sequences, or `[B]`.
        `start + T` must not exceed S: the write would be moved back over older slots. In a ring
        (see `fdq.cache.ring`) it is the position of one token, however far on.
      interleaved: whether channels 2i and 2i + 1 are rotated together, or i and i + R / 2.
      q_norm: `[D]`, the scale of an RMS norm of each query before the rotation, or None.
      k_norm: likewise of keys; both or neither.
      epsilon: of the norms.
      implementation: as in `fdq.matmul`.

    Returns:
      The queries `[B, T, H, D]` in the dtype of qkv, and the cache with the new tokens.

    Raises:
      ValueError: arrays that do not belong together.
    """
    if not isinstance(qkv, Sums):
        qkv = Sums.of(as_array(qkv))
    b, kv_heads, _, d = k.shape
    width = qkv.shape[-1]
    if len(qkv.shape) != 3 or qkv.shape[0] != b or width % d or width // d <= 2 * kv_heads:
        raise ValueError(
            f"rope_append: qkv {qkv.shape} beside a cache {k.shape}: expected "
            f"[{b}, T, (heads + {2 * kv_heads}) {d}]."
        )
    if 2 * angles[0].shape[-1] > d:
        raise ValueError(
            f"rope_append: angles {angles[0].shape} of more than the {d} channels of a head."
        )
    if (q_norm is None) != (k_norm is None):
        raise ValueError("rope_append: q_norm and k_norm go together; found one of them.")
    start = jnp.asarray(start)
    if k.window is not None:
        if qkv.shape[1] != 1:
            raise ValueError(
                f"rope_append: {qkv.shape[1]} tokens for a ring, expected 1; fdq.nn.Attention "
                "writes several with fdq.ops.rope_append.ring."
            )
        start = start % k.shape[2]
    arguments = RopeAppendArguments(qkv, angles, k, v, start, interleaved, q_norm, k_norm, epsilon)
    with jax.named_scope("rope_append"):
        return ROPE_APPEND.choose(arguments, implementation)(arguments)
