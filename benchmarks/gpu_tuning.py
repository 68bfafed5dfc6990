"""The measurements of the tuner: ways to cut a kernel, and XLA, for classes of shapes.

A case is one kernel, format, number of rows and class of sizes; its shapes are measured one after
the other, every candidate beside the others. `benchmarks.tune` makes rows of a tuning table of it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import fdq
from benchmarks.gpu_caches import random_caches
from benchmarks.gpu_cases import AttentionCase, ExpertCase, MatrixCase
from benchmarks.gpu_child import Emit, Settings, run_cases, section_main
from benchmarks.gpu_products import (
    attempt,
    expert_indices,
    later,
    prepare,
    random_weights,
    reference_product,
    timed,
)
from benchmarks.gpu_timing import Work, difference, links_for
from benchmarks.gpu_weights import nbytes, random_array, weight_spec
from fdq.cache import LayerCache, parse_format
from fdq.ops.kernels import kernel_arrays

XLA, OWN = "xla", "{}"
"""Entries: XLA's program, and the kernel's own choice (no settings)."""

# Sizes of a class, and the number of weights up to which it reaches; None: no end.
MATRIX_CLASSES: tuple[tuple[tuple[tuple[int, int], ...], int | None], ...] = (
    (((2560, 2560), (2560, 3584)), 1 << 23),
    (((4096, 6144), (12288, 2560)), 1 << 25),
    (((14336, 4096), (4096, 28672)), None),
)
ATTENTION_CLASSES = (
    (((1, 1024),), 1 << 21),
    (((1, 8192),), 1 << 24),
    (((1, 65536), (8, 8192)), None),
)
ROWS = (1, 2, 4, 8)
"""Classes of rows of x: each reaches up to its number, from the one before."""
FORMATS = ("W4", "W8", "W2", "WNF4", "Wfp8", "WMXFP4", "WNVFP4", "WCC2", "W3")
CACHES = ("C16", "C8", "C4", "Cfp8")


@dataclasses.dataclass(frozen=True)
class TuneCase:
    """One class to tune.

    Attributes:
      kernel: a name in `pallas_kernels.tuning.choices.KERNELS`.
      format: a weight's or a cache's, as in a scheme's name.
      rows: M; of attention, sequences.
      shapes: ``(K, N)`` each; of attention ``(batch, slots)``.
      min_weights, max_weights: sizes of the class; None where it has no end.
    """

    kernel: str
    format: str
    rows: int
    shapes: tuple[tuple[int, int], ...]
    min_weights: int | None
    max_weights: int | None

    @property
    def key(self) -> str:
        """Unique."""
        sizes = ", ".join(f"{a} x {b}" for a, b in self.shapes)
        return f"{self.kernel} {self.format} M = {self.rows}: {sizes}"

    def format_name(self, dtype: str) -> str:
        """As the tuning table calls it; a cache in 16 bits goes by its ``dtype``."""
        if self.kernel != "decode_attention":
            return weight_spec(self.format).format
        spec = parse_format(self.format)
        return dtype if spec is None else spec.format


Shapes = tuple[tuple[int, int], ...]


def classes(
    bounds: tuple[tuple[Shapes, int | None], ...],
) -> list[tuple[Shapes, int | None, int | None]]:
    """Shapes, and the least and the most weights of each class: it begins where another ends."""
    found, least = [], None
    for shapes, most in bounds:
        found.append((shapes, least, most))
        least = None if most is None else most + 1
    return found


def tune_cases() -> list[TuneCase]:
    """What is tuned, by importance."""

    def matrices(formats: tuple[str, ...], rows: tuple[int, ...]) -> Iterator[TuneCase]:
        for m in rows:
            for format in formats:
                for shapes, *bounds in reversed(classes(MATRIX_CLASSES)):
                    yield TuneCase("matrix_vector", format, m, shapes, *bounds)

    cases = list(matrices(FORMATS[:2], (ROWS[0], ROWS[-1])))
    for format in CACHES:
        for shapes, *bounds in classes(ATTENTION_CLASSES):
            cases.append(TuneCase("decode_attention", format, shapes[0][0], shapes, *bounds))
    experts = ((2560, 3072),)
    cases += [TuneCase("gathered_matrix_vector", f, 6, experts, None, None) for f in FORMATS[:2]]
    cases += matrices(FORMATS[:2], ROWS[1:-1])
    cases += matrices(FORMATS[2:], (ROWS[0], ROWS[-1]))
    return cases


def run(settings: Settings, emit: Emit) -> None:
    """Measures all cases; reports ``{"case", "kernel", "format", ..., "shapes": [entries]}``."""
    cases = tune_cases()
    if settings.smoke:
        kept = {case.kernel: case for case in reversed(cases)}
        cases = [_small(case) for case in kept.values()]
    only = settings.more.get("only")
    settings = dataclasses.replace(settings, case_seconds=300.0)
    run_cases([c for c in cases if not only or c.kernel in only], settings, emit, measure)


def _small(case: TuneCase) -> TuneCase:
    shape = (1, 64) if case.kernel == "decode_attention" else (256, 256)
    rows = 2 if case.kernel == "gathered_matrix_vector" else 1
    return dataclasses.replace(case, rows=rows, shapes=(shape,))


def measure(case: TuneCase, settings: Settings) -> dict[str, Any]:
    """Times of every candidate, for each shape of the class."""
    one = {
        "matrix_vector": _matrix,
        "gathered_matrix_vector": _experts,
        "decode_attention": _attention,
    }[case.kernel]
    return {
        "kernel": case.kernel,
        "format": case.format_name(settings.dtype),
        "rows": case.rows,
        "min_weights": case.min_weights,
        "max_weights": case.max_weights,
        "shapes": [
            {"shape": shape, "entries": one(case, shape, settings)} for shape in case.shapes
        ],
    }


def name_of(settings: dict[str, Any]) -> str:
    """A candidate as JSON text, the name of its entry."""
    import json

    return json.dumps(settings, sort_keys=True)


def matrix_candidates(own: Any, smoke: bool = False) -> list[dict[str, Any]]:
    """Single changes of the kernel's own choice; those that hold for any shape of a class.

    Columns of a block are only narrowed to 128, which divides every padded N.

    Args:
      own: the `MatrixVectorConfig` that the kernel chooses.
      smoke: two candidates.
    """
    found: list[dict[str, Any]] = [{}]
    found += [{"step_rows": rows} for rows in (8, 16, 32, 64) if rows != own.step_rows]
    found.append({"prefetch": not own.prefetch})
    found += [{"split": s} for s in (own.split // 2, own.split * 2) if s >= 1]
    if own.block_columns != 128:
        found.append({"block_columns": 128})
    return found[:2] if smoke else found


def _matrix(case: TuneCase, shape: tuple[int, int], settings: Settings) -> dict[str, Any]:
    from pallas_kernels.matmul import matrix_vector as kernels

    k, n = shape
    dtype = jnp.dtype(settings.dtype)
    product = MatrixCase(format=case.format, model="tuning", layer="-", m=case.rows, k=k, n=n)
    size = nbytes(jax.eval_shape(lambda: random_weights(product, 1)[0]))
    weights = random_weights(product, links_for(size, settings.l2_bytes, smoke=settings.smoke))
    prepared = attempt(lambda: [prepare(q) for q in weights])
    x = random_array(jax.random.key(1), (case.rows, k), dtype)
    works: dict[str, Work | str] = {
        XLA: Work(functools.partial(fdq.matmul, implementation="xla"), x, weights)
    }
    if isinstance(prepared, Exception):
        works[OWN] = later(prepared, lambda w: Work(jnp.add, x, w))
    else:
        own = kernels.choose_config(prepared[0].data.layout, case.rows, kernels.multiprocessors())
        codes = [q.data for q in prepared]
        for candidate in matrix_candidates(own, settings.smoke):
            config = dataclasses.replace(own, **candidate)
            works[name_of(candidate)] = Work(_summed(kernels.matrix_vector, config), x, codes)
    expected = jax.jit(reference_product)(x, weights[0])
    checks = dict.fromkeys(works, lambda y: difference(y, expected))
    return timed(works, checks, {}, settings)


def _summed(kernel: Callable[..., jax.Array], config: Any) -> Callable[..., jax.Array]:
    """The kernel with its partial sums added up and rounded, as XLA's product is."""

    def step(x: jax.Array, w: Any) -> jax.Array:
        return kernel(x, w, config=config).sum(axis=0).astype(x.dtype)

    return step


