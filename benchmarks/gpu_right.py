"""Whether kernels are right on this card: at production sizes against float64, and twice the same.

What runs is cut as the tuning table says, as fdq runs it. Of products a part of the columns is
compared, which NumPy computes in a second.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fdq
from benchmarks import gpu_cases
from benchmarks.gpu_attention import small as small_attention
from benchmarks.gpu_cases import AttentionCase, ExpertCase, MatrixCase
from benchmarks.gpu_child import Emit, Settings, run_cases, section_main
from benchmarks.gpu_products import (
    cut,
    expert_indices,
    finished_rows,
    matrix_kernel,
    prepare,
    quantized_rows,
    random_weights,
    small_experts,
    tuned,
)
from benchmarks.gpu_timing import difference
from benchmarks.gpu_weights import random_array, random_cache, weight_spec
from fdq.cache import LayerCache, parse_format
from fdq.formats.qtensor import dequantize
from fdq.models import CONFIGS
from fdq.ops.activation import activation_values, quantize_activation
from fdq.ops.kernels import kernel_arrays
from fdq.ops.matmul import mosaic_mma
from fdq.schemes.scheme import ActivationSpec
from pallas_kernels.matmul.float8_blocks import float8_blocks

_COLUMNS = 256
# Of the largest value: float32 sums; 16-bit rows whose rounding may fall on either side, and a
# softmax of 16-bit queries.
_SUMS, _ROUNDED = 1e-5, 5e-3
# Tensor cores cut their float32 sums off rather than round them.
_TENSOR_CORES = 3e-5
# Around the borders of blocks and of parts.
_LENGTHS = (129, 1024, 2049, 4095)

# Hopper cuts its sums of float8 to 14 bits.
_FLOAT8 = 2e-3

# Rows of a decoded product, and queries of a prompt; of float8 rows two programs' and a part.
_MANY, _FLOAT8_ROWS = 72, 300

_FORMATS = ("W4", "W8", "W2", "W3", "WNF4", "Wfp8", "WMXFP4", "WNVFP4", "WCC2", "W4-asym")
_BLOCKS = "Wfp8-b128"
_GROUPS = ActivationSpec(format="float8_e4m3", granularity="token_group", group_size=128)
_CACHES = ("C16", "C8", "C4", "Cfp8")

Made = tuple[Callable[[], Any], np.ndarray, float]
"""A kernel's result when it is called, the reference, and how far they may be apart."""


@dataclasses.dataclass(frozen=True)
class RightCase:
    """One kernel to compare.

    Attributes:
      rows: of a product: ``plain`` (partial sums), ``normed``, ``gated``, ``tensor cores`` (partial
        sums by the kernel that is theirs, for any number of rows), ``float8`` (in blocks, by
        float8), ``decoded`` (many rows); of others their kind.
      case: the shapes and the format.
    """

    rows: str
    case: Any

    @property
    def key(self) -> str:
        """Unique."""
        return f"right: {self.rows} {self.case.key}"


def right_cases() -> list[RightCase]:
    """Every kernel, what most models run first."""
    llama, ernie = gpu_cases.MODELS[0], gpu_cases.MODELS[2]

    def matrix(rows: str, format: str, layer: str, m: int, activation: str | None = None):
        k, n = gpu_cases.linear_layers(CONFIGS[llama])[layer]
        sizes = {"model": llama, "layer": layer, "m": m, "k": k, "n": n}
        return RightCase(rows, MatrixCase(format=format, activation=activation, **sizes))

    attention = [case for case in gpu_cases.attention_cases() if case.model == llama]
    caches = {case.format: case for case in reversed(attention)}
    # First what no card has run yet.
    cores, first = "tensor cores", _FORMATS[:2]
    able = [format for format in _FORMATS if gpu_cases.on_tensor_cores(format)]
    cases = [
        matrix(cores, format, "down", m) for m in (16, 64, 1) for format in able if format in first
    ]
    if able:
        cases += [matrix(cores, format, "down", m, "int8") for m in (16, 64) for format in first]
    if gpu_cases.multiplies_float8(_BLOCKS):
        cases += [matrix("float8", _BLOCKS, layer, _FLOAT8_ROWS) for layer in ("down", "qkv")]
    experts = [c for c in gpu_cases.expert_cases() if c.model == ernie and c.format == "W4"]
    if experts[0].format in able:
        cases += [RightCase("experts", dataclasses.replace(experts[0], tokens=16))]
    cases += [matrix("plain", format, "down", m) for m in (1, 8) for format in _FORMATS[:2]]
    cases += [RightCase("attention", caches[name]) for name in _CACHES]
    for format in _FORMATS[:2]:
        cases += [matrix("normed", format, "gate_up", m) for m in (1, 8)]
        cases += [matrix("gated", format, "down", m) for m in (1, 8)]
        cases += [matrix("plain", format, "down", m, "int8") for m in (1, 8)]
    cases += [RightCase("experts", case) for case in experts if case.tokens in (1, 4)]
    cases += [matrix(cores, format, "down", 16) for format in able if format not in first]
    cases += [matrix("decoded", format, "down", _MANY) for format in _FORMATS]
    cases += [
        RightCase("decoded experts", dataclasses.replace(case, tokens=16))
        for case in experts
        if case.tokens == 1
    ]
    cases += [RightCase("prompt", caches[name]) for name in _CACHES]
    return cases + [matrix("plain", format, "down", m) for format in _FORMATS[2:] for m in (1, 8)]


