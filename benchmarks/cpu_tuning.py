"""Measures which program of a product is the fastest: the table of this class of CPUs."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fdq.ops
from fdq import ops
from fdq.ops.choice import cpu_class

PATHS = {
    "int8": ("W8", None),
    "int4": ("W4", None),
    "int3": ("W3", None),
    "int2": ("W2", None),
    "nf4": ("WNF4", None),
    "mxfp4": ("WMXFP4", None),
    "nvfp4": ("WNVFP4", None),
    "cc2": ("WCC2", None),
    "float8_e4m3": ("block", None),
    "int8 x int8": ("W8", "int8"),
    "int4 x int8": ("W4", "int8"),
}
"""Keys of the table, and what is measured for each."""

ROWS = (1, 2, 4, 8, 16, 128)
FUSED_ROWS, TILES, BLOCKS = (8, 16, 32), (128, 512), (128, 256, 512)
_DENSE: tuple[str, int] = ("dense", 0)
# Below this many weights a loop over tiles costs more than it saves.
SMALL = 65536
# Above this many it is not decoded whole: 16 MiB of float32.
LARGE = 2**22
_UNIT_ROWS = {"int8": 1, "float8_e4m3": 1, "int3": 8, "int2": 4, "cc2": 4}
_CODEBOOKS = ("nf4", "mxfp4", "nvfp4")


def candidates(path: str, m: int) -> list[tuple[str, int]]:
    """Programs worth trying for m rows of x and what a key of ``PATHS`` names."""
    kind, *integers = path.split()
    found = []
    if m <= 8:
        # With 16 units of float8 XLA writes decoded weights: their decoding has too many readers.
        most = 8 if kind.startswith("float8") else max(FUSED_ROWS)
        units = {max(1, min(rows // _UNIT_ROWS.get(kind, 2), most)) for rows in FUSED_ROWS}
        found += [("fused", size) for size in sorted(units)]
        if kind in _CODEBOOKS and m <= 2:
            found += [("lookup", size) for size in (4, 8, 16)]
    if (kind in _CODEBOOKS or kind.startswith("float8")) and not integers:
        found += [("table", size) for size in BLOCKS]
    if kind.startswith("int") and not integers:
        found += [("split", size) for size in BLOCKS[::2]]
    found += [("blocks", size) for size in BLOCKS]
    if m > 1:
        found += [("tiles", size) for size in TILES]
    return [*found, ("whole", 0)]


def table_rows(measured: dict[int, dict[tuple[str, int], float]]) -> list[dict[str, Any]]:
    """The fastest program by rows of x, as a file of ``cpu_choices/`` holds it.

    A weight of more than ``LARGE`` elements is never decoded whole, whatever was measured: the
    fastest of the others takes its place.

    Args:
      measured: rows of x -> program -> seconds.
    """
    rows: list[dict[str, Any]] = []
    for m in sorted(measured):
        times = measured[m]
        best = min(times, key=times.__getitem__)
        bounds = {} if m == max(measured) else {"max_rows": m}
        if m > 1:
            rows.append({**bounds, "max_elements": SMALL, "program": "whole"})
        if best[0] == "whole":
            rows.append({**bounds, "max_elements": LARGE, "program": "whole"})
            best = min((c for c in times if c[0] != "whole"), key=times.__getitem__)
        rows.append({**bounds, "program": best[0], "size": best[1]})
    return rows


def tune(
    measure: Callable[..., Any],
    random_weight: Callable[..., Any],
    weight_spec: Callable[[str], Any],
    machine: dict[str, Any],
    *,
    quick: bool,
) -> None:
    """Times every candidate at K = N = 4096 for each path and number of rows; writes the best."""
    choices: dict[str, list[dict[str, Any]]] = {}
    for path, (name, activation) in PATHS.items():
        measured: dict[int, dict[tuple[str, int], float]] = {}
        for m in ROWS:
            size = 4096 if m < 64 else 2048
            q = random_weight(weight_spec(name), size, size)
            x = jnp.asarray(np.random.default_rng(m).standard_normal((m, size)), jnp.float32)
            cases: dict[tuple[str, int], tuple] = {
                _DENSE: (jax.jit(fdq.matmul), (x, jnp.ones((size, size))), 0)
            }
            for candidate in candidates(path, m):

                def product(x, q, candidate=candidate):
                    with ops.forced_program(*candidate):
                        return fdq.matmul(x, q, activation=activation)  # noqa: B023

                cases[candidate] = (jax.jit(product), (x, q), q.nbytes)
            timings = measure(cases, (5 if quick else 15) if m < 64 else 5)
            # The fastest repetition: other jobs disturb it least.
            measured[m] = {t.name: t.fastest for t in timings}
            dense = measured[m].pop(_DENSE)
            for (kind, size), seconds in measured[m].items():
                print(
                    f"  {path:14} {m:4} rows  {kind:6}{size:5} {seconds * 1e3:9.3f} ms, "
                    f"{dense / seconds:5.2f} times dense float32",
                    flush=True,
                )
        choices[path] = table_rows(measured)
    choices["array"] = [{"program": "fused", "size": 8}]
    choices["default"] = choices["int4"]
    for kind in ("float8_e5m2", "mxfp8"):
        choices[kind] = choices["float8_e4m3"]
    for kind in ("int3", "int2"):
        # Few rows are fusions of the same unpacking; more are an integer dot.
        choices[f"{kind} x int8"] = [
            {**row, "size": choices[kind][0]["size"]} if row["program"] == "fused" else row
            for row in choices["int4 x int8"]
        ]
    path = pathlib.Path(fdq.ops.__file__).parent / "cpu_choices" / f"{cpu_class()}.json"
    # Those of attention are kept: `python -m benchmarks.cpu --only attention` shows what they give.
    old = json.loads(path.read_text("utf-8"))["choices"] if path.exists() else {}
    choices |= {key: rows for key, rows in old.items() if key.startswith("attention")}
    table = {"measured": {**machine, "command": "python -m benchmarks.cpu --tune"}}
    text = json.dumps({**table, "choices": choices}, indent=1)
    path.write_text(text + "\n")
    print(f"wrote {path}")
