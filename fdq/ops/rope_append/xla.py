"""`rope_append` in plain XLA, and the write to a KV cache alone."""

from __future__ import annotations

import jax

from fdq.cache.cache_tensor import CacheTensor
from fdq.ops.explicit_axes import in_auto_axes, spec_entry
from fdq.ops.implementation import Implementation
from fdq.ops.rope_append.arguments import RopeAppendArguments
from fdq.ops.rope_append.rotation import rotated_heads


class Xla(Implementation[RopeAppendArguments]):
    """Any number of tokens, any cache format."""

    name = "xla"

    def __call__(
        self, arguments: RopeAppendArguments
    ) -> tuple[jax.Array, CacheTensor, CacheTensor]:
        """Rotation, quantization and the write, in steps."""
        a = arguments
        norms = {"q_norm": a.q_norm, "k_norm": a.k_norm, "epsilon": a.epsilon}
        q, k, v = rotated_heads(a.qkv, a.angles, a.kv_heads, interleaved=a.interleaved, **norms)
        return q, write_slots(a.k, k, a.start), write_slots(a.v, v, a.start)


def write_slots(tensor: CacheTensor, x: jax.Array, start: jax.Array) -> CacheTensor:
    """The tensor with T new tokens of each sequence, in place where it is donated.

    Args:
      tensor: `[B, KH, S, D]`.
      x: `[B, T, KH, D]`, keys after the rotation, or values.
      start: first slot: a scalar for all sequences, or `[B]` int32. `start + T` must not exceed
        S: the write would be moved back over older slots.
    """
    new = tensor.encode(x.swapaxes(1, 2))
    fields = {"codes": _write(tensor.codes, new.codes, start)}
    if tensor.dynamic:
        fields["scale"] = _write(tensor.scale, new.scale, start)
        if tensor.zero is not None:
            fields["zero"] = _write(tensor.zero, new.zero, start)
    return tensor.replace(**fields)


def _write(old: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """`old [B, KH, S, ...]` with `new [B, KH, T, ...]` at slots `start` (scalar or [B])."""
    rest = (0,) * (old.ndim - 3)

    def write(old, new, start):
        if start.ndim == 0:
            return jax.lax.dynamic_update_slice(old, new, (0, 0, start, *rest))
        if old.shape[0] == 1:
            return jax.lax.dynamic_update_slice(old, new, (0, 0, start[0], *rest))
        # One scatter with a window per sequence: in place, whatever the batch.
        return jax.vmap(lambda o, n, s: jax.lax.dynamic_update_slice(o, n, (0, s, *rest)))(
            old, new, start
        )

    # On Explicit mesh axes the cache stays as it is sharded, whatever the new slots are.
    return in_auto_axes(
        write, old, new, start, result=lambda: [spec_entry(old, i) for i in range(old.ndim)]
    )