def run(settings: Settings, emit: Emit) -> None:
    """Compares all cases, or the first of each kind (``more["few"]``)."""
    cases = right_cases()
    if settings.more.get("few") or settings.smoke:
        # Of attention that over int8: an unquantized cache has less to go wrong.
        cases = [c for c in cases if c.rows != "attention" or c.case.format == "C8"]
        cases = list({case.rows: case for case in reversed(cases)}.values())
        cases.sort(key=lambda case: case.rows)
    if settings.smoke:
        cases = [dataclasses.replace(case, case=_small(case)) for case in cases]
    run_cases(cases, settings, emit, measure)


def _small(case: RightCase) -> Any:
    if case.rows.endswith("experts"):
        return small_experts(case.case)
    if case.rows in ("attention", "prompt"):
        return small_attention(case.case)
    small = cut(case.case)
    return dataclasses.replace(small, m=_MANY) if case.rows == "float8" else small


def measure(case: RightCase, settings: Settings) -> dict[str, Any]:
    """Difference from the reference, of the largest value.

    Raises:
      ValueError: it is too large, or a second run gives other bits.
    """
    others = {"attention": _attention, "prompt": _prompt}
    others |= dict.fromkeys(("experts", "decoded experts"), _experts)
    make = others.get(case.rows, _product)
    kernel, reference, tolerance = make(case, settings)
    first, second = (np.asarray(jax.device_get(kernel())) for _ in range(2))
    worst = difference(first, reference)
    if worst > tolerance:
        raise ValueError(f"wrong: differs from float64 by {worst:.2g}, {tolerance:.0e} is allowed")
    if first.tobytes() != second.tobytes():
        raise ValueError(f"two runs differ by {difference(first, second):.2g}")
    return {"section": "right", "rows": case.rows, "difference": worst}


def _columns(n: int) -> np.ndarray:
    return np.sort(np.random.default_rng(n).permutation(n)[:_COLUMNS])


def _floats(w: Any, columns: np.ndarray) -> np.ndarray:
    return np.asarray(dequantize(w)[:, columns], np.float64)


def _product(right: RightCase, settings: Settings) -> Made:
    case: MatrixCase = right.case
    dtype, columns = jnp.dtype(settings.dtype), _columns(case.n)
    (q,) = random_weights(case, 1)
    w = prepare(q)
    x = random_array(jax.random.key(1), (case.m, case.k), dtype)
    if right.rows == "tensor cores":
        x = x if case.activation is None else quantized_rows(x)[0]
        step = jax.jit(lambda x, w: mosaic_mma.partial_sums(x, w).sum(axis=0))
        wanted = np.asarray(x, np.float64) @ _floats(q, columns)
        return lambda: step(x, w.data)[:, columns], wanted, _TENSOR_CORES
    if right.rows == "float8":
        codes, scale = quantize_activation(x, _GROUPS)
        run = functools.partial(float8_blocks, dtype=jnp.float32)
        rows = np.asarray(
            activation_values(codes, scale, _GROUPS.group_size, jnp.float32), np.float64
        )
        step = jax.jit(lambda x, scale, w: run(x, scale, w)[:, columns])
        return lambda: step(codes, scale, w.data), rows @ _floats(q, columns), _FLOAT8
    if right.rows == "plain":
        rows = x if case.activation is None else quantized_rows(x)[0]
        name = "matrix_vector" if case.activation is None else "integer_matrix_vector"
        format = weight_spec(case.format).format
        config = tuned(name, format, rows=case.m, weights=case.k * case.n)
        step = jax.jit(matrix_kernel(case.activation, config))
        kernel = lambda: step(rows, w.data).sum(axis=0)[:, columns]  # noqa: E731
        return kernel, np.asarray(rows, np.float64) @ _floats(q, columns), _SUMS
    if right.rows == "decoded":
        many = jax.jit(functools.partial(fdq.matmul, implementation="decoded"))
        reference = np.asarray(x, np.float64) @ _floats(q, columns)
        return lambda: many(x, w)[:, columns].astype(jnp.float32), reference, 2 * _ROUNDED
    rows = finished_rows(case, dtype)
    product = functools.partial(fdq.matmul, implementation="mosaic_gpu", out_dtype=jnp.float32)
    step = jax.jit(product)
    reference = np.asarray(rows.value(), np.float64) @ _floats(q, columns)
    return lambda: step(rows, w)[:, columns], reference, _ROUNDED


