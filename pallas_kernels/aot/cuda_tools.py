"""NVIDIA's command-line tools: ptxas (registers, spills) and cuobjdump (machine code)."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import re
import shutil
import subprocess
from typing import Any

import jax

INSTALL = (
    f"pip install 'jax[cuda13-local]=={jax.__version__}' nvidia-cuda-nvcc nvidia-cuda-cuobjdump "
    "nvidia-cuda-nvdisasm, or in a clone of fdq pip install -e '.[aot]'"
)
"""What to do where something is missing; the plugin's version must be that of jax."""

_TARGET = re.compile(r"^\.target\s+(\w+)", re.MULTILINE)
_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_OF_STACK = ("stack_bytes", "spill_store_bytes", "spill_load_bytes")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_TENSOR_CORE = re.compile(r"\b((?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)[\w.:]*)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resources:
    """What one kernel takes, of a thread, as ptxas says; spills are static code, not traffic."""

    name: str  # of the entry function
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_memory_bytes: int  # static, of a block
    tensor_core: tuple[str, ...]  # instructions in the PTX, without repetition


def find(tool: str) -> str:
    """Path of ptxas or cuobjdump: of the installed wheels, else of PATH; or FileNotFoundError."""
    package = importlib.util.find_spec("nvidia")
    for location in (package.submodule_search_locations or ()) if package else ():
        for directory in ("cu13/bin", "cuda_nvcc/bin"):
            path = pathlib.Path(location) / directory / tool
            if path.is_file():
                return str(path)
    path = shutil.which(tool)
    if path is None:
        raise FileNotFoundError(f"{tool} is not installed: {INSTALL}")
    return path


def assemble(ptx: pathlib.Path) -> tuple[list[Resources], pathlib.Path]:
    """Runs ptxas on a file for the architecture that it names, or raises RuntimeError.

    The cubin lies beside the PTX.
    """
    text = ptx.read_text()
    target = _TARGET.search(text)
    if target is None:
        raise RuntimeError(f"{ptx.name} has no .target")
    cubin = ptx.with_suffix(".cubin")
    log = _run("ptxas", "-v", f"--gpu-name={target.group(1)}", str(ptx), "-o", str(cubin))
    return _resources(log.stderr + log.stdout, text), cubin


def disassemble(cubin: pathlib.Path) -> str:
    """The machine code of a cubin as text; RuntimeError if cuobjdump cannot read it."""
    return _run("cuobjdump", "-sass", str(cubin)).stdout


def _run(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    run = subprocess.run([find(tool), *arguments], capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{tool}: {' '.join(run.stderr.split())[:500]}")
    return run


def _resources(log: str, ptx: str) -> list[Resources]:
    found: dict[str, dict[str, Any]] = {}
    values: dict[str, Any] = {}
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            name = match.group(1)
            instructions = sorted(set(_TENSOR_CORE.findall(_body(ptx, name))))
            values = {"shared_memory_bytes": 0, "tensor_core": tuple(instructions)}
            found[name] = values
        elif match := _STACK.search(line):
            for field, number in zip(_OF_STACK, match.groups(), strict=True):
                values[field] = int(number)
        elif match := _REGISTERS.search(line):
            values["registers"] = int(match.group(1))
            if shared := _SHARED.search(line):
                values["shared_memory_bytes"] = int(shared.group(1))
    return [Resources(name=name, **values) for name, values in found.items()]


def _body(ptx: str, name: str) -> str:
    """The text of one entry function, up to the next one."""
    start = ptx.find(f".entry {name}(")
    end = ptx.find(".entry ", start + 7)
    return ptx[start : end if end > 0 else None]
