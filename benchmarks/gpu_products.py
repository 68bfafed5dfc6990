"""Products with quantized weights, dense layers and experts, beside XLA's and cuBLAS's.

The kernel alone is cut as the tuning table says, like those that fdq runs.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fdq
from benchmarks import gpu_cases
from benchmarks.gpu_cases import KERNEL, ExpertCase, MatrixCase
from benchmarks.gpu_child import Emit, Settings, run_cases, section_main
from benchmarks.gpu_timing import (
    Noisy,
    Timing,
    Work,
    difference,
    l2_ratio,
    links_for,
    reason,
    time_all,
)
from benchmarks.gpu_weights import nbytes, random_array, random_weight, weight_spec
from fdq import ops
from fdq.formats.qtensor import QTensor, dequantize
from fdq.ops.matmul import mosaic_mma
from fdq.ops.prepared_weight import WordsWeight
from fdq.ops.rows import Gated, Normed, Sums
from pallas_kernels.device import MOST_ROWS, default_device
from pallas_kernels.tuning import choices

DOT, CUBLAS = "jnp.dot 16-bit", "cuBLAS 16-bit"
"""Entries of the dense product: as XLA likes it, which may be a kernel of Triton, and by cuBLAS."""

# Largest difference over the largest value: of float32 sums, and of what is rounded to 16 bits.
_TOLERANCE, _ROUNDED = 2e-5, 2e-2

_DENSE: dict[tuple[int, int, int], dict[str, dict[str, Any]]] = {}


def run(settings: Settings, emit: Emit) -> None:
    """Measures all matrix cases, or all expert cases (``more["experts"]``).

    With ``more["proof"]`` those of `gpu_cases.proof_matrices`, by the kernel alone.
    """
    if settings.more.get("experts"):
        cases: list[Any] = gpu_cases.expert_cases()
        if settings.smoke:
            cases = [small_experts(cases[0])]
        run_cases(cases, settings, emit, measure_experts)
        return
    proof = settings.more.get("proof")
    cases = gpu_cases.proof_matrices() if proof else gpu_cases.matrix_cases()
    if settings.smoke:
        cases = [cut(next(case for case in cases if case.scheme == "W4A16"))]
    run_cases(cases, settings, emit, measure_matrix)


def cut(case: MatrixCase) -> MatrixCase:
    """The case with 128 rows and 64 columns."""
    return dataclasses.replace(case, k=128, n=64)


def small_experts(case: ExpertCase) -> ExpertCase:
    """The case with 4 small experts."""
    return dataclasses.replace(case, experts=4, top_k=2, k=128, n=64)


def prepare(q: QTensor) -> WordsWeight:
    """The weight in the kernels' layout, as `fdq.prepare` lays it out on a GPU."""
    return WordsWeight.of(q)


def tuned(kernel: str, format: str, *, rows: int, weights: int) -> dict[str, Any]:
    """Settings of a kernel from the tuning table of this device, as fdq runs it."""
    kind = default_device().device_kind
    return dict(choices.choose(kind, kernel, format, rows=rows, weights=weights).config)


def matrix_kernel(
    activation: str | None, settings: dict[str, Any] | None = None
) -> Callable[..., jax.Array]:
    """Rows (codes where activations are quantized) and a kernel weight -> partial sums.

    Args:
      activation: what rows are quantized to.
      settings: of the `MatrixVectorConfig`, on top of the kernel's own choice; for more rows than
        that kernel takes the tensor cores' is cut as the tuning table says.
    """

    def step(x: jax.Array, w: Any) -> jax.Array:
        from pallas_kernels.matmul import integer as integer_matmul
        from pallas_kernels.matmul import matrix_vector as matmul

        if x.shape[0] > MOST_ROWS:
            return mosaic_mma.partial_sums(x, w)
        own = matmul.choose_config(w.layout, x.shape[0], matmul.multiprocessors())
        config = dataclasses.replace(own, **(settings or {}))
        kernel = matmul.matrix_vector
        if activation is not None:
            kernel = integer_matmul.integer_matrix_vector
        return kernel(x, w, config=config)

    return step


