"""The kernels that are compiled ahead of time, each with shapes that stand for its use.

A module with kernels has a function `kernel_cases() -> list[KernelCase]` and is listed in
`MODULES`; `all_cases` gathers them.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.aot.gpu_targets import ALL
from pallas_kernels.aot.sass import Loop
from pallas_kernels.device import default_device

MODULES: tuple[str, ...] = (
    "pallas_kernels.matmul.cases",
    "pallas_kernels.attention.cases",
    "pallas_kernels.append.cases",
    "pallas_kernels.router.cases",
)
"""Modules of this package that register cases."""


@dataclasses.dataclass(frozen=True)
class Program:
    """What to compile: `jax.jit(function, donate_argnums=donate)(*arguments)`."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]  # pytrees of `jax.ShapeDtypeStruct` (arrays do as well)
    donate: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelCase:
    """One kernel at one shape.

    `build` is called in the child process that compiles the program, while the default device is
    the GPU that it compiles for. `weights_per_iteration` are weights (of an attention kernel:
    elements of the cache) that one thread uses up in one iteration of the hot loop as ptxas left
    it. ptxas unrolls, so better than a number is a function of the loop that was found, such as a
    `functools.partial` of `fma_weights` (which can be pickled). None: there is nothing to count.

    With several `devices`, which one process has, `build` is called with the list of them, and
    arguments say in their shardings where they lie.
    """

    name: str  # unique: "matrix-vector int4 groups of 128, 1 x 4096 x 6144"
    kernel: str  # which its cases share: "matrix-vector int4 groups of 128"
    build: Callable[..., Program]
    gpus: tuple[str, ...] = ALL  # that the kernel promises to compile for
    representative: bool = False  # compiled by the test suite; one for each kernel and format
    weights_per_iteration: float | Callable[[Loop], float] | None = None
    bytes_per_weight: float | None = None  # stored, scales included; for the instruction budget
    instruction_limit: float | None = None  # more per weight are a failure of the check
    devices: int = 1  # GPUs that the program runs on
    xla_kernels: bool = True  # whether to report on the kernels that XLA adds to ours
    report: str = ""  # part of the name of the Mosaic kernel that is counted; "": the first


def fma_weights(rows: int, loop: Loop) -> float:
    """Counts weights by the loop's float32 multiply-adds: `rows` (M) of them for each weight.

    The multiply-adds that apply scales count as weights too, so that the result is a little too
    large where groups are small: one weight in `group size` for each row. A loop with special
    functions (SwiGLU's exponential) prepares x, and uses up none.
    """
    return 0.0 if "MUFU" in loop.opcodes else loop.float32_fmas / rows


def dot_weights(rows: int, loop: Loop) -> float:
    """Counts weights by the loop's four-byte dots (IDP.4A): `rows` (M) of them for four weights."""
    return 4 * loop.opcodes.get("IDP", 0) / rows


def mma_weights(rows: int, each: float, loop: Loop) -> float:
    """Counts weights by the loop's tensor-core products: `each` of a thread (8 of m16n8k16, 16 of
    m16n8k32) for each eight `rows` (M).
    """
    products = loop.opcodes.get("HMMA", 0) + loop.opcodes.get("IMMA", 0)
    return each * products / -(-rows // 8)


def loaded_weights(bytes_per_weight: float, loop: Loop) -> float:
    """Counts weights by the bytes that the loop loads in vectors, as scales are not."""
    return loop.vector_bytes / bytes_per_weight


def abstract(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An argument of a `Program`."""
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def activation_dtype() -> str:
    """bfloat16, or float16 where the GPU has no arithmetic for it (before sm_80)."""
    capability = getattr(default_device(), "compute_capability", "8.0")
    return "bfloat16" if float(capability) >= 8 else "float16"


def all_cases() -> list[KernelCase]:
    """Every registered case; ValueError if two have the same name."""
    modules = [importlib.import_module(name) for name in MODULES]
    cases: list[KernelCase] = [case for module in modules for case in module.kernel_cases()]
    names = [case.name for case in cases]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"kernel cases must have different names; these occur twice: {twice}")
    return cases
