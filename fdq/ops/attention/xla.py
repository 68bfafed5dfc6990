"""Attention block by block with an online softmax, in plain XLA.

Temporary memory is a block of slots, whatever the length of the cache; blocks beyond the longest
sequence (and before the sliding window) are not read. Scales never touch the cache: per token they
multiply scores and probabilities, per channel or head the query and the output. On CPUs codes may
be read as they are by dots of 8 or 16 bits, queries and probabilities split into rows as narrow;
a cache that is more than half full is then read as one block, which nobody has to cut out.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fdq.cache.cache_tensor import CacheTensor, join_planes
from fdq.ops.attention.joined import JoinedKeys, side_of
from fdq.ops.attention.open_block import open_parts, start_with
from fdq.ops.attention.sides import MOST_SUMMED, cache_side, rounded_to
from fdq.ops.choice import Program, choose_program, trace_target, traced_for
from fdq.ops.implementation import Implementation
from fdq.ops.placement import in_auto_axes, spec_entries
from pallas_kernels.typing import Array, Float, Int

_BLOCK = 256
# Of a cache that is read whole: no more than 32 MB of temporary memory.
_MOST_SCORES = 2**20
_MOST_GPU_SCORES = 2**24
_MASKED = -1e30  # finite: a block with no visible slot must not make NaN of inf - inf


@dataclasses.dataclass(frozen=True)
class AttentionArguments:
    """Checked arguments of `fdq.attention`, with nothing left out; see there."""

    q: jax.Array
    k: CacheTensor | JoinedKeys
    v: CacheTensor
    lengths: jax.Array
    offset: jax.Array
    sliding_window: int | None
    scale: float
    block_size: int | None = None
    sinks: jax.Array | None = None
    softcap: float | None = None

    @property
    def is_ring(self) -> bool:
        """Whether slots are those of a ring, see `fdq.cache.ring`."""
        return isinstance(self.k, CacheTensor) and self.k.window is not None

    def program(self) -> Program:
        """How the cache is read, so many slots at a time; see `fdq.ops.choice.Program`."""
        if trace_target().platform != "cpu":
            return Program("decoded", self.block_size or self._block())
        rows = self.q.shape[1] * self.q.shape[2] // self.k.shape[1]
        path = f"attention {self.k.format.name}"
        chosen = choose_program(path, rows, self.k.shape[2], default="attention")
        return dataclasses.replace(chosen, size=self.block_size or chosen.size)

    def _block(self) -> int:
        """Slots at a time on GPUs: as many as keep the scores in 64 MB."""
        b, t, h, _ = (n if isinstance(n, int) else 1 for n in self.q.shape)
        return max(_BLOCK, 1 << max(0, (_MOST_GPU_SCORES // (b * t * h)).bit_length() - 1))

    def narrow(self) -> Any:
        """What operands of dots are rounded to: GPUs have tensor cores for 16-bit floats only."""
        target, dtype = trace_target(), self.q.dtype
        if target.platform != "gpu" or dtype not in (jnp.bfloat16, jnp.float16):
            return None
        return dtype if target.has_bfloat16 or dtype == jnp.float16 else None


def attention_reference(
    q: Float[Array, "b t h d"],
    k: CacheTensor | JoinedKeys | Float[Array, "b kh s d"],
    v: CacheTensor | Float[Array, "b kh s width"],
    *,
    lengths: Int[Array, " b"],
    offset: Int[Array, " b"] | None = None,
    sliding_window: int | None = None,
    scale: float | None = None,
    sinks: Float[Array, " h"] | None = None,
    softcap: float | None = None,
) -> Float[Array, "b t h width"]:
    """The meaning of `fdq.attention`: decode the cache, one softmax over all slots, float32."""
    t, h, d = q.shape[1:]
    keys, values = (
        a.dequantize() if isinstance(a, CacheTensor | JoinedKeys) else a.astype(jnp.float32)
        for a in (k, v)
    )
    keys, values = (jnp.repeat(a, h // a.shape[1], axis=1) for a in (keys, values))
    offset = lengths - t if offset is None else offset
    position = (offset[:, None] + jnp.arange(t, dtype=jnp.int32)[None, :])[:, None, :, None]
    slot = jnp.arange(keys.shape[2], dtype=jnp.int32)[None, None, None, :]
    if isinstance(k, CacheTensor) and k.window is not None:
        slot = position - (position - slot) % keys.shape[2]  # the position that it holds
    visible = (slot >= 0) & (slot <= position) & (slot < lengths[:, None, None, None])
    if sliding_window is not None:
        visible &= slot > position - sliding_window
    highest = lax.Precision.HIGHEST
    scores = jnp.einsum("bthd,bhsd->bhts", q.astype(jnp.float32), keys, precision=highest)
    scores = softcapped(scores * (d**-0.5 if scale is None else scale), softcap)
    scores = jnp.where(visible, scores, _MASKED)
    weights = softmax_beside(scores, None if sinks is None else sinks.reshape(1, h, 1, 1))
    weights = jnp.where(visible, weights, 0.0)
    out = jnp.einsum("bhts,bhsd->bthd", weights, values, precision=highest)
    return out.astype(q.dtype)


def softcapped(scores: jax.Array, cap: float | None) -> jax.Array:
    """`cap * tanh(scores / cap)`: what is far below the cap stays as it is; None leaves all."""
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def softmax_beside(scores: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """The softmax of `scores [..., S]` over S, where one more score `[..., 1]` takes its share."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sinks = sinks.astype(scores.dtype)
    largest = lax.stop_gradient(jnp.maximum(scores.max(axis=-1, keepdims=True), sinks))
    weights = jnp.exp(scores - largest)
    return weights / (weights.sum(axis=-1, keepdims=True) + jnp.exp(sinks - largest))


