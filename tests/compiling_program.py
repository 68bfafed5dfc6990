"""Programs of tests that compile for a GPU without one: in processes of their own."""

import os
import pathlib
import subprocess
import sys
from typing import Any

_TESTS = pathlib.Path(__file__).parent


def printed(program: str, *arguments: Any) -> str:
    """What a program of this folder prints, which must end well."""
    dropped = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(_TESTS.parent), str(_TESTS)]),
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    }
    command = [sys.executable, str(_TESTS / program), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
