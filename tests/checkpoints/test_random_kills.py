"""kill -9 at random moments: what is there is the whole checkpoint, or work that goes on."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

from fdq_checkpoints import CheckpointError, convert, inspect, load
from fdq_checkpoints.store.journal import Journal, Pieces
from fdq_checkpoints.store.restore import StoredTensors
from tests.checkpoints import builders

SOURCE, SCHEME = builders.MODELS / "qwen3_moe", "W4A16-g8"
ROOT = pathlib.Path(__file__).parents[2]


def arrays_of(folder):
    """Shape, dtype and checksum of every array, by path."""
    return {entry.path: entry.arrays for entry in StoredTensors(folder).manifest.tensors}


def killed_by(script, *arguments):
    """Whether a program was killed; it must have ended well if not."""
    folders = os.pathsep.join([str(ROOT), str(ROOT / "checkpoints")])
    environment = os.environ | {"PYTHONPATH": folders, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, pathlib.Path(__file__).with_name(script), *arguments]
    done = subprocess.run(command, env=environment, check=False)
    assert done.returncode in (0, -9)
    return done.returncode == -9


@pytest.mark.slow
def test_a_conversion_killed_again_and_again_ends_as_one_that_was_not(tmp_path, rng):
    start = time.monotonic()
    convert(SOURCE, tmp_path / "whole", SCHEME, method="absmax")
    took = time.monotonic() - start
    expected, out = arrays_of(tmp_path / "whole"), tmp_path / "out"
    killed = 0
    # The first comes early, so that one at least is in time on whatever machine.
    for moment in (0.02, *sorted(rng.uniform(0.05, 1.0, 3))):
        if out.exists():
            break
        killed += killed_by("killed_conversion.py", SOURCE, out, SCHEME, str(moment * took))
        if not out.exists():
            for folder in (out, tmp_path / "out.fdq-tmp"):
                with pytest.raises((CheckpointError, FileNotFoundError)):
                    load(folder)
    assert killed
    if not out.exists():
        convert(SOURCE, out, SCHEME, method="absmax")
    assert arrays_of(out) == expected
    assert inspect(out, verify=True).verified


@pytest.mark.slow
@pytest.mark.longest
def test_what_is_older_than_ten_seconds_is_there_after_a_kill(tmp_path, rng, caplog):
    """At random moments of a conversion whose every part takes long."""
    out, log, killed = tmp_path / "out", tmp_path / "log", 0
    for moment in rng.uniform(11, 18, 2):
        killed += killed_by("slow_conversion.py", SOURCE, out, SCHEME, str(moment), log)
        end, lines = time.time(), [line.split() for line in log.read_text().splitlines()]
        old = [line for line in lines if float(line[0]) < end - 10]
        made = {path: int(columns) for _, path, columns in old}
        journal = Journal(tmp_path / "out.fdq-tmp" / "journal")
        pieces = Pieces(tmp_path / "out.fdq-tmp", journal)
        kept = {".".join(path): columns for path, columns in pieces.columns().items()}
        kept |= {".".join(entry.path): 10**9 for entry in journal.done}
        assert made
        assert {path: n for path, n in made.items() if kept.get(path, 0) < n} == {}
    assert killed == 2
    convert(SOURCE, out, SCHEME, method="absmax")
    assert "going on, kept" in caplog.text
    convert(SOURCE, tmp_path / "whole", SCHEME, method="absmax")
    assert arrays_of(out) == arrays_of(tmp_path / "whole")
