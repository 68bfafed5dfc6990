"""Products of float8 rows with float8 weights in 128 x 128 blocks, on Hopper's `wgmma`.

    y[m, n] = sum_g x_scale[m, g] * w_scale[g, n // 128] * sum_{k in g} x[m, k] * w[k, n]

A group g is 128 rows of K. Hopper's tensor cores sum float8 products to about 14 bits, so a sum
lives for one group: then it is scaled and added to another in float32, in registers.

A program has 128 rows and 128 columns of the result, and three warp groups. Over the groups of K:

    loads      | x, w, scales of g + 4   | x, w, scales of g + 5  | ...   (TMA, four on their way)
    rows 0-63  | wgmma of g, scale, add  | wgmma of g + 1, ...
    rows 64-   |        wgmma of g, scale, add  | ...

The two that multiply are not kept in step: while one scales, the tensor cores are the other's. A
step is 4 `QGMMA` and 64 `FFMA` among 122 instructions of a thread (machine code, sm_90a).

`wgmma` wants bytes of K side by side, while words hold four and then the next column: XLA turns the
words first, into memory that is free again after the product. No second copy of a weight stays.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mg

from pallas_kernels.device import default_device
from pallas_kernels.mosaic.launch import GROUP, keep_rows_in_order, launch, load, runs_interpreted
from pallas_kernels.transformations import batchable
from pallas_kernels.typing import Array, Float
from pallas_kernels.weights.decoded_weight import decoded_weight
from pallas_kernels.weights.kernel_weight import KernelWeight
from pallas_kernels.weights.layout import WeightLayout
from pallas_kernels.weights.word_format import turned_bytes

BLOCK = 128
"""Rows of K and columns that share a scale of the weight, channels that share one of x."""

_GROUPS = 2  # warp groups that multiply
_OWN_ROWS = 64  # of each: those of `wgmma`
_ROWS = _GROUPS * _OWN_ROWS
_STEPS = 4  # groups of K in shared memory, 32 KiB each
_LOADING_REGISTERS = 40  # of the warp group that loads, the others have what it leaves
_SWIZZLE = 128  # bytes


def unsupported(layout: WeightLayout) -> str | None:
    """Why this kernel does not multiply such a weight on the device of the trace."""
    capability = str(getattr(default_device(), "compute_capability", "9.0"))
    if capability.partition(".")[0] != "9":
        return f"only sm_90 has wgmma, found {capability}"
    if layout.format != "float8_e4m3" or layout.block_size != (BLOCK, BLOCK):
        return f"it is for float8_e4m3 in blocks of {BLOCK} x {BLOCK}"
    return None


def float8_blocks_reference(
    x: Float[Array, "m k"], scale: Float[Array, "m groups"], w: KernelWeight
) -> Float[Array, "m n"]:
    """The meaning of `float8_blocks`, in float32."""
    values = x.astype(jnp.float32) * jnp.repeat(scale, BLOCK, axis=1)[:, : x.shape[1]]
    return jnp.matmul(values, decoded_weight(w), precision=lax.Precision.HIGHEST)


def float8_blocks(
    x: Float[Array, "m k"], scale: Float[Array, "m groups"], w: KernelWeight, dtype: Any
) -> Float[Array, "m n"]:
    """`(x * scale) @ w`, `[M, N]` of `dtype`: bfloat16, float16 or float32.

    Args:
      x: float8_e4m3fn `[M, K]`.
      scale: float32 `[M, ceil(K / 128)]`, of each row's groups of 128 channels.
      w: `[K, N]`, of what is not `unsupported`.
      dtype: what sums are rounded to at the end.

    Raises:
      ValueError: what does not fit.
    """
    dtype = jnp.dtype(dtype)
    wanted = (x.shape[0], w.layout.groups)
    if w.words.ndim != 2 or x.shape[1:] != (w.layout.k,) or scale.shape != wanted:
        raise ValueError(
            f"float8_blocks: x {x.shape} with scales {scale.shape} and a weight {w.shape}; expected"
            f" [M, K], [M, ceil(K / {BLOCK})] and [K, N]."
        )
    if x.dtype != jnp.float8_e4m3fn or dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(
            f"float8_blocks: x of {x.dtype} and a result of {dtype}; expected float8_e4m3fn and "
            "16-bit floats or float32."
        )
    if reason := unsupported(w.layout):
        raise ValueError(f"float8_blocks: {reason}.")
    kernel = functools.partial(_float8_blocks, dtype=dtype.name)

    def fold(axis_size, batched, x, scale, w):
        if any(jax.tree.leaves(batched[2])) or not (batched[0] and batched[1]):
            return None
        rows = (a.reshape(-1, a.shape[-1]) for a in (x, scale))
        return kernel(*rows, w).reshape(axis_size, x.shape[1], -1)

    return batchable(kernel, fold)(x, scale, w)


@functools.partial(jax.jit, static_argnames="dtype")
def _float8_blocks(x: jax.Array, scale: jax.Array, w: KernelWeight, *, dtype: str) -> jax.Array:
    layout, m = w.layout, x.shape[0]
    rows, columns, k = -(-m // _ROWS) * _ROWS, layout.padded_n, layout.groups * BLOCK
    x = jnp.pad(x, ((0, rows - m), (0, k - x.shape[1])))
    scale = jnp.pad(scale, ((0, rows - m), (0, 0)))
    # Turned when its rows are there: of many layers each in the memory of the one before.
    x, words = lax.optimization_barrier((x, w.words))
    codes = turned_bytes(words, jnp.float8_e4m3fn)

    def body(*refs):
        _program(layout.groups, *refs)

    body.__name__ = f"float8_blocks_to_{dtype}"
    out = launch(
        body,
        (x, scale.T, codes, w.scale[:, ::BLOCK].T),
        out_type=jax.ShapeDtypeStruct((rows, columns), jnp.dtype(dtype)),
        # Rows vary fastest: programs that run at a time share columns of the weight.
        grid=(rows // _ROWS, columns // BLOCK),
        grid_names=("rows", "columns"),
        groups=_GROUPS + 1,
    )
    return out[:m, : layout.n]


def _program(
    groups: int,
    # inputs
    x_ref,  # float8 [M', K']
    x_scale_ref,  # float32 [groups, M']
    w_ref,  # float8 [N', K']
    w_scale_ref,  # float32 [N' / 128, groups]
    # output
    out_ref,  # [M', N']
) -> None:
    """A block of the result."""
    block, group = lax.axis_index("columns"), lax.axis_index(GROUP)
    rows = pl.ds(pl.multiple_of(lax.axis_index("rows") * _ROWS, _ROWS), _ROWS)
    columns = pl.ds(pl.multiple_of(block * BLOCK, BLOCK), BLOCK)
    own = pl.ds(pl.multiple_of(group * _OWN_ROWS, _OWN_ROWS), _OWN_ROWS)
    shape = (_OWN_ROWS, BLOCK)
    written: list[Any] = []

    def step(indices, x, w, x_scale, total):
        """One group of K. `total` is what the groups before came to."""
        of_block = w_scale_ref[block, indices[0]]
        if not runs_interpreted():
            keep_rows_in_order([x_scale])

        def multiply(sums):
            mg.wgmma(sums, x.at[own], w.T)
            factor = load(x_scale.at[0, own], mg.Layout.WGMMA.reduce(1)) * of_block
            mg.wgmma_wait(0)
            return sums[...], factor

        accumulator = mg.ACC(shape, jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
        sums, factor = pl.run_scoped(multiply, accumulator)
        factor = mg.layout_cast(lax.broadcast_in_dim(factor, shape, (0,)), mg.Layout.WGMMA)
        return total + sums * factor

    def multiplying(over_groups):
        """What the warp groups that do not load run: the steps, and the way out."""
        zeros = mg.layout_cast(jnp.zeros(shape, jnp.float32), mg.Layout.WGMMA)
        total = over_groups(zeros)
        (out,) = written
        out[group] = total.astype(out.dtype)
        mg.commit_smem()
        mg.copy_smem_to_gmem(out.at[group], out_ref.at[rows, columns].at[own])
        mg.wait_smem_to_gmem(0)

    codes = mg.BlockSpec(
        (BLOCK, BLOCK),
        lambda g: (0, g),
        transforms=_tiled(jnp.float8_e4m3fn),
        memory_space=mg.SMEM,
    )
    pipeline = mg.emit_pipeline_warp_specialized(
        step,
        grid=(groups,),
        in_specs=[
            codes,
            codes,
            mg.BlockSpec((1, _ROWS), lambda g: (g, 0), memory_space=mg.SMEM),
        ],
        wg_axis=GROUP,
        num_compute_wgs=_GROUPS,
        memory_registers=_LOADING_REGISTERS,
        max_concurrent_steps=_STEPS,
        compute_context=multiplying,
    )

    def run(buffers, out):
        written.append(out)
        pipeline(x_ref.at[rows], w_ref.at[columns], x_scale_ref.at[:, rows], allocations=buffers)

    pl.run_scoped(
        run,
        buffers=pipeline.get_allocations(x_ref, w_ref, x_scale_ref),
        out=mg.SMEM((_GROUPS, *shape), out_ref.dtype, transforms=_tiled(out_ref.dtype)),
        collective_axes=GROUP,
    )


def _tiled(dtype: Any) -> tuple[Any, ...]:
    """How `wgmma`, and stores of its sums, want matrices in shared memory."""
    kinds: Any = mg.TilingTransform, mg.SwizzleTransform
    return kinds[0]((8, _SWIZZLE // jnp.dtype(dtype).itemsize)), kinds[1](_SWIZZLE)
