"""Several processes save one checkpoint together."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

import fdq
from tests.checkpoints import builders
from tests.checkpoints.test_stored_trees import assert_same

SCRIPT = pathlib.Path(__file__).with_name("two_processes.py")


@pytest.mark.slow
def test_two_processes_save_what_is_spread_over_both(tmp_path):
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
        said = [process.communicate(timeout=300) for process in both]
    finally:
        for process in both:
            process.kill()
    for process, (_, errors) in zip(both, said, strict=True):
        assert process.returncode == 0, errors[-3000:]
    first, second = (output for output, _ in said)
    assert "saved\nFileExistsError: " in first and "loaded True" in first
    assert "saved\nCheckpointError: " in second and "model.fdq-tmp: process 0 of 2 failed" in second
    assert "loaded True" in second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    model = fdq.load(tmp_path / "model")
    assert_same(model, fdq.load(builders.MODELS / "qwen3", "W8A16"))
    tokens = np.int32([[1, 2, 3]])
    assert np.isfinite(model(tokens)).all()