def _experts(case: TuneCase, shape: tuple[int, int], settings: Settings) -> dict[str, Any]:
    from pallas_kernels.matmul.gathered import gathered_config, gathered_matrix_vector

    k, n = shape
    experts = 4 if settings.smoke else 64
    layer = ExpertCase(
        format=case.format,
        model="tuning",
        layer="-",
        tokens=1,
        experts=experts,
        top_k=case.rows,
        k=k,
        n=n,
    )
    stack = random_weights(layer, 1, lead=(experts,))[0]
    prepared = attempt(lambda: prepare(stack))
    indices = [jnp.asarray(i) for i in expert_indices(layer, 1 if settings.smoke else 10)]
    x = random_array(jax.random.key(1), (case.rows, k), jnp.dtype(settings.dtype))

    def by_xla(x: Any, index: jax.Array) -> jax.Array:
        return fdq.grouped_matmul(x[0], x[1], index, implementation="xla")

    def by_kernel(config: Any) -> Callable[..., jax.Array]:
        def step(x: Any, index: jax.Array) -> jax.Array:
            sums = gathered_matrix_vector(x[0], x[1], index, config=config)
            return sums.sum(axis=0).astype(x[0].dtype)

        return step

    works: dict[str, Work | str] = {XLA: Work(by_xla, (x, stack), indices)}
    if isinstance(prepared, Exception):
        works[OWN] = later(prepared, lambda w: Work(jnp.add, x, w))
    else:
        weight = prepared.data
        own = gathered_config(weight.layout, case.rows)
        for candidate in matrix_candidates(own, settings.smoke):
            config = dataclasses.replace(own, **candidate)
            works[name_of(candidate)] = Work(by_kernel(config), (x, weight), indices)
    expected = by_xla((x.astype(jnp.float32), stack), indices[0])
    checks = dict.fromkeys(works, lambda y: difference(y, expected))
    return timed(works, checks, {}, settings)


