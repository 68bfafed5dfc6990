"""What is reported of a program that was compiled ahead of time."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from pallas_kernels.aot.cuda_tools import Resources
from pallas_kernels.aot.gpu_targets import find
from pallas_kernels.aot.launch_sequence import Copy, LargeResult, Launches


@dataclasses.dataclass(frozen=True, kw_only=True)
class HotLoop:
    """An iteration of the hot loop of a kernel, as `sass.Loop` counts it."""

    instructions: int
    opcodes: dict[str, int]
    global_bytes: int
    whole_kernel: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelReport(Resources):
    """One kernel of a compiled program; its shared memory is static and dynamic."""

    mosaic: bool  # whether it is ours, and goes by its `name`; the others are XLA's
    loop: HotLoop | None = None

    @property
    def spill_bytes(self) -> int:
        """Stores and loads of registers that did not suffice."""
        return self.spill_store_bytes + self.spill_load_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report(Launches):
    """What became of one case on one GPU."""

    case: str
    kernel: str
    gpu: str  # "l4"
    arch: str  # "sm_89"
    jax: str  # version that compiled it
    ok: bool  # it compiled
    error: str = ""  # why not, in one line
    traceback: str = ""
    lower_seconds: float = 0.0  # tracing too
    compile_seconds: float = 0.0  # XLA, LLVM and ptxas
    kernels: tuple[KernelReport, ...] = ()  # Mosaic's first
    argument_bytes: int = 0
    temp_bytes: int = 0
    alias_bytes: int = 0  # of donated buffers that results are written to in place
    instructions_per_weight: float | None = None  # of the hot loop of the case's kernel
    instruction_budget: float | None = None  # above it, memory is no longer the limit
    instruction_limit: float | None = None  # what the case promises to stay within

    @property
    def mosaic_kernels(self) -> tuple[KernelReport, ...]:
        """The kernels that are ours."""
        return tuple(kernel for kernel in self.kernels if kernel.mosaic)

    def problems(self) -> list[str]:
        """Why this report fails the check: no compile, spills, or too many instructions."""
        if not self.ok:
            return [f"{self.case} on {self.gpu}: {self.error}"]
        where = f"{self.case} on {self.gpu} ({self.arch})"
        problems = [
            f"{where}: {kernel.name} spills {kernel.spill_store_bytes} bytes of stores and "
            f"{kernel.spill_load_bytes} of loads with {kernel.registers} registers"
            for kernel in self.mosaic_kernels
            if kernel.spill_bytes
        ]
        count, limit = self.instructions_per_weight, self.instruction_limit
        if limit is not None and (count is None or count > limit):
            problems.append(f"{where}: {count} instructions per weight, the limit is {limit}")
        return problems

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def failed(case: str, kernel: str, gpu: str, error: str = "") -> Report:
        """Of a case that has not compiled for a GPU, all by name."""
        target = find(gpu)
        return Report(
            case=case,
            kernel=kernel,
            gpu=target.name,
            arch=target.arch,
            jax=jax.__version__,
            ok=False,
            error=error,
        )

    @staticmethod
    def from_dict(value: dict[str, Any]) -> Report:
        """The inverse of `to_dict`, also after a detour over JSON."""

        def kernel(tensor_core: list[str], loop: Any, **rest: Any) -> KernelReport:
            found = HotLoop(**loop) if loop else None
            return KernelReport(tensor_core=tuple(tensor_core), loop=found, **rest)

        parts = {
            "kernels": tuple(kernel(**one) for one in value["kernels"]),
            "copies": tuple(Copy(**one) for one in value["copies"]),
            "large_results": tuple(LargeResult(**one) for one in value["large_results"]),
            "sequence": tuple(value["sequence"]),
        }
        return Report(**value | parts)