class Xla(Implementation[AttentionArguments]):
    """Everything: any device, shape and cache format."""

    name = "xla"

    def __call__(self, arguments: AttentionArguments) -> jax.Array:
        """Traced with Auto axes; the result is sharded like the queries."""
        a = arguments
        if any(isinstance(n, int) and n == 0 for n in (*a.q.shape, a.k.shape[2])):
            return jnp.zeros((*a.q.shape[:3], a.v.head_dim), a.q.dtype)
        settings = (a.sliding_window, a.scale, a.block_size, a.softcap, traced_for())
        parts = a.program().name == "parts"
        attend = functools.partial(_by_parts if parts else _attend, settings)
        arrays = (a.q, a.k, a.v, a.lengths, a.offset, a.sinks)
        return in_auto_axes(attend, *arrays, result=lambda: spec_entries(a.q))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _by_parts(settings, q, k, v, lengths, offset, sinks) -> jax.Array:
    """Parts of floats are rounded, which has no derivative: that is of the decoded cache's."""
    return _attend(settings, q, k, v, lengths, offset, sinks)


@_by_parts.defjvp
def _(settings, primals, tangents):
    return jax.jvp(functools.partial(_attend, settings, decoded=True), primals, tangents)


@functools.partial(jax.jit, static_argnums=0, static_argnames="decoded")
def _attend(settings, q, k, v, lengths, offset, sinks, *, decoded: bool = False) -> jax.Array:
    """Traced once for all layers; `settings` are all else that it depends on.

    With `decoded` by the program of that name, whatever suits the CPU.
    """
    sliding_window, scale, block_size, softcap, _ = settings
    a = AttentionArguments(
        q, k, v, lengths, offset, sliding_window, scale, block_size, sinks, softcap
    )
    program = Program("decoded", block_size or _BLOCK) if decoded else a.program()
    narrow = a.narrow()
    key, value = side_of(a.k, program.name, narrow), cache_side(a.v, program.name, narrow)
    b, t, h, d = q.shape
    width = a.v.head_dim
    kh, slots = a.k.shape[1], key.slots
    group = h // kh
    block = key.block(program.size, t * group)
    # [B, KH, T * G, D]: the queries of a KV head are the rows of one dot.
    queries = q.astype(jnp.float32) * jnp.float32(a.scale)
    queries = queries.reshape(b, t, kh, group, d).transpose(0, 2, 1, 3, 4)
    queries = queries.reshape(b, kh, t * group, d)
    position = offset[:, None] + jnp.arange(t, dtype=jnp.int32)[None, :]
    position = jnp.repeat(position, group, axis=1, total_repeat_length=t * group)
    exact = open_parts(a.k, a.v)
    plain, queries = queries, rounded_to(key.scaled(queries), narrow)
    query_sum = jnp.sum(queries, axis=-1, keepdims=True)
    # A softmax does not see what all scores have in common; sinks and caps do.
    common = None if sinks is None and softcap is None else key.left_in(queries)
    query_rows = key.rows(queries)
    # A whole cache is read where nobody has to write its codes once more, as narrower ones.
    few = (
        key.chunked
        and key.lies_as_read
        and all(isinstance(n, int) for n in queries.shape)
        and queries.size // d * slots <= _MOST_SCORES
        and slots // key.chunks(slots) <= MOST_SUMMED
    )

    # A query sees slots from `lower` to before `upper`, [B, T * G].
    lower, first = jnp.zeros_like(position), jnp.int32(0)
    upper = jnp.minimum(key.seen_below(position), lengths[:, None])
    if sliding_window is not None:
        lower = position - (sliding_window - 1)
        first = jnp.maximum(jnp.min(offset) - (sliding_window - 1), 0) // block
    if a.is_ring:
        lower, first = jnp.maximum(lower, 0), jnp.int32(0)
    last = jnp.minimum((jnp.max(lengths) + (block - 1)) // block, -(-slots // block))

    def read(i, carry, block):
        """The carry after block i, of so many slots."""
        largest, total, out = carry
        start = jnp.minimum(i * block, slots - block)
        # The last block starts early enough to be whole: slots seen before are masked.
        slot = start + jnp.arange(block, dtype=jnp.int32).reshape(1, key.chunks(block), 1, -1)
        if a.is_ring:
            here = position[:, None, :, None]
            held = here - (here - slot) % slots  # the position that a slot holds
            visible = (slot >= i * block) & (held >= lower[:, None, :, None])
        else:
            held = slot
            visible = slot >= jnp.maximum(lower, i * block)[:, None, :, None]
        visible = visible & (held < upper[:, None, :, None])
        scores = key.dots(query_rows, start, block)
        scores = key.finish_scores(scores, query_sum, start, block)
        scores = scores if common is None else scores - common[:, :, None]
        scores = softcapped(scores, softcap)
        scores = key.kept(jnp.where(visible[:, None], scores, jnp.float32(_MASKED)))
        new_largest = jnp.max(jnp.max(scores, axis=-1, keepdims=True), axis=2)
        new_largest = jnp.maximum(largest, new_largest)
        # A row that has seen nothing yet: exp(_MASKED - 0) is 0, exp(_MASKED - _MASKED) is not.
        seen = jnp.where(new_largest == jnp.float32(_MASKED), jnp.float32(0), new_largest)
        weights = key.kept(jnp.exp(scores - seen[:, :, None]))
        shrink = jnp.exp(largest - new_largest)
        total = total * shrink + jnp.sum(jnp.sum(weights, axis=-1, keepdims=True), axis=2)
        update = value.weighted_sum(weights, start, block)
        out = [o * shrink + u for o, u in zip(out, update, strict=True)]
        return new_largest, total, out

    rows = (b, kh, t * group)
    zero = jnp.float32(0)
    if trace_target().platform == "gpu":
        # Zeros that depend on nothing are written for all layers at once, and held till theirs.
        zero, query_rows = lax.optimization_barrier((zero, query_rows))
    nothing = [jnp.full((*rows, width // value.planes), zero) for _ in range(value.planes)]
    if sinks is None:
        sink = jnp.full((*rows, 1), _MASKED, jnp.float32)
        start_state = sink, jnp.zeros((*rows, 1), jnp.float32), nothing
    else:  # as if a slot with that score had been seen, of value 0
        sink = jnp.broadcast_to(
            sinks.astype(jnp.float32).reshape(1, kh, 1, group), (b, kh, t, group)
        )
        sink = sink.reshape(*rows, 1)
        start_state = sink, jnp.ones((*rows, 1), jnp.float32), nothing
    if exact is not None:
        start_state = start_with(exact, start_state, plain, a)

    def in_blocks(state):
        return lax.fori_loop(first, last, lambda i, state: read(i, state, block), state)

    def whole(state):
        return read(0, state, slots)

    if not slots:
        largest, total, out = start_state
    elif block == slots:
        largest, total, out = whole(start_state)
    elif a.block_size or not few:
        largest, total, out = in_blocks(start_state)
    else:
        most = 2 * block * (last - first) > slots
        largest, total, out = lax.cond(most, whole, in_blocks, start_state)
    out = value.scaled(join_planes(out) / jnp.where(total == 0, jnp.float32(1), total))
    left = value.left_in_output()
    if left is not None:
        seen = (total > 0).astype(jnp.float32)
        if sinks is not None:
            seen = 1 - jnp.exp(sink - largest) / total
        out = out - seen * left
    out = out.reshape(b, kh, t, group, width).transpose(0, 2, 1, 3, 4)
    return out.reshape(b, t, h, width).astype(q.dtype)
