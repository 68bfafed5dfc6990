"""Which program a product and attention run on each class of CPUs."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdq
from benchmarks.cpu_tuning import PATHS, candidates, table_rows
from fdq import ops
from fdq.ops import choice
from fdq.ops.choice import CPU_CLASSES, choose_program

PROGRAMS = ("fused", "lookup", "split", "tiles", "blocks", "table", "whole")


@pytest.fixture
def cpuinfo(monkeypatch):
    """Sets the flags that the system says the CPU has; None is a system without them."""

    def set_flags(flags):
        def read(path, *arguments):
            assert path == pathlib.Path("/proc/cpuinfo")
            if flags is None:
                raise FileNotFoundError(path)
            return f"model name : a CPU\nflags\t\t: fpu {flags}\n"

        monkeypatch.setattr(pathlib.Path, "read_text", read)
        choice.cpu_class.cache_clear()

    yield set_flags
    choice.cpu_class.cache_clear()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("avx2 fma", "avx2"),
        ("avx2 avx512f", "avx2"),
        ("avx2 avx512f avx512_vnni", "avx512"),
        ("avx2 avx512f avx512_vnni amx_bf16 amx_tile amx_int8", "amx"),
        (None, "avx2"),
    ],
)
def test_classes_are_told_by_what_the_cpu_has(flags, expected, cpuinfo):
    cpuinfo(flags)
    assert choice.cpu_class() == expected


@pytest.mark.parametrize("name", CPU_CLASSES)
def test_every_table_has_a_program_for_everything(name, monkeypatch):
    monkeypatch.setattr(choice, "cpu_class", lambda: name)
    for path in (*PATHS, "array", "a format of one's own"):
        for rows in (1, 2, 3, 16, 17, 1 << 30):
            for elements in (1, 1 << 16, 1 << 22, 1 << 26):
                program = choose_program(path, rows, elements)
                assert program.name in PROGRAMS
                assert program.size > 0 or program.name == "whole"
                # More than 16 MB of floats are never written.
                assert program.name != "whole" or elements <= 1 << 22
    for path in ("attention int8", "attention bfloat16"):
        for rows in (1, 4, 1024):
            program = choose_program(path, rows, 4096, default="attention")
            assert program.name in ("decoded", "parts", "lanes") and program.size > 0


def test_the_tuner_tries_what_there_is():
    for path in PATHS:
        for m in (1, 8, 128):
            tried = candidates(path, m)
            assert len(set(tried)) == len(tried) > 2
            assert any(name == "fused" for name, _ in tried) == (m <= 8)
            assert ("split", 128) not in tried or path in ("int8", "int4", "int3", "int2")
    rows = table_rows({1: {("fused", 8): 1.0, ("whole", 0): 2.0}, 16: {("blocks", 128): 2.0}})
    assert rows[0] == {"max_rows": 1, "program": "fused", "size": 8}
    assert rows[-1] == {"program": "blocks", "size": 128}


@pytest.mark.parametrize("name", CPU_CLASSES)
def test_products_are_the_same_on_every_class(name, monkeypatch):
    """Also of weights laid out for it."""
    monkeypatch.setattr(choice, "cpu_class", lambda: name)
    monkeypatch.setattr("fdq.ops.preparation.cpu_class", lambda: name)
    rng = np.random.default_rng(0)
    w = rng.standard_normal((256, 48)).astype(np.float32)
    for scheme in ("W8A16", "W4A16", "WNF4A16"):
        q = fdq.quantize(w, scheme, method="absmax")
        x = jnp.asarray(rng.standard_normal((2, 256)), jnp.float32)
        expected = np.asarray(x, np.float64) @ np.asarray(fdq.dequantize(q), np.float64)
        for weight in (q, ops.prepare(q, "cpu")):
            found = np.asarray(jax.jit(fdq.matmul)(x, weight))
            assert np.abs(found - expected).max() < 5e-6 * np.abs(expected).max()
