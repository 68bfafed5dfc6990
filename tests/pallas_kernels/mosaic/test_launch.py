"""What a launch asks of the compiler."""

import os
import pathlib
import subprocess
import sys

import pytest

from pallas_kernels.aot.ahead_of_time import unavailable


@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
def test_shared_memory_is_neither_tiled_nor_swizzled(tmp_path):
    """A swizzle that Mosaic chose by itself made products of eight rows wrong on an H100."""
    root = pathlib.Path(__file__).parents[3]
    dropped = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")]),
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    }
    program = str(root / "tests" / "shared_memory_program.py")
    command = [sys.executable, program, "h100", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stdout  # rows, their sums, the norms
    assert all("out_transforms = [[]]" in line for line in lines), done.stdout