def random_weights(case: Any, count: int, lead: tuple[int, ...] = ()) -> list[QTensor]:
    """``count`` different weights of a case; the same in every run."""
    keys = jax.random.split(jax.random.key(zlib.crc32(case.key.encode())), count)
    spec = weight_spec(case.format)
    return [random_weight(key, (*lead, case.k, case.n), spec) for key in keys]


def measure_matrix(case: MatrixCase, settings: Settings) -> dict[str, Any]:
    """Times one product, by everything that can compute it, and compares the results."""
    dtype = jnp.dtype(settings.dtype)
    spec = weight_spec(case.format)
    shapes = jax.eval_shape(lambda k: random_weight(k, (case.k, case.n), spec), jax.random.key(0))
    size = nbytes(shapes)
    links = links_for(size, settings.l2_bytes, smoke=settings.smoke)
    weights = random_weights(case, links)
    x = random_array(jax.random.key(1), (case.m, case.k), dtype)
    activation = case.activation

    def matmul(implementation: str) -> Callable[..., jax.Array]:
        return functools.partial(fdq.matmul, activation=activation, implementation=implementation)

    works: dict[str, Work | str] = {}
    prepared = attempt(lambda: [prepare(q) for q in weights])
    rows = x if activation is None else quantized_rows(x)[0]
    name = "matrix_vector" if activation is None else "integer_matrix_vector"
    config = tuned(name, spec.format, rows=case.m, weights=case.k * case.n)
    kernel = matrix_kernel(activation, config)
    works[KERNEL] = later(prepared, lambda w: Work(kernel, rows, [q.data for q in w]))
    proof = settings.more.get("proof", False)
    if not proof and (case.urgent or settings.smoke or case.m == 1):
        works["fdq"] = later(prepared, lambda w: Work(matmul("mosaic_gpu"), x, w))
        works["xla"] = Work(matmul("xla"), x, weights)

    first = weights[0]
    if proof and activation is None:
        # What its layer hands the product: rows that it finishes itself.
        made = finished_rows(case, dtype)
        wanted = jax.jit(lambda rows, q: reference_product(rows.value(), q))(made, first)
        works["fdq"] = later(prepared, lambda w: Work(matmul("mosaic_gpu"), made, w))
    else:
        wanted = None
    if activation is None:
        expected = jax.jit(reference_product)(x, first)
        partial_sums = expected
    else:
        expected = matmul("xla")(x, first, out_dtype=jnp.float32)
        _, _, rounded = quantized_rows(x)
        partial_sums = jax.jit(reference_product)(rounded, first)
    checks = {
        KERNEL: lambda y: difference(y.sum(axis=0), partial_sums),
        "fdq": lambda y: difference(y, expected if wanted is None else wanted),
        "xla": lambda y: difference(y, expected),
    }
    entries = timed(works, checks, {KERNEL: _TOLERANCE}, settings)
    if wanted is not None:
        entries[type(made).__name__.lower()] = entries.pop("fdq")
    entries[KERNEL]["config"] = config
    labels = {name: getattr(case, name) for name in ("model", "layer", "m", "k", "n", "urgent")}
    return {
        "section": "matmul",
        "scheme": case.scheme,
        **labels,
        "bytes": size,
        "l2_ratio": l2_ratio(links * size, settings.l2_bytes),
        "entries": entries if proof else entries | dense(case, settings),
    }


def finished_rows(case: MatrixCase, dtype: Any) -> Normed | Gated:
    """Rows as a decoder's layer gives them to this product: gated before `down`, else normed."""
    keys = jax.random.split(jax.random.key(6))
    if case.layer.endswith("down"):
        return Gated(Sums.of(random_array(keys[0], (case.m, 2 * case.k), dtype)))
    x, scale = (
        random_array(key, shape, dtype)
        for key, shape in zip(keys, ((case.m, case.k), (case.k,)), strict=True)
    )
    return Normed(x, scale, 1e-5)


