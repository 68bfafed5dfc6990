"""How fast quantized decoding is on this CPU: `python -m benchmarks.cpu`.

Every table is measured in one run, its rows interleaved, so that its ratios hold on a machine that
does other things too: figures are medians of the interleaved repetitions, ratios those of medians.
Only weights that are decoded whole, which disturb their neighbors, are timed after the others.

    python -m benchmarks.cpu                              # one token, attention, a decoder
    python -m benchmarks.cpu --quick --json cpu.json      # fewer repetitions, and a file
    python -m benchmarks.cpu --only matmul --rows 8 16    # eight tokens at once, and sixteen
    python -m benchmarks.cpu --tune                       # measure the choices for this CPU again
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fdq
from benchmarks.cpu_tuning import tune
from benchmarks.figure import dot_chart
from fdq import ops
from fdq.cache import quantize_cache
from fdq.formats.qtensor import QTensor, dequantize
from fdq.ops.choice import cpu_class
from fdq.quantizers import quantize_array
from fdq.schemes.scheme import CacheSpec, WeightSpec
from fdq.text_table import aligned

WEIGHTS = {
    "W8A16": ("W8", None),
    "W8A16 prepared": ("W8", None),
    "W4A16": ("W4", None),
    "W4A16, whole decoded": ("W4", None),
    "W3A16": ("W3", None),
    "W2A16": ("W2", None),
    "WNF4A16": ("WNF4", None),
    "WMXFP4A16": ("WMXFP4", None),
    "WNVFP4A16": ("WNVFP4", None),
    "WCC2A16": ("WCC2", None),
    "Wfp8A16": ("Wfp8", None),
    "W8A8": ("W8", "int8"),
    "W8A8 prepared": ("W8", "int8"),
    "W8A8, whole decoded": ("W8", None),
    "W4A8": ("W4", "int8"),
    "W4A8, whole decoded": ("W4", None),
    "block-wise FP8": ("block", "fp8-x128"),
    "block-wise FP8, whole decoded": ("block", None),
    "Wfp8Afp8": ("Wfp8", "fp8"),
    "W4Afp8": ("W4", "fp8"),
}
"""Rows of the matmul table: the weight's scheme and how activations are quantized."""

MUST = {
    "W8A16": 1.3,
    "W8A16 prepared": 1.3,
    "W4A16": 1.3,
    "W3A16": 1.3,
    "W2A16": 1.3,
    "WNF4A16": 1.3,
    "W8A8 prepared": 1.5,
    "W4A8": 0.5,
    "block-wise FP8": 0.5,
}
"""Times dense float32 that one token must reach."""

MUST_AMX = {
    1: {"W8A16 prepared": 2.8, "W8A8 prepared": 2.8, "W4A16": 2.2, "W3A16": 2.0, "W2A16": 2.5},
    8: {"W8A16 prepared": 4.0},
}
"""The same on a CPU with AMX, by rows of x, where it is more."""

WEIGHT_ONLY = tuple(name for name in MUST if "A16" in name)
"""What must not be slower than dense float32 up to 16 tokens at once."""

MUST_ATTENTION = {"C8": 2.5, "C16": 2.0, "C4": 1.8}
"""Times plain float32 that one query over the longest cache must reach."""

MUST_DECODER = {"W4A16C8": 1.2, "W8A16C8": 1.2}
"""Times bfloat16."""


@dataclasses.dataclass
class Timing:
    """One row of a table.

    Attributes:
      name: what was measured.
      seconds: median of the repetitions.
      fastest: their minimum.
      bytes: read by one call, counted from the arrays.
    """

    name: str
    seconds: float
    fastest: float
    bytes: int

    @property
    def gigabytes_per_second(self) -> float:
        """Bytes by the median."""
        return self.bytes / self.seconds / 1e9


def measure(cases: dict[str, tuple[Callable[..., Any], tuple, int]], repetitions: int):
    """Compiles and runs every case once, then times them in turn, ``repetitions`` times.

    Args:
      cases: name -> (function, arguments, bytes that it reads).
      repetitions: of the whole list.

    Returns:
      A ``Timing`` each, in the order of ``cases``.
    """
    for function, arguments, _ in cases.values():
        jax.block_until_ready(function(*arguments))
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repetitions):
        for name, (function, arguments, _) in cases.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            seconds[name].append(time.perf_counter() - start)
    return [
        Timing(name, float(np.median(s)), min(s), cases[name][2]) for name, s in seconds.items()
    ]


def weight_spec(name: str) -> WeightSpec:
    """``"block"`` or a scheme's weight part."""
    if name == "block":
        return WeightSpec(format="float8_e4m3", granularity="block", block_size=(128, 128))
    spec = WeightSpec.parse(name)
    assert spec is not None
    return spec


