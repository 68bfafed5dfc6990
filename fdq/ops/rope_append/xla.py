"""`rope_append` in plain XLA: the rotation and the write to a KV cache, each alone too."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from fdq.cache.block_tensor import BlockTensor
from fdq.cache.cache_tensor import CacheTensor
from fdq.cache.shardings import laid_out_like
from fdq.ops.implementation import Implementation
from fdq.ops.placement import in_auto_axes, spec_entries
from fdq.ops.rows import Normed, Rows, Sums, as_array
from pallas_kernels.typing import Array, Float


@dataclasses.dataclass(frozen=True, eq=False)
class RopeAppendArguments:
    """The arguments of `fdq.ops.rope_append.api.rope_append`."""

    qkv: Sums
    angles: tuple[jax.Array, jax.Array]
    k: CacheTensor
    v: CacheTensor
    start: jax.Array
    interleaved: bool
    q_norm: jax.Array | None = None
    k_norm: jax.Array | None = None
    epsilon: float = 1e-6

    @property
    def kv_heads(self) -> int:
        """KH."""
        return self.k.shape[1]

    @property
    def heads(self) -> int:
        """H."""
        return self.qkv.shape[-1] // self.k.head_dim - 2 * self.kv_heads


class Xla(Implementation[RopeAppendArguments]):
    """Any number of tokens, any cache format."""

    name = "xla"

    def __call__(
        self, arguments: RopeAppendArguments
    ) -> tuple[jax.Array, CacheTensor, CacheTensor]:
        """Rotation, quantization and the write, in steps."""
        a = arguments
        norms = {"q_norm": a.q_norm, "k_norm": a.k_norm, "epsilon": a.epsilon}
        settings = {"interleaved": a.interleaved, "head_dim": a.k.head_dim, **norms}
        q, k, v = rotated_heads(a.qkv, a.angles, a.kv_heads, **settings)
        return q, write_slots(a.k, k, a.start), write_slots(a.v, v, a.start)


def apply_rotary(
    x: Float[Array, "b t h d"], angles: tuple[jax.Array, jax.Array], *, interleaved: bool
) -> Float[Array, "b t h d"]:
    """Rotates `x [B, T, heads, head_dim]` by `angles`, in float32; same shape and dtype.

    Angles of fewer than `head_dim / 2` pairs rotate as many of the first channels.
    """
    turned = 2 * angles[0].shape[-1]
    if turned < x.shape[-1]:
        first = apply_rotary(x[..., :turned], angles, interleaved=interleaved)
        return jnp.concatenate([first, x[..., turned:]], axis=-1)
    cos, sin = (a[:, :, None, :] for a in angles)
    y = x.astype(jnp.float32)
    if interleaved:
        pairs = y.reshape(*y.shape[:-1], -1, 2)
        a, b = pairs[..., 0], pairs[..., 1]
    else:
        a, b = jnp.split(y, 2, axis=-1)
    a, b = a * cos - b * sin, b * cos + a * sin
    if interleaved:
        y = jnp.stack([a, b], axis=-1).reshape(x.shape)
    else:
        y = jnp.concatenate([a, b], axis=-1)
    return y.astype(x.dtype)


def rotated_heads(
    qkv: Rows,
    angles: tuple[jax.Array, jax.Array],
    kv_heads: int,
    *,
    interleaved: bool,
    head_dim: int | None = None,
    q_norm: jax.Array | None = None,
    k_norm: jax.Array | None = None,
    epsilon: float = 1e-6,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries `[B, T, H, D]`, keys and values `[B, T, KH, D]`, as `rope_append` makes them.

    Without `head_dim` whole heads are rotated, and the angles say how wide they are.
    """
    sums = qkv if isinstance(qkv, Sums) else Sums.of(as_array(qkv))
    d = head_dim or 2 * angles[0].shape[-1]
    own = kv_heads * d
    pieces = sums.pieces((sums.shape[-1] - 2 * own, own, own))
    q, k, v = (x.reshape(*x.shape[:2], -1, d) for x in pieces)
    if q_norm is not None:
        q = Normed(q, q_norm, epsilon).value()
    if k_norm is not None:
        k = Normed(k, k_norm, epsilon).value()
    q, k = (apply_rotary(a, angles, interleaved=interleaved) for a in (q, k))
    return q, k, v


def write_slots(tensor: CacheTensor, x: jax.Array, start: jax.Array) -> CacheTensor:
    """`tensor [B, KH, S, D]` with the new tokens `x [B, T, KH, D]`; `start` as in `rope_append`."""
    if isinstance(tensor, BlockTensor):
        written = tensor.replace(recent=tensor.open, first=tensor.block)
        return laid_out_like(written, BlockTensor.write, tensor, x, start)
    new = tensor.encode(x.swapaxes(1, 2))
    if not tensor.dynamic:
        return tensor.replace(codes=_write(tensor.codes, new.codes, start))
    held = ("codes", "scale", "zero")
    old = {name: a for name in held if (a := getattr(tensor, name)) is not None}
    return tensor.replace(**{name: _write(a, getattr(new, name), start) for name, a in old.items()})


def _write(old: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """`old [B, KH, S, ...]` with `new [B, KH, T, ...]` at slots `start` (scalar or [B])."""
    into = jax.lax.dynamic_update_slice_in_dim

    def write(old, new, start):
        if start.ndim == 0 or old.shape[0] == 1:
            slot = start[0] if start.ndim else start
            return into(old, new, slot, axis=2)
        # One scatter with a window per sequence: in place, whatever the batch.
        return jax.vmap(functools.partial(into, axis=1))(old, new, start)

    # On Explicit mesh axes the cache stays as it is sharded, whatever the new slots are.
    return in_auto_axes(write, old, new, start, result=lambda: spec_entries(old))
