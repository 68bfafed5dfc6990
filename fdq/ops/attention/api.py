"""Causal attention over a KV cache, quantized or not."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fdq.cache.cache_tensor import CacheTensor
from fdq.ops.attention.cudnn import Cudnn
from fdq.ops.attention.joined import JoinedKeys
from fdq.ops.attention.mosaic_gpu import MosaicGpu
from fdq.ops.attention.xla import AttentionArguments, Xla
from fdq.ops.implementation import Op
from pallas_kernels.typing import Array, Float, Int

ATTENTION: Op[AttentionArguments] = Op("attention", MosaicGpu(), Cudnn(), Xla())


def attention(
    q: Float[Array, "b t h d"],
    k: CacheTensor | JoinedKeys | Float[Array, "b kh s width"],
    v: CacheTensor | Float[Array, "b kh s other"],
    *,
    lengths: Int[Array, " b"],
    offset: Int[Array, " b"] | None = None,
    sliding_window: int | None = None,
    scale: float | None = None,
    sinks: Float[Array, " h"] | None = None,
    softcap: float | None = None,
    block_size: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "b t h out"]:
    """Each query attends to the slots up to its own position.

    Query t of sequence b stands at slot `offset[b] + t` and sees slots `s` with
    `s <= offset[b] + t`, `s < lengths[b]` and, with a window, `s > offset[b] + t - window`.
    Write the new keys and values to the cache first, then attend. In a ring, which takes one query
    and has a window, slots are positions: those seen are where `rope_append` put them.

    Args:
      q: float `[B, T, H, D]`, after the rotation.
      k: `[B, KH, S, D]`: a CacheTensor, or an array of floats; head h reads KV head
        `h // (H / KH)`. `JoinedKeys` have their channels in one or several CacheTensors.
      v: `[B, KH, S, E]`, as k; E is D unless keys are joined.
      lengths: int32 `[B]`, valid slots, those of this chunk included.
      offset: int32 `[B]`, slot of the first query; `lengths - T` if None.
      sliding_window: slots a query sees, its own included; None for all.
      scale: multiplies the scores; `D ** -0.5` if None.
      sinks: float `[H]`, a score of each head beside those of the slots, with a value of 0: it
        takes its share of the softmax (gpt-oss). None for none.
      softcap: scaled scores become `softcap * tanh(scores / softcap)` (Gemma 2); None for none.
      block_size: slots read at a time by XLA; chosen for the device if None.
      implementation: `"xla"`, `"mosaic_gpu"`, `"cudnn"` (prompts on GPUs) or None, as in
        `fdq.matmul`.

    Returns:
      `[B, T, H, E]` in the dtype of q; scores, softmax and sums are float32. Where q has 16 bits
      GPUs multiply by tensor cores, of queries, keys, probabilities and values as wide. A query
      that sees no slot gets zeros.

    Raises:
      ValueError: q, k, v and sinks that do not belong together, a window below 1, or a softcap
        that is not positive.
    """
    k = k if isinstance(k, CacheTensor | JoinedKeys) else CacheTensor(k)
    v = v if isinstance(v, CacheTensor) else CacheTensor(v)
    b, t, h, d = q.shape
    expected = (b, *k.shape[1:3], d)
    width = v.shape[3] if isinstance(k, JoinedKeys) else d
    if k.shape != expected or v.shape != (*expected[:3], width) or h % k.shape[1]:
        raise ValueError(
            f"attention: q {q.shape} needs k and v [B, KH, S, {d}] with KH dividing H={h}, "
            f"found k {k.shape} and v {v.shape}."
        )
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(
            f"attention: sliding_window={sliding_window}, expected 1 or more, or None."
        )
    ring = k.window if isinstance(k, CacheTensor) else None
    if ring is not None and (t != 1 or sliding_window is None or sliding_window > ring):
        raise ValueError(
            f"attention: a ring for a window of {ring} takes one query with a window of at most as "
            f"many, found {t} and sliding_window={sliding_window}."
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"attention: softcap={softcap}, expected a positive number, or None.")
    if sinks is not None and tuple(sinks.shape) != (h,):
        raise ValueError(f"attention: expected sinks [{h}], one a head, found {sinks.shape}.")
    lengths = lengths.astype(jnp.int32)
    offset = lengths - t if offset is None else offset.astype(jnp.int32)
    factor = d**-0.5 if scale is None else scale
    arguments = AttentionArguments(
        q, k, v, lengths, offset, sliding_window, factor, block_size, sinks, softcap
    )
    with jax.named_scope("attention"):
        return ATTENTION.choose(arguments, implementation)(arguments)
