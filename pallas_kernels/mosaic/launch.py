"""How every kernel is launched: on a GPU, or in Mosaic's interpreter where there is none."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as mg

from pallas_kernels.device import default_device

THREADS = 128
"""CUDA threads of a warp group, the unit that Mosaic's array programs run on."""

GROUP = "group"
"""The axis of warp groups of a program, where it has several."""


def runs_interpreted() -> bool:
    """True where kernels run in the interpreter: the default device is not a GPU.

    Kernels that use an instruction which the interpreter lacks ask this while they are traced and
    take the nearest path that it has.
    """
    return default_device().platform not in ("gpu", "cuda")


def synchronize() -> None:
    """Barrier of a warp group: what it wrote to shared memory before can be read after.

    Mosaic's own `commit_smem` adds a fence that GPUs before sm_90 do not have.
    """
    if runs_interpreted():
        mg.commit_smem()
    else:
        mg.inline_mgpu()(lambda context: mgpu.warpgroup_barrier())()


def keep_rows_in_order(refs: Sequence[Any]) -> None:
    """Asks for shared memory as it is written down, which Mosaic would else tile and swizzle.

    Its inference picks a swizzle wherever a row has 32 bytes or more, and then computes addresses
    in slices that begin in the middle of the pattern as if they began with it (jax 0.11.2 and
    0.12.0, seen on an H100: eight rows of x in units of four were read from wrong places).
    """
    for ref in refs:
        mg.inline_mgpu(arg_types=(mg.RefType(),))(lambda context, ref: None)(ref)


def load(ref: Any, layout: Any) -> jax.Array:
    """An array in a layout, however slow the load."""
    return mg.load(ref, layout=layout, optimized=False)


def store(ref: Any, value: jax.Array) -> None:
    """Stores an array, however slow the store."""
    if hasattr(mg, "store"):  # jax 0.12; before, a plain assignment asks for no optimization
        mg.store(ref, value, optimized=False)
    else:
        ref[...] = value


def launch(
    body: Callable[..., None],
    operands: Sequence[jax.Array],
    *,
    out_type: Any,
    grid: tuple[int, ...],
    grid_names: tuple[str, ...],
    scratch_types: Any = (),
    groups: int = 1,
) -> Any:
    """Runs `body(*input_refs, *output_refs, *scratch_refs)` once for each point of `grid`.

    The body is an array program: one program a warp group, whose arrays are spread over its 128
    threads (Mosaic's Warpgroup semantics, which is also what the interpreter runs).
    Its place is `lax.axis_index(name)`, for the names of the grid's axes, of which the first varies
    fastest on the GPU. Returns arrays of `out_type`: a `jax.ShapeDtypeStruct` or a tuple of them.
    With several `groups` as many warp groups run the body at each point and share its memory; which
    one it is says `lax.axis_index(GROUP)`.
    """
    scratch_types = tuple(scratch_types)
    several: Any = {"num_threads": groups, "thread_name": GROUP} if groups > 1 else {}

    @functools.wraps(body)
    def program(*refs):
        if scratch_types and not runs_interpreted():
            keep_rows_in_order(refs[-len(scratch_types) :])
        body(*refs)

    return mg.kernel(
        program,
        out_type=out_type,
        grid=grid,
        grid_names=grid_names,
        scratch_types=scratch_types,
        **several,
        interpret=mg.InterpretGPUParams() if runs_interpreted() else None,
        compiler_params=mg.CompilerParams(lowering_semantics=mg.LoweringSemantics.Warpgroup),
    )(*operands)
