"""Functions of prepared weights are exported, serialized and restored, also where none was made."""

import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import fdq
from fdq.ops.prepared_weight import TransposedWeight, WordsWeight
from tests.covering import slow

pytest.importorskip("flatbuffers", reason="jax.export serializes with it")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("W8A16", TransposedWeight),
        ("W4A16-g32", WordsWeight),
        slow("Wfp8-b128", WordsWeight),
        slow("WNVFP4", WordsWeight),
        slow("W4A16-asym-g32", WordsWeight),
    ],
)
def test_a_function_of_a_prepared_weight_comes_back(name, kind, rng):
    w = kind.of(fdq.quantize(rng.standard_normal((128, 16)).astype(np.float32), name))

    def function(w, x):
        return fdq.matmul(x, w, implementation="xla"), w

    x = jnp.asarray(rng.standard_normal((3, 128)), jnp.float32)
    exported = jax.export.export(jax.jit(function))(w, x)
    restored = jax.export.deserialize(bytearray(exported.serialize()))
    assert restored.in_tree == jax.tree.structure(((w, x), {}))
    y, back = restored.call(w, x)
    expected = np.asarray(x) @ np.asarray(fdq.dequantize(w))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)
    assert isinstance(back, kind) and jax.tree.structure(back) == jax.tree.structure(w)


@pytest.mark.slow
def test_it_comes_back_in_a_process_that_made_none(rng, tmp_path):
    w = WordsWeight.of(fdq.quantize(rng.standard_normal((64, 8)).astype(np.float32), "W4A16-g32"))
    exported = jax.export.export(jax.jit(fdq.dequantize))(w)
    (tmp_path / "function").write_bytes(exported.serialize())
    script = """if True:
        import pathlib, sys
        import fdq
        import jax.export
        restored = jax.export.deserialize(bytearray(pathlib.Path(sys.argv[1]).read_bytes()))
        print(jax.tree.unflatten(restored.in_tree, restored.in_avals)[0][0])
    """
    command = [sys.executable, "-c", script, str(tmp_path / "function")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("WordsWeight([64, 8], int4, groups of 32")