def _experts(right: RightCase, settings: Settings) -> Made:
    case: ExpertCase = right.case
    columns = _columns(case.n)
    (stack,) = random_weights(case, 1, lead=(case.experts,))
    w = prepare(stack)
    index = expert_indices(case, 1)[0].reshape(case.tokens, case.top_k)
    x = random_array(jax.random.key(1), (case.tokens, case.k), jnp.dtype(settings.dtype))
    name = "decoded" if right.rows == "decoded experts" else "mosaic_gpu"
    grouped = functools.partial(fdq.grouped_matmul, implementation=name)
    step = jax.jit(lambda x, w, index: grouped(x, w, index))
    wide = np.asarray(x, np.float64)
    experts = {int(one): _floats(stack[int(one)], columns) for one in np.unique(index)}
    reference = np.stack(
        [[row @ experts[int(one)] for one in picks] for row, picks in zip(wide, index, strict=True)]
    )
    chosen = jnp.asarray(index)
    return lambda: step(x, w, chosen)[..., columns].astype(jnp.float32), reference, 2 * _ROUNDED


def _attention(right: RightCase, settings: Settings) -> Made:
    from pallas_kernels.attention.decode_attention import decode_attention

    case: AttentionCase = right.case
    longest = case.slots if settings.smoke else max(_LENGTHS) + 1
    lengths = np.asarray([37] if settings.smoke else _LENGTHS, np.int32)
    dtype, spec, batch = jnp.dtype(settings.dtype), parse_format(case.format), len(lengths)
    shape = (batch, case.kv_heads, longest, case.head_dim)
    cache = LayerCache(
        *(random_cache(key, shape, spec, dtype) for key in jax.random.split(jax.random.key(4)))
    )
    q = random_array(jax.random.key(1), (batch, case.heads, case.head_dim), dtype)
    name = dtype.name if spec is None else spec.format
    weights = batch * case.kv_heads * longest * case.head_dim
    config = tuned("decode_attention", name, rows=batch, weights=weights)
    step = jax.jit(
        lambda q, cache, lengths: decode_attention(
            q, *map(kernel_arrays, cache), lengths=lengths, **config
        )
    )
    k, v = (np.asarray(side.dequantize(), np.float64) for side in cache)
    rows = np.asarray(q, np.float64).reshape(batch, case.kv_heads, -1, case.head_dim)
    reference = np.zeros(rows.shape)
    for b, length in enumerate(lengths):
        scores = rows[b] @ k[b, :, :length].swapaxes(1, 2) * case.head_dim**-0.5
        chances = np.exp(scores - scores.max(-1, keepdims=True))
        reference[b] = chances / chances.sum(-1, keepdims=True) @ v[b, :, :length]
    places = jnp.asarray(lengths)
    kernel = lambda: step(q, cache, places).astype(jnp.float32)  # noqa: E731
    return kernel, reference.reshape(q.shape), 4 * _ROUNDED


def _prompt(right: RightCase, settings: Settings) -> Made:
    """The second chunk of a prompt, by cuDNN where that is; a CPU has XLA's."""
    case: AttentionCase = right.case
    count = 8 if settings.smoke else _MANY
    longest = case.slots if settings.smoke else max(_LENGTHS) + 1
    lengths = np.asarray([37] if settings.smoke else _LENGTHS, np.int32)
    dtype, spec, batch = jnp.dtype(settings.dtype), parse_format(case.format), len(lengths)
    shape = (batch, case.kv_heads, longest, case.head_dim)
    keys, values = (
        random_cache(key, shape, spec, dtype) for key in jax.random.split(jax.random.key(4))
    )
    q = random_array(jax.random.key(1), (batch, count, case.heads, case.head_dim), dtype)
    name = None if settings.smoke else "cudnn"
    step = jax.jit(functools.partial(fdq.attention, implementation=name))
    k, v = (np.asarray(side.dequantize(), np.float64) for side in (keys, values))
    group = case.heads // case.kv_heads
    rows = np.asarray(q, np.float64).reshape(batch, count, case.kv_heads, group, -1)
    reference = np.zeros(rows.shape)
    for b, length in enumerate(lengths):
        for i in range(count):
            seen = length - count + i + 1
            scores = rows[b, i] @ k[b, :, :seen].swapaxes(1, 2) * case.head_dim**-0.5
            chances = np.exp(scores - scores.max(-1, keepdims=True))
            reference[b, i] = chances / chances.sum(-1, keepdims=True) @ v[b, :, :seen]
    places = jnp.asarray(lengths)

    def kernel() -> jax.Array:
        return step(q, keys, values, lengths=places).astype(jnp.float32)

    return kernel, reference.reshape(q.shape), 4 * _ROUNDED


if __name__ == "__main__":
    section_main(run)