def quantized_rows(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """int8 codes, their scales and the codes as float32 numbers."""
    spec = ops.parse_activation("int8")
    assert spec is not None
    codes, scale = ops.quantize_activation(x, spec)
    return codes, scale, codes.astype(jnp.float32)


def reference_product(x: jax.Array, q: QTensor) -> jax.Array:
    """float32 ``x @ dequantize(q)``."""
    return jnp.dot(x.astype(jnp.float32), dequantize(q), precision=jax.lax.Precision.HIGHEST)


def attempt(make: Callable[[], Any]) -> Any:
    """What ``make`` returns, or the error that it raises."""
    try:
        return jax.block_until_ready(make())
    except Exception as error:
        return error


def later(operands: Any, work: Callable[[Any], Work]) -> Work | str:
    """``work(operands)``, or why there are no operands."""
    return reason(operands) if isinstance(operands, Exception) else work(operands)


def timed(
    works: dict[str, Work | str],
    checks: dict[str, Callable[[Any], float]],
    tolerances: dict[str, float],
    settings: Settings,
) -> dict[str, dict[str, Any]]:
    """Entries of a report: seconds and difference of each work, or an error.

    A work whose result is wrong gets no time.

    Args:
      works: by name; a str says why there is none.
      checks: by name: what one step returns -> difference from the reference.
      tolerances: by name, where a rounded result is not what is compared.
      settings: of the section.
    """
    entries: dict[str, dict[str, Any]] = {}
    right: dict[str, Work] = {}
    for name, work in works.items():
        if isinstance(work, str):
            entries[name] = {"error": work}
            continue
        try:
            found = jax.jit(work.step)(work.x, work.operands[0])
            worst = checks[name](found)
        except Exception as error:
            entries[name] = {"error": reason(error)}
            continue
        entries[name] = {"difference": worst}
        if worst > tolerances.get(name, _ROUNDED):
            entries[name]["error"] = f"wrong: differs from the reference by {worst:.2g}"
        else:
            right[name] = work
    for name, timing in time_all(right, smoke=settings.smoke).items():
        entries[name] |= entry(timing)
    return entries


def entry(timing: Timing | str) -> dict[str, Any]:
    """A timing as JSON."""
    if isinstance(timing, Noisy):
        return {"error": str(timing), "noisy": True}
    if isinstance(timing, str):
        return {"error": timing}
    return {
        "seconds": timing.seconds,
        "spread": round(timing.spread, 4),
        "links": timing.links,
        "compile_seconds": round(timing.compile_seconds, 2),
    }


def dense(case: MatrixCase, settings: Settings) -> dict[str, dict[str, Any]]:
    """Entries of the product of the same sizes in 16 bits; measured once a size.

    XLA compiles ``jnp.dot`` to what it takes for the fastest, mostly a kernel of Triton; an entry
    of its own is cuBLAS, which exists on GPUs alone.
    """
    key = (case.m, case.k, case.n)
    if key not in _DENSE:
        dtype = jnp.dtype(settings.dtype)
        size = case.k * case.n * dtype.itemsize
        links = links_for(size, settings.l2_bytes, smoke=settings.smoke)
        keys = jax.random.split(jax.random.key(2), links)
        w = [random_array(k, (case.k, case.n), dtype, case.k**-0.5) for k in keys]
        x = random_array(jax.random.key(1), (case.m, case.k), dtype)
        works = {DOT: Work(jnp.dot, x, w)}
        if default_device().platform == "gpu":
            works[CUBLAS] = by_cublas(works[DOT])
        sizes = {"bytes": size, "l2_ratio": l2_ratio(links * size, settings.l2_bytes)}
        timings = time_all(works, smoke=settings.smoke)
        _DENSE[key] = {name: {**entry(timing), **sizes} for name, timing in timings.items()}
    return _DENSE[key]


def by_cublas(work: Work) -> Work:
    """A work with a product, compiled to a call of cuBLAS, or to nothing."""
    options = {"xla_gpu_enable_triton_gemm": False}
    return dataclasses.replace(work, compiler_options=options, calls="__cublas$")


def expert_indices(case: ExpertCase, links: int, seed: int = 3) -> list[np.ndarray]:
    """``[tokens * top_k]`` int32 a launch; experts of one token differ, and so do launches.

    With one token every launch reads other experts, until all have been read.
    """
    rng = np.random.default_rng(seed)
    found = []
    queue: list[int] = []
    for _ in range(links):
        rows = []
        for _ in range(case.tokens):
            if len(queue) < case.top_k:
                queue = rng.permutation(case.experts).tolist()
            rows += [queue.pop() for _ in range(case.top_k)]
        found.append(np.asarray(rows, np.int32))
    return found


def measure_experts(case: ExpertCase, settings: Settings) -> dict[str, Any]:
    """Times the products of picked experts; bytes are those of the experts that are hit."""
    dtype = jnp.dtype(settings.dtype)
    stack = random_weights(case, 1, lead=(case.experts,))[0]
    links = 1 if settings.smoke else max(3, min(16, case.experts // case.top_k))
    chosen = expert_indices(case, links)
    rows = case.tokens * case.top_k
    x = random_array(jax.random.key(1), (rows, case.k), dtype)
    operands = [jnp.asarray(index) for index in chosen]
    hit = float(np.mean([len(set(index.tolist())) for index in chosen]))
    read = len(set(np.concatenate(chosen).tolist()))
    one = stack.nbytes / case.experts
    changes = tuned("gathered_matrix_vector", stack.spec.format, rows=rows, weights=case.k * case.n)

    def kernel(x: tuple[jax.Array, Any], index: jax.Array) -> jax.Array:
        from pallas_kernels.matmul.gathered import gathered_config, gathered_matrix_vector

        own = gathered_config(x[1].layout, rows)
        config = dataclasses.replace(own, **changes)
        return gathered_matrix_vector(x[0], x[1], index, config=config)

    def seam(implementation: str) -> Callable[..., jax.Array]:
        def step(x: tuple[jax.Array, Any], index: jax.Array) -> jax.Array:
            return fdq.grouped_matmul(x[0], x[1], index, implementation=implementation)

        return step

    prepared = attempt(lambda: prepare(stack))
    works: dict[str, Work | str] = {
        KERNEL: later(prepared, lambda w: Work(kernel, (x, w.data), operands)),
        "fdq": later(prepared, lambda w: Work(seam("mosaic_gpu"), (x, w), operands)),
        "xla": Work(seam("xla"), (x, stack), operands),
    }
    expected = _expert_reference(x, stack, operands[0])
    checks = {
        KERNEL: lambda y: difference(y.sum(axis=0), expected),
        "fdq": lambda y: difference(y, expected),
        "xla": lambda y: difference(y, expected),
    }
    entries = timed(works, checks, {KERNEL: _TOLERANCE}, settings)
    entries[KERNEL]["config"] = changes
    return {
        "section": "experts",
        "scheme": f"{case.format}A16",
        "model": case.model,
        "layer": f"experts.{case.layer}",
        "m": case.tokens,
        "rows": rows,
        "experts": case.experts,
        "experts_hit": hit,
        "k": case.k,
        "n": case.n,
        "bytes": int(one * hit),
        "l2_ratio": l2_ratio(one * read, settings.l2_bytes),
        "entries": entries,
    }


@jax.jit
def _expert_reference(x: jax.Array, stack: QTensor, index: jax.Array) -> jax.Array:
    """float32 ``[T, N]``, an expert at a time."""

    def one(item: tuple[jax.Array, jax.Array]) -> jax.Array:
        row, expert = item
        q = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, expert, 0, False), stack)
        return reference_product(row[None], q)[0]

    return jax.lax.map(one, (x, index))


if __name__ == "__main__":
    section_main(run)