def _attention(case: TuneCase, shape: tuple[int, int], settings: Settings) -> dict[str, Any]:
    from pallas_kernels.attention.decode_attention import decode_attention

    batch, slots = shape
    heads = (4, 2) if settings.smoke else (32, 8)
    sizes = AttentionCase(
        format=case.format,
        model="tuning",
        batch=batch,
        slots=slots,
        heads=heads[0],
        kv_heads=heads[1],
        head_dim=128,
    )
    dtype = jnp.dtype(settings.dtype)
    caches = random_caches(sizes, dtype, settings.l2_bytes, smoke=settings.smoke)
    q = random_array(jax.random.key(1), (batch, heads[0], 128), dtype)
    x = (q, jnp.full((batch,), slots, jnp.int32))

    def by_xla(x: Any, cache: LayerCache) -> jax.Array:
        q, lengths = x
        return fdq.attention(q[:, None], *cache, lengths=lengths, implementation="xla")[:, 0]

    def by_kernel(x: Any, cache: LayerCache, parts: int | None = None) -> jax.Array:
        q, lengths = x
        return decode_attention(q, *map(kernel_arrays, cache), lengths=lengths, parts=parts)

    works: dict[str, Work | str] = {XLA: Work(by_xla, x, caches), OWN: Work(by_kernel, x, caches)}
    for parts in (2,) if settings.smoke else (4, 8, 16, 32, 64):
        if slots >= 128 * parts or settings.smoke:
            step = functools.partial(by_kernel, parts=parts)
            works[name_of({"parts": parts})] = Work(step, x, caches)
    expected = by_xla((q.astype(jnp.float32), x[1]), caches[0])
    checks = dict.fromkeys(works, lambda y: difference(y, expected))
    return timed(works, checks, {}, settings)


if __name__ == "__main__":
    section_main(run)
