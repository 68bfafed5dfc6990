"""Facts about the GPUs that kernels are compiled for, and how XLA is told of one that is absent.

The figures are NVIDIA's published ones (data sheets and the CUDA programming guide's table of
compute capabilities), one GPU a line of `gpus.json`. Where a card was measured, its sustained clock
and copy bandwidth stand beside them, and budgets are computed from those.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import pathlib
import string

# Lanes that a multiprocessor issues to in a cycle: four schedulers of a warp of 32 threads each.
ISSUE_LANES = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU model; memory is in bytes, what was not measured None."""

    name: str  # what the command line and the reports call it
    device_kind: str  # `jax.Device.device_kind` on such a machine
    compute_capability: tuple[int, int]  # major, minor
    multiprocessors: int  # streaming multiprocessors (SMs)
    fp32_lanes: int  # float32 multiply-adds that a multiprocessor starts in a cycle
    clock: float  # boost clock, Hz
    bandwidth: float  # of the memory, bytes a second, as published
    l2_bytes: int
    memory_bytes: int
    shared_memory_per_multiprocessor: int
    shared_memory_per_block: int  # most of a block: 1 KiB, but on T4, is kept by the system
    threads_per_multiprocessor: int  # the most that can be resident
    measured_clock: float | None = None  # sustained under load, Hz
    measured_bandwidth: float | None = None  # of a copy, bytes a second

    @property
    def arch(self) -> str:
        """What ptxas calls it: "sm_89"; with the suffix for instructions of one architecture."""
        major, minor = self.compute_capability
        return f"sm_{major}{minor}{'a' if self._arch_specific else ''}"

    @property
    def _arch_specific(self) -> bool:
        return self.compute_capability >= (9, 0)

    def instruction_budget(self, bytes_per_weight: float) -> float:
        """Instructions that a thread may spend on a weight before memory is no longer the limit.

        SMs * 128 lanes * clock * bytes a weight / bandwidth, with the measured clock and bandwidth
        where there are any. A kernel above the budget is bound by instructions, and reaches at
        most budget / count of the bandwidth. int4 without its scales has 0.5 bytes a weight.
        """
        clock = self.measured_clock or self.clock
        bandwidth = self.measured_bandwidth or self.bandwidth
        return self.multiprocessors * ISSUE_LANES * clock * bytes_per_weight / bandwidth

    def target_config(self) -> str:
        """The text protobuf (XLA's `GpuTargetConfigProto`) that describes this GPU to XLA."""
        major, minor = self.compute_capability
        return string.Template(_beside("gpu_target.textproto")).substitute(
            dataclasses.asdict(self),
            major=major,
            minor=minor,
            suffix="a" if self._arch_specific else "",
            # Without it Mosaic's PTX, whose target has the suffix, is refused by ptxas.
            extension="ACCELERATED_FEATURES" if self._arch_specific else "NONE",
            clock_ghz=f"{self.clock / 1e9:g}",
            memory_bandwidth=int(self.bandwidth),
        )


def _beside(name: str) -> str:
    """The text of a file beside this one."""
    return pathlib.Path(__file__).with_name(name).read_text("utf-8")


GPUS: dict[str, Gpu] = {
    row["name"]: Gpu(**row | {"compute_capability": tuple(row["compute_capability"])})
    for row in json.loads(_beside("gpus.json"))
}
"""Every GPU that kernels are checked for, by name."""

ALL = tuple(GPUS)
"""Their names."""

SHORT_NAMES = {
    "t4": "T4",
    "l4": "L4",
    "a100": "A100",
    "h100": "H100",
    "h200": "H200",
    "b200": "B200",
    "rtx_pro_6000": "RTX PRO 6000",
}
"""What tables call them, in the order of columns: by age and size."""


def find(name: str) -> Gpu:
    """The GPU of a name, in any case and with dashes or spaces for underscores; or ValueError."""
    key = name.strip().lower().replace("-", "_").replace(" ", "_")
    if key in GPUS:
        return GPUS[key]
    near = difflib.get_close_matches(key, GPUS, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"Unknown GPU {name!r}: expected one of {', '.join(GPUS)}.{hint}")


def at_least(major: int, minor: int = 0) -> tuple[str, ...]:
    """Names of the GPUs of this compute capability and newer."""
    return tuple(g.name for g in GPUS.values() if g.compute_capability >= (major, minor))


def of_device(device_kind: str) -> Gpu | None:
    """The GPU with this `jax.Device.device_kind`; None if it is not known.

    Cards of the same model differ in their suffix ("NVIDIA A100-SXM4-80GB"): the model's name among
    the words decides.
    """
    words = set(device_kind.replace("-", " ").split())
    same = [gpu for gpu in GPUS.values() if gpu.device_kind == device_kind]
    alike = [gpu for name, gpu in GPUS.items() if words.issuperset(name.upper().split("_"))]
    return next(iter(same + alike), None)
