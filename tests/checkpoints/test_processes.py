"""Several processes save one checkpoint together."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

import fdq
from fdq_checkpoints.store import manifest as manifests
from tests.checkpoints import builders
from tests.checkpoints.test_stored_trees import assert_same
from tests.oracles.make_golden import GOLDEN

SCRIPT = pathlib.Path(__file__).with_name("two_processes.py")


@pytest.mark.slow
def test_two_processes_save_what_is_spread_over_both(tmp_path):
    sources = tmp_path / "sources"
    tensors = builders.model("qwen3", sources / "nan")
    bad = tensors["model.layers.1.mlp.down_proj.weight"].copy()
    bad[3, 4] = np.nan
    tensors["model.layers.1.mlp.down_proj.weight"] = bad
    builders.write(sources / "nan" / "model.safetensors", tensors)
    # The first version's checkpoints have checksums of arrays, and none of files.
    shutil.copytree(GOLDEN / "v1_first" / "model", sources / "first")
    manifest = json.loads((sources / "first" / "fdq.json").read_text())
    array = max(
        (array for entry in manifest["tensors"] for array in entry["arrays"].values()),
        key=lambda array: np.prod(array["shape"]),
    )
    array["crc32"] ^= 1
    del manifest["sha256"]
    manifest["sha256"] = manifests._digest(manifest)
    (sources / "first" / "fdq.json").write_text(json.dumps(manifest))
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        port = str(taken.getsockname()[1])
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, str(SCRIPT)]
    both = [
        subprocess.Popen(
            [*command, str(index), port, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index in range(2)
    ]
    try:
        said = [process.communicate(timeout=120) for process in both]
    finally:
        for process in both:
            process.kill()
    for process, (_, errors) in zip(both, said, strict=True):
        assert process.returncode == 0, errors[-3000:]
    first, second = (output for output, _ in said)
    assert "saved\nFileExistsError: " in first and "loaded True" in first
    assert "saved\nCheckpointError: " in second and "model.fdq-tmp: process 0 of 2 failed" in second
    assert "loaded True" in second
    for said in (first, second):
        assert "nan: CheckpointError: " in said and "holds nan at [3, 4]" in said
        assert "itself: FileExistsError: " in said and "is inside the source" in said
        assert "unchecked: done" in said
        assert "first: CheckpointError: " in said and "the checksum of its data is not" in said
    assert "out: process 1 of 2 failed; its own error says why." in first
    assert "one: MemoryError: no room here" in second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "sources"]
    model = fdq.load(tmp_path / "model")
    assert_same(model, fdq.load(builders.MODELS / "qwen3", "W8A16"))
    tokens = np.int32([[1, 2, 3]])
    assert np.isfinite(model(tokens)).all()