def random_weight(spec: WeightSpec, k: int, n: int, seed: int = 0) -> QTensor:
    """Random codes and plausible scales; much faster than quantizing a random weight."""
    rng = np.random.default_rng(seed)

    def fill(a: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(a.dtype, jnp.integer):
            low, high = (0, 256) if a.dtype == jnp.uint8 else (-127, 128)
            return jnp.asarray(rng.integers(low, high, a.shape, dtype=a.dtype))
        return jnp.asarray(rng.uniform(0.5, 1.5, a.shape), jnp.float32).astype(a.dtype)

    return jax.tree.map(fill, quantize_array(jax.ShapeDtypeStruct((k, n), jnp.float32), spec))


def matmul_table(k: int, n: int, m: int, repetitions: int) -> list[Timing]:
    """Products of ``[m, k]`` with every kind of ``[k, n]`` weight."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((m, k)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((k, n)), jnp.float32)
    wide = w.astype(jnp.bfloat16)
    dense = jax.jit(fdq.matmul)
    cases: dict[str, tuple[Callable[..., Any], tuple, int]] = {
        "float32 dense": (dense, (x, w), w.nbytes),
        "bfloat16 dense": (dense, (x.astype(jnp.bfloat16), wide), wide.nbytes),
        "bfloat16 dense [N, K], padded": (
            jax.jit(ops.transposed_matmul),
            (x.astype(jnp.bfloat16), jnp.asarray(np.asarray(wide).T.copy())),
            wide.nbytes,
        ),
    }
    pair = jnp.zeros((1, k), jnp.bfloat16)
    padded = jax.jit(lambda x, w: jnp.dot(jnp.concatenate([x, pair]), w)[:-1])
    cases["bfloat16 dense, padded"] = (padded, (x.astype(jnp.bfloat16), wide), wide.nbytes)
    whole = jax.jit(lambda x, q: x @ jax.lax.optimization_barrier(dequantize(q)))
    weights = functools.cache(lambda name: random_weight(weight_spec(name), k, n))
    for name, (weight_name, activation) in WEIGHTS.items():
        if m > 1 and name not in MUST:
            continue
        q = weights(weight_name)
        if name.endswith("whole decoded"):
            function = whole
        else:
            function = jax.jit(functools.partial(fdq.matmul, activation=activation))
        if name.endswith("prepared"):
            q = ops.prepare(q, "cpu")
        cases[name] = (function, (x, q), q.nbytes)
    # A weight decoded whole takes and gives back so much memory that the next few cases are slow.
    heavy = {name: cases.pop(name) for name in list(cases) if name.endswith("whole decoded")}
    return measure(cases, repetitions) + measure(heavy, max(1, repetitions // 5))


def attention_table(lengths: list[int], repetitions: int) -> dict[int, list[Timing]]:
    """One query of 32 heads over 8 KV heads of 128 channels, per slots and cache format.

    A few slots are empty: lengths and masks are real.
    """

    def plain(q, k, v, lengths):
        scores = jnp.einsum("bkgd,bksd->bkgs", q.reshape(1, kh, h // kh, d) * d**-0.5, k)
        visible = jnp.arange(k.shape[2]) < lengths[:, None, None, None]
        weights = jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1)
        return jnp.einsum("bkgs,bksd->bkgd", weights, v).reshape(q.shape)

    rng = np.random.default_rng(2)
    h, kh, d = 32, 8, 128
    tables = {}
    for length in lengths:
        q = jnp.asarray(rng.standard_normal((1, 1, h, d)), jnp.float32)
        k = jnp.asarray(rng.standard_normal((1, kh, length, d)), jnp.float32)
        lengths_ = jnp.asarray([length - 37], jnp.int32)
        cases: dict[str, tuple[Callable[..., Any], tuple, int]] = {}
        cases["plain float32"] = (jax.jit(plain), (q, k, k, lengths_), 2 * k.nbytes)
        for name, spec in {
            "C32": None,
            "C16": None,
            "C8": CacheSpec(format="int8"),
            "Cfp8": CacheSpec(format="float8_e4m3"),
            "C4": CacheSpec(format="int4", zero_point=True),
        }.items():
            source = k.astype(jnp.bfloat16) if name == "C16" else k
            tensor = quantize_cache(source, spec)
            call = functools.partial(jax.jit(fdq.attention), lengths=lengths_)
            cases[name] = (call, (q, tensor, tensor), 2 * tensor.nbytes)
        tables[length] = measure(cases, repetitions)
    return tables


def decoder_table(steps: int, repetitions: int) -> list[Timing]:
    """Decoding of a random-weight decoder, per token."""
    from benchmarks.cpu_decoder import decoder_cases

    timings = measure(decoder_cases(steps), repetitions)
    return [Timing(t.name, t.seconds / steps, t.fastest / steps, t.bytes // steps) for t in timings]


def show(title: str, timings: list[Timing], baselines: tuple[str, ...]) -> None:
    """Prints a table with one column of ratios a baseline."""
    by_name = {t.name: t for t in timings}
    rows = [("", "median", "fastest", "GB/s", *(f"x {b}" for b in baselines))]
    for t in timings:
        ratios = (f"{by_name[b].seconds / t.seconds:.2f}" for b in baselines)
        times = (f"{t.seconds * 1e3:.3f} ms", f"{t.fastest * 1e3:.3f} ms")
        rows.append((t.name, *times, f"{t.gigabytes_per_second:.1f}", *ratios))
    print(f"\n{title}\n{aligned(rows, right=range(1, len(rows[0])), indent='  ')}")


def verdicts(timings: list[Timing], bars: dict[str, float], baseline: str) -> dict[str, bool]:
    """Whether each figure that must be reached is, printed with what was measured."""
    by_name = {t.name: t.seconds for t in timings}
    found = {}
    for name, bar in bars.items():
        ratio = by_name[baseline] / by_name[name]
        found[f"{name} at least {bar}x {baseline}"] = ratio >= bar
        print(f"  {'reached' if ratio >= bar else 'MISSED '}  {name}: {ratio:.2f}, bar {bar}")
    return found


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model, flags = platform.processor(), ""
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            if key.strip() == "flags":
                flags = value
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "flags": [flag for flag in wanted if flag in flags.split()],
        "class": cpu_class(),
        "load": os.getloadavg()[0],
        "jax": importlib.metadata.version("jax"),
        "jaxlib": importlib.metadata.version("jaxlib"),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def plot(timings: list[Timing], path: str) -> None:
    """Bars of the ratio to dense float32."""
    dense = timings[0].seconds
    figure, axes = dot_chart(
        [timing.name for timing in timings], "times as fast as dense float32", width=7
    )
    axes.barh(range(len(timings)), [dense / timing.seconds for timing in timings], height=0.6)
    axes.axvline(1.0, color="black", linewidth=0.8)
    figure.savefig(path, dpi=150)


def main() -> int:
    """Runs the tables that were asked for; 1 if a figure that must be reached is not."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", choices=["matmul", "attention", "decoder"], help="one of the tables (all)"
    )
    parser.add_argument("--quick", action="store_true", help="a fifth of the repetitions")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1], help="tokens at once, for matmul (1)"
    )
    parser.add_argument("--size", type=int, default=4096, help="K of the weights (4096)")
    parser.add_argument("--columns", type=int, nargs="+", help="N of the weights (as --size)")
    parser.add_argument("--json", metavar="FILE", help="write all figures here")
    parser.add_argument("--plot", metavar="FILE", help="a picture of the matmul table")
    parser.add_argument(
        "--tune", action="store_true", help="measure the choices of this class of CPUs again"
    )
    arguments = parser.parse_args()
    record: dict[str, Any] = {"machine": machine()}
    print(", ".join(f"{key} {value}" for key, value in record["machine"].items()))
    if arguments.tune:
        tune(measure, random_weight, weight_spec, record["machine"], quick=arguments.quick)
        return 0
    repetitions = 9 if arguments.quick else 45
    missed = False
    if arguments.only in (None, "matmul"):
        size = arguments.size
        for n, m in itertools.product(arguments.columns or [size], arguments.rows):
            timings = matmul_table(size, n, m, repetitions)
            title = f"matmul [{m}, {size}] x [{size}, {n}]"
            show(title, timings, ("float32 dense", "bfloat16 dense"))
            record[title] = [dataclasses.asdict(t) for t in timings]
            if size >= 4096 and m <= 16:
                bars = MUST if m == 1 else dict.fromkeys(WEIGHT_ONLY, 1.0)
                if cpu_class() == "amx":
                    bars = bars | MUST_AMX.get(m, {})
                record[f"{title}, bars"] = verdicts(timings, bars, "float32 dense")
                missed |= not all(record[f"{title}, bars"].values())
            if arguments.plot and m == arguments.rows[0]:
                plot(timings, arguments.plot)
    if arguments.only in (None, "attention"):
        for length, timings in attention_table([256, 2048, 16384], repetitions).items():
            title = f"attention, one query over {length} slots, 32 heads, 8 KV heads of 128"
            show(title, timings, ("plain float32", "C16"))
            record[title] = [dataclasses.asdict(t) for t in timings]
        record["attention, bars"] = verdicts(timings, MUST_ATTENTION, "plain float32")
        missed |= not all(record["attention, bars"].values())
    if arguments.only in (None, "decoder"):
        timings = decoder_table(8, max(3, repetitions // 5))
        title = "decode, 300 million parameters, one sequence, per token"
        show(title, timings, ("bfloat16",))
        record[title] = [dataclasses.asdict(t) for t in timings]
        record["decoder, bars"] = verdicts(timings, MUST_DECODER, "bfloat16")
        missed |= not all(record["decoder, bars"].values())
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(record, indent=1) + "\n")
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
