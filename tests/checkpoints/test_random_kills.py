"""kill -9 at random moments: what is there is the whole checkpoint, or work that goes on."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

from fdq_checkpoints import CheckpointError, convert, inspect, load
from fdq_checkpoints.store.restore import StoredTensors
from tests.checkpoints import builders

SOURCE, SCHEME = builders.MODELS / "qwen3_moe", "W4A16-g8"
ROOT = pathlib.Path(__file__).parents[2]


def arrays_of(folder):
    """Shape, dtype and checksum of every array, by path."""
    return {entry.path: entry.arrays for entry in StoredTensors(folder).manifest.tensors}


@pytest.mark.slow
def test_a_conversion_killed_again_and_again_ends_as_one_that_was_not(tmp_path, rng):
    start = time.monotonic()
    convert(SOURCE, tmp_path / "whole", SCHEME, method="absmax")
    took = time.monotonic() - start
    expected, out = arrays_of(tmp_path / "whole"), tmp_path / "out"
    script = pathlib.Path(__file__).with_name("killed_conversion.py")
    folders = os.pathsep.join([str(ROOT), str(ROOT / "checkpoints")])
    environment = os.environ | {"PYTHONPATH": folders, "JAX_PLATFORMS": "cpu"}
    killed = 0
    # The first comes early, so that one at least is in time on whatever machine.
    for moment in (0.02, *sorted(rng.uniform(0.05, 1.0, 3))):
        if out.exists():
            break
        command = [sys.executable, script, SOURCE, out, SCHEME, str(moment * took)]
        done = subprocess.run(command, env=environment, check=False)
        assert done.returncode in (0, -9)
        killed += done.returncode == -9
        if not out.exists():
            for folder in (out, tmp_path / "out.fdq-tmp"):
                with pytest.raises((CheckpointError, FileNotFoundError)):
                    load(folder)
    assert killed
    if not out.exists():
        convert(SOURCE, out, SCHEME, method="absmax")
    assert arrays_of(out) == expected
    assert inspect(out, verify=True).verified
