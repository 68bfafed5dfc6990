"""Two and four processes on one machine do on a mesh what one process does, bit for bit."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

import fdq
import fdq.models
from fdq.sharding import distribution, make_mesh
from fdq_checkpoints import CheckpointError
from fdq_checkpoints.store import restore
from fdq_checkpoints.store.restore import StoredTensors
from fdq_checkpoints.tree_paths import dotted
from tests.covering import longest
from tests.sharding.many_devices import config_of, model_of

SCRIPT = pathlib.Path(__file__).with_name("process.py")


def run(count, folder, mesh):
    """What each of the processes said."""
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        port = str(taken.getsockname()[1])
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(index), str(count), port, str(folder), mesh],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index in range(count)
    ]
    try:
        said = [process.communicate(timeout=900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, said, strict=True):
        assert process.returncode == 0, errors[-3000:]
    lines = ([line for line in out.splitlines() if line.startswith("{")] for out, _ in said)
    return [json.loads(found[-1]) for found in lines]


def damage(folder):
    """Changes one byte of the largest file of a checkpoint."""
    files = [path for path in (folder / "weights").rglob("*") if path.is_file()]
    path = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.longest
@pytest.mark.parametrize(
    ("count", "mesh"), [(2, "tensor=2,data=2"), longest(4, "tensor=2,data=2"), (2, "tensor=4")]
)
def test_processes_do_what_one_does(count, mesh, tmp_path):
    model = fdq.models.Decoder(config_of("llama", num_layers=3), rngs=nnx.Rngs(params=0))
    fdq.save(model, tmp_path / "float")
    fdq.save(model, tmp_path / "damaged")
    damage(tmp_path / "damaged")
    (one,) = run(1, tmp_path, mesh)
    many = run(count, tmp_path, mesh)
    assert all(said["tokens"] == one["tokens"] for said in many)
    # Sums of two numbers are the same in any order; of four, not to the last bit.
    exact = mesh == "tensor=2,data=2"
    found, expected = (np.load(tmp_path / f"of {n}" / "logits.npy") for n in (count, 1))
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(found, expected, rtol=0, atol=0 if exact else 1e-5)
    for said in many:
        assert said["share"] < 0.6 * said["all"]
        assert said["read"] <= 1.15 * said["share"], said
        assert said["peak"] <= 1.3 * said["on_devices"] + said["layer"], said
    assert all(said["damaged"].startswith("CheckpointError: ") for said in [one, *many])
    assert sum("its own error says" not in said["damaged"] for said in many) == 1
    converted, saved = (
        fdq.load(tmp_path / f"of {count}" / name) for name in ("converted", "saved")
    )
    alone = fdq.load(tmp_path / "of 1" / "converted")
    for other in (saved, alone):
        for a, b in zip(*map(jax.tree.leaves, (converted, other)), strict=True):
            assert np.array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["W8A16C8", longest("block_wise_fp8")])
def test_parts_are_read_as_wholes_are(scheme, tmp_path, monkeypatch):
    """In one process: what is read in parts and then dealt out is what is dealt out on the host."""
    monkeypatch.setattr(restore, "MIN_PART_BYTES", 0)
    one, mesh = model_of("llama", scheme), make_mesh({"tensor": 8})
    fdq.save(one, tmp_path / "model")
    many = fdq.shard(one, mesh)
    stored = StoredTensors(tmp_path / "model")
    asked = []

    def parts(path, tensor):
        found = distribution.parts(many.placement, path, tensor)
        asked.extend(found)
        return found

    placed = stored.restore_parts(lambda path, held: (path, held), parts)
    values = {path: distribution.put(many.placement, path, held) for path, held in placed.values()}
    assert set(asked) >= {"codes"}
    assert sorted(values) == sorted(dotted(path) for path in placed)
    kernel = many.layers[0].self_attn.qkv_proj.kernel
    for a, b in zip(
        jax.tree.leaves(values["layers.0.self_attn.qkv_proj.kernel"]),
        jax.tree.leaves(kernel),
        strict=True,
    ):
        assert np.array_equal(a, b) and a.sharding.is_equivalent_to(b.sharding, a.ndim)
    damage(tmp_path / "model")
    with pytest.raises(CheckpointError, match="damaged"):
        stored.restore_parts(lambda path, held: held, parts)
