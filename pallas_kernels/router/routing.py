"""The router of a mixture of experts in two launches: its product, and the choice of experts.

XLA needs three launches for the norm, two for the float32 product and five for the choice (softmax,
bias, sort, gather, normalization), which in a decode step cost more than the experts' bytes.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mg

from pallas_kernels.attention.parts import spread
from pallas_kernels.matmul.row_sources import (
    Normed,
    finished,
    inverse_root_mean_square,
    rows_shape,
    whole,
)
from pallas_kernels.mosaic.launch import THREADS, launch, load, store, synchronize
from pallas_kernels.transformations import batchable, differentiable
from pallas_kernels.typing import Array, Float, Int

_ROUTER_STEP = 128  # rows of the router's kernel that are staged at a time
_ROUTER_PARTS = 32
_BIAS_STEP = 32  # experts whose correction bias is read at a time
_LOWEST = -3.0e38  # of padded experts; finite, so that differences are


def router_logits_reference(
    x: jax.Array | Normed, kernel: Float[Array, "k e"]
) -> Float[Array, "1 m e"]:
    """The meaning of `router_logits`, summed over its parts: `[1, M, E]`."""
    rows = x.value() if isinstance(x, Normed) else x
    product = jnp.matmul(
        rows.astype(jnp.float32), kernel.astype(jnp.float32), precision=lax.Precision.HIGHEST
    )
    return product[None]


def router_logits(x: jax.Array | Normed, kernel: jax.Array) -> Float[Array, "split m width"]:
    """`x @ kernel` in float32, as partial sums that `top_k_experts` adds up, with its gradient.

    x is `[M, K]` float, or `Normed`; the kernel float32 `[K, E]`, E 64, 128 or 256. The result is
    float32 `[split, M, max(E, 128)]`, of which columns from E on are not written. Other shapes are
    a ValueError.
    """
    m, k = rows_shape(x, "router_logits")
    if kernel.ndim != 2 or kernel.shape[0] != k or not supports_router(kernel.shape[1], k):
        raise ValueError(
            f"router_logits: x {(m, k)} needs a kernel [K={k}, E] of 64, 128 or 256 experts, and K "
            f"a multiple of {_ROUTER_STEP}; found {kernel.shape}. Use XLA for others."
        )
    if kernel.dtype != jnp.float32:
        raise ValueError(f"router_logits: expected a float32 kernel, found {kernel.dtype.name}.")

    def run(x, kernel):
        if not isinstance(x, Normed):
            return _logits((whole(x),), kernel, epsilon=None)
        return _logits((whole(x.x), whole(x.scale, 0)), kernel, epsilon=x.epsilon)

    def gradient(cotangent, x, kernel):
        return jax.vjp(_partial_logits, x, kernel)[1](cotangent)

    return differentiable(batchable(run), gradient)(x, kernel)


def _partial_logits(x: jax.Array | Normed, kernel: jax.Array) -> jax.Array:
    """`router_logits` in plain JAX, with its parts; zeros where it writes nothing."""
    k, experts = kernel.shape
    parts, steps = _cut(k)
    missing = parts * steps * _ROUTER_STEP - k
    rows = jnp.pad(finished(x).astype(jnp.float32), [(0, 0), (0, missing)])
    rows = rows.reshape(rows.shape[0], parts, -1)
    slices = jnp.pad(kernel, [(0, missing), (0, 0)]).reshape(parts, -1, experts)
    product = jnp.einsum("mpk,pke->pme", rows, slices, precision=lax.Precision.HIGHEST)
    return jnp.pad(product, [(0, 0), (0, 0), (0, max(experts, THREADS) - experts)])


def _cut(k: int) -> tuple[int, int]:
    """Parts of K, and steps of each."""
    parts = min(_ROUTER_PARTS, k // _ROUTER_STEP)
    return parts, -(-k // (_ROUTER_STEP * parts))


def supports_router(experts: int, hidden: int) -> bool:
    """Whether `router_logits` takes a `[hidden, experts]` kernel."""
    return experts in (64, 128, 256) and hidden % _ROUTER_STEP == 0


@functools.partial(jax.jit, static_argnames=("epsilon",))
def _logits(operands, kernel, *, epsilon):
    k, experts = kernel.shape
    m = operands[0].shape[0]
    parts, steps = _cut(k)
    rows = 4 * THREADS // experts  # that 128 threads read at a time
    layout = _router_layout(experts)

    def router_logits_kernel(*refs):
        inputs, kernel_ref, out_ref, staged = refs[:-3], refs[-3], refs[-2], refs[-1]
        part = lax.axis_index("part")
        row = lax.axis_index("row")
        first = part * (steps * _ROUTER_STEP)
        factor = None
        if epsilon is not None:
            factor = inverse_root_mean_square(inputs[0], row, k, epsilon)

        def step(i, total):
            # The last part may begin a step beyond the end: it reads the last one, times zero.
            wanted = first + i * _ROUTER_STEP
            start = jnp.minimum(wanted, k - _ROUTER_STEP)
            if factor is None:
                chunk = inputs[0][row, pl.ds(start, _ROUTER_STEP)].astype(jnp.float32)
            else:
                chunk = normed_chunk(inputs, row, start, factor)
            chunk = chunk * jnp.where(wanted == start, jnp.float32(1), jnp.float32(0))
            synchronize()  # the step before has been read
            staged[...] = chunk
            synchronize()

            def block(j, total):
                x = load(staged.at[pl.ds(j * rows, rows)], layout.reduce(1))
                x = lax.broadcast_in_dim(x, (rows, experts), (0,))
                w = load(kernel_ref.at[pl.ds(start + j * rows, rows)], layout)
                return total + x * w

            return lax.fori_loop(0, _ROUTER_STEP // rows, block, total)

        total = mg.layout_cast(jnp.zeros((rows, experts), jnp.float32), layout)
        total = lax.fori_loop(0, steps, step, total)
        store(out_ref.at[part, row, pl.ds(0, experts)], jnp.sum(total, axis=0))

    return launch(
        router_logits_kernel,
        (*operands, kernel),
        out_type=jax.ShapeDtypeStruct((parts, m, max(experts, THREADS)), jnp.float32),
        grid=(parts, m),
        grid_names=("part", "row"),
        scratch_types=(mg.SMEM((_ROUTER_STEP,), jnp.float32),),
    )


def normed_chunk(normed_refs: Any, row: Any, first: Any, factor: jax.Array) -> jax.Array:
    """float32 `[128]` of a row of `Normed`, rounded to the dtype of x, from column `first` on.

    `normed_refs` are those of x `[M, W]` and scale `[W]`; `factor` is `inverse_root_mean_square`.
    """
    x_ref, scale_ref = normed_refs
    columns = pl.ds(pl.multiple_of(first, THREADS), THREADS)
    x = x_ref[row, columns]
    y = x.astype(jnp.float32) * factor * scale_ref[columns].astype(jnp.float32)
    return y.astype(x.dtype).astype(jnp.float32)


def _router_layout(experts: int):
    """`[rows, experts]`, four columns a thread: 64 experts take half a warp, 256 two warps."""
    if experts == 64:
        return mg.Layout.TILED(mg.Tiling(((8, 64), (2, 64), (4,))), (-5,), (-3, -2), -1)
    if experts == 128:
        return mg.Layout.TILED(mg.Tiling(((4, 128), (4,))), (-3,), (-2,), -1)
    return mg.Layout.TILED(mg.Tiling(((2, 256), (128,), (4,))), (-4, -3), (-2,), -1)


def top_k_experts_reference(
    logits: Float[Array, "split t e"],
    correction_bias: Float[Array, " {experts}"] | None,
    *,
    experts: int,
    top_k: int,
    normalize: bool = True,
    norm_min: float = 0.0,
) -> tuple[Int[Array, "t {top_k}"], Float[Array, "t {top_k}"]]:
    """The meaning of `top_k_experts`."""
    probabilities = jax.nn.softmax(logits.sum(axis=0)[:, :experts], axis=-1)
    scores = probabilities
    if correction_bias is not None:
        scores = scores + correction_bias[None, :]
    index = lax.top_k(scores, top_k)[1]
    weights = jnp.take_along_axis(probabilities, index, axis=-1)
    if normalize:
        total = weights.sum(axis=-1, keepdims=True)
        weights = weights / jnp.maximum(total, norm_min)
    return index, weights


def top_k_experts(
    logits: jax.Array,
    correction_bias: jax.Array | None,
    *,
    experts: int,
    top_k: int,
    normalize: bool = True,
    norm_min: float = 0.0,
) -> tuple[Int[Array, "t {top_k}"], Float[Array, "t {top_k}"]]:
    """Which experts each token goes to, and their weights, the unbiased probabilities.

    Logits are float32 partial sums `[split, T, N]`, N a multiple of 128; columns from `experts` on
    are not read as experts. `correction_bias` is added to the probabilities that are compared;
    among equal ones the first expert is taken. `normalize` divides a token's weights by
    `max(their sum, norm_min)`. Shapes that do not fit are a ValueError.
    """
    width = logits.shape[-1]
    if logits.ndim != 3 or not all(logits.shape) or width % THREADS or width < experts:
        raise ValueError(
            f"top_k_experts: logits {logits.shape}: expected [split, T, N], and for N a multiple "
            f"of {THREADS} columns that holds {experts} experts."
        )
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k_experts: top_k={top_k}, expected 1 .. {experts}, the experts.")
    if correction_bias is not None and correction_bias.shape != (experts,):
        raise ValueError(
            f"top_k_experts: expected correction_bias [{experts}], found {correction_bias.shape}."
        )
    options: Any = {"experts": experts, "top_k": top_k}
    options |= {"normalize": normalize, "norm_min": norm_min}

    def run(logits, bias):
        bias = jnp.zeros((0,), jnp.float32) if bias is None else bias
        return _launch(logits, bias, **options)

    def gradient(cotangent, logits, bias):
        def weights(logits):  # of the experts that were chosen
            return top_k_experts_reference(logits, bias, **options)[1]

        return jax.vjp(weights, logits)[1](cotangent[1])[0], None

    return differentiable(batchable(run), gradient)(logits, correction_bias)


@functools.partial(jax.jit, static_argnames=("experts", "top_k", "normalize", "norm_min"))
def _launch(logits, correction_bias, *, experts, top_k, normalize, norm_min):
    split, tokens, width = logits.shape
    has_bias = correction_bias.size > 0
    operands = (logits, correction_bias) if has_bias else (logits,)
    layout = mg.Layout.WG_STRIDED((width,), vec_size=1)

    def top_k_experts_kernel(*refs):
        logits_ref, index_ref, weight_ref = refs[0], refs[-5], refs[-4]
        scores_smem, values_smem, ranks_smem = refs[-3:]
        token = lax.axis_index("token")
        lane = mg.broadcasted_iota(jnp.int32, (width,), 0, layout=layout)
        real = lane < experts
        values = load(logits_ref.at[0, token], layout)
        for s in range(1, split):
            values = values + load(logits_ref.at[s, token], layout)
        values = jnp.where(real, values, jnp.float32(_LOWEST))
        largest = jnp.full((width,), jnp.max(_ordered(values)), jnp.int32)
        largest = _unordered(mg.layout_cast(largest, layout))
        powers = jnp.where(real, jnp.exp(values - largest), jnp.float32(0))
        probabilities = powers / jnp.sum(powers)
        scores = probabilities
        if has_bias:
            # Through shared memory: it is as wide as there are experts, the scores are wider.
            for start in range(0, experts, _BIAS_STEP):
                if start + _BIAS_STEP <= experts:
                    step = pl.ds(start, _BIAS_STEP)
                    store(scores_smem.at[step], load(refs[1].at[step], spread(_BIAS_STEP)))
                else:
                    for i in range(start, experts):
                        scores_smem[i] = refs[1][i]
            synchronize()
            scores = scores + load(scores_smem, layout)
            synchronize()
        scores = jnp.where(real, scores, jnp.float32(_LOWEST))
        values_smem[...] = probabilities
        scores_smem[...] = scores
        synchronize()

        def count(i, ranks):  # how many experts come before each
            other = scores_smem[i]
            before = (other > scores) | ((other == scores) & (lane > i))
            return ranks + jnp.where(before, jnp.int32(1), jnp.int32(0))

        zeros = mg.layout_cast(jnp.zeros((width,), jnp.int32), layout)
        ranks_smem[...] = lax.fori_loop(0, experts, count, zeros)
        synchronize()

        def pick(i, carry):  # the thread of rank r takes the expert of that rank
            index, weight = carry
            mine = lane == ranks_smem[i]
            return jnp.where(mine, i, index), jnp.where(mine, values_smem[i], weight)

        nothing = mg.layout_cast(jnp.zeros((width,), jnp.float32), layout)
        index, weight = lax.fori_loop(0, experts, pick, (zeros, nothing))
        weight = jnp.where(lane < top_k, weight, jnp.float32(0))
        if normalize:
            total = jnp.sum(weight)
            smallest = jnp.float32(norm_min)
            weight = weight / jnp.where(total > smallest, total, smallest)
        synchronize()  # all threads have read before this is overwritten
        values_smem[...] = weight
        ranks_smem[...] = index
        synchronize()
        for r in range(top_k):
            index_ref[token, r] = ranks_smem[r]
            weight_ref[token, r] = values_smem[r]

    return launch(
        top_k_experts_kernel,
        operands,
        out_type=tuple(
            jax.ShapeDtypeStruct((tokens, top_k), dtype) for dtype in (jnp.int32, jnp.float32)
        ),
        grid=(tokens,),
        grid_names=("token",),
        scratch_types=tuple(
            mg.SMEM((width,), dtype) for dtype in (jnp.float32, jnp.float32, jnp.int32)
        ),
    )


def _ordered(x: jax.Array) -> jax.Array:
    """float32 -> int32 in the same order: T4 has no maximum of floats that passes NaN on."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _unordered(bits: jax.Array) -> jax.Array:
    """Undoes `_ordered`; of arrays only, Mosaic has no bitcast of scalars."""
    flipped = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
    return lax.bitcast_convert_type(flipped, jnp.float32)
