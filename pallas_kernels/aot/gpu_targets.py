"""Facts about the GPUs that kernels are compiled for, and how XLA is told of one that is absent.

The figures are NVIDIA's published ones (data sheets and the CUDA programming guide's table of
compute capabilities). Where a card was measured, its sustained clock and copy bandwidth stand
beside them, and budgets are computed from those.
"""

from __future__ import annotations

import dataclasses
import difflib

# Lanes that a multiprocessor issues to in a cycle: four schedulers of a warp of 32 threads each.
ISSUE_LANES = 128
GIB = 1 << 30
MIB = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU model.

    Attributes:
      name: what the command line and the reports call it.
      device_kind: `jax.Device.device_kind` on such a machine.
      compute_capability: (major, minor).
      multiprocessors: streaming multiprocessors (SMs).
      fp32_lanes: float32 multiply-adds that a multiprocessor starts in a cycle.
      clock: boost clock, Hz.
      bandwidth: of the memory, bytes a second, as published.
      l2_bytes, memory_bytes: sizes, bytes.
      shared_memory_per_multiprocessor: bytes.
      shared_memory_per_block: the most that one block can have, bytes.
      threads_per_multiprocessor: the most that can be resident.
      measured_clock: sustained under load, Hz; None where nobody measured.
      measured_bandwidth: of a copy, bytes a second; None where nobody measured.
    """

    name: str
    device_kind: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    fp32_lanes: int
    clock: float
    bandwidth: float
    l2_bytes: int
    memory_bytes: int
    shared_memory_per_multiprocessor: int
    shared_memory_per_block: int
    threads_per_multiprocessor: int
    measured_clock: float | None = None
    measured_bandwidth: float | None = None

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
        most budget / count of the bandwidth.

        Args:
          bytes_per_weight: 0.5 for int4 without its scales.
        """
        clock = self.measured_clock or self.clock
        bandwidth = self.measured_bandwidth or self.bandwidth
        return self.multiprocessors * ISSUE_LANES * clock * bytes_per_weight / bandwidth

    def target_config(self) -> str:
        """The text protobuf (XLA's `GpuTargetConfigProto`) that describes this GPU to XLA."""
        major, minor = self.compute_capability
        suffix = "a" if self._arch_specific else ""
        # Without this extension Mosaic's PTX, whose target has the suffix, is refused by ptxas.
        extension = "ACCELERATED_FEATURES" if self._arch_specific else "NONE"
        return f"""
gpu_device_info {{
  name: "{self.device_kind}"
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability {major}.{minor}{suffix}"
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  core_count: {self.multiprocessors}
  fpus_per_core: {self.fp32_lanes}
  clock_rate_ghz: {self.clock / 1e9:g}
  memory_bandwidth: {int(self.bandwidth)}
  device_memory_size: {self.memory_bytes}
  l2_cache_size: {self.l2_bytes}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {self.shared_memory_per_block}
  shared_memory_per_core: {self.shared_memory_per_multiprocessor}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: {self.threads_per_multiprocessor}
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  device_address_bits: 64
  pcie_bandwidth: 34359738368
  ecc_enabled: true
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{self.device_kind}"
"""


# Shared memory of a block is a multiprocessor's less 1 KiB that the system keeps, except on T4.
_GPUS = (
    Gpu(
        name="t4",
        device_kind="Tesla T4",
        compute_capability=(7, 5),
        multiprocessors=40,
        fp32_lanes=64,
        clock=1.59e9,
        bandwidth=320e9,
        l2_bytes=4 * MIB,
        memory_bytes=15 * GIB,
        shared_memory_per_multiprocessor=65536,
        shared_memory_per_block=65536,
        threads_per_multiprocessor=1024,
    ),
    Gpu(
        name="a100",
        device_kind="NVIDIA A100-SXM4-40GB",
        compute_capability=(8, 0),
        multiprocessors=108,
        fp32_lanes=64,
        clock=1.41e9,
        bandwidth=1555e9,
        l2_bytes=40 * MIB,
        memory_bytes=40 * GIB,
        shared_memory_per_multiprocessor=167936,
        shared_memory_per_block=166912,
        threads_per_multiprocessor=2048,
    ),
    Gpu(
        name="l4",
        device_kind="NVIDIA L4",
        compute_capability=(8, 9),
        multiprocessors=58,
        fp32_lanes=128,
        clock=2.04e9,
        bandwidth=300e9,
        l2_bytes=48 * MIB,
        memory_bytes=22 * GIB,
        shared_memory_per_multiprocessor=102400,
        shared_memory_per_block=101376,
        threads_per_multiprocessor=1536,
    ),
    Gpu(
        name="h100",
        device_kind="NVIDIA H100 80GB HBM3",
        compute_capability=(9, 0),
        multiprocessors=132,
        fp32_lanes=128,
        clock=1.98e9,
        bandwidth=3352e9,
        l2_bytes=50 * MIB,
        memory_bytes=79 * GIB,
        shared_memory_per_multiprocessor=233472,
        shared_memory_per_block=232448,
        threads_per_multiprocessor=2048,
    ),
    Gpu(
        name="h200",
        device_kind="NVIDIA H200",
        compute_capability=(9, 0),
        multiprocessors=132,
        fp32_lanes=128,
        clock=1.98e9,
        bandwidth=4800e9,
        l2_bytes=50 * MIB,
        memory_bytes=140 * GIB,
        shared_memory_per_multiprocessor=233472,
        shared_memory_per_block=232448,
        threads_per_multiprocessor=2048,
        measured_clock=1.83e9,
        measured_bandwidth=4300e9,
    ),
    Gpu(
        name="b200",
        device_kind="NVIDIA B200",
        compute_capability=(10, 0),
        multiprocessors=148,
        fp32_lanes=128,
        clock=1.965e9,
        bandwidth=7672e9,
        l2_bytes=126 * MIB,
        memory_bytes=178 * GIB,
        shared_memory_per_multiprocessor=233472,
        shared_memory_per_block=232448,
        threads_per_multiprocessor=2048,
    ),
    Gpu(
        name="rtx_pro_6000",
        device_kind="NVIDIA RTX PRO 6000 Blackwell Server Edition",
        compute_capability=(12, 0),
        multiprocessors=188,
        fp32_lanes=128,
        clock=2.43e9,
        bandwidth=1597e9,
        l2_bytes=128 * MIB,
        memory_bytes=95 * GIB,
        shared_memory_per_multiprocessor=102400,
        shared_memory_per_block=101376,
        threads_per_multiprocessor=1536,
    ),
)

GPUS: dict[str, Gpu] = {gpu.name: gpu for gpu in _GPUS}
"""Every GPU that kernels are checked for, by name."""

ALL = tuple(GPUS)
"""Their names."""


def find(name: str) -> Gpu:
    """The GPU of a name, in any case and with dashes or spaces for underscores.

    Raises:
      ValueError: an unknown name; lists the known ones and suggests the nearest.
    """
    key = name.strip().lower().replace("-", "_").replace(" ", "_")
    if key in GPUS:
        return GPUS[key]
    near = difflib.get_close_matches(key, GPUS, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"Unknown GPU {name!r}: expected one of {', '.join(GPUS)}.{hint}")


def at_least(major: int, minor: int = 0) -> tuple[str, ...]:
    """Names of the GPUs of this compute capability and newer."""
    return tuple(g.name for g in _GPUS if g.compute_capability >= (major, minor))


def of_device(device_kind: str) -> Gpu | None:
    """The GPU with this `jax.Device.device_kind`; None if it is not known.

    Cards of the same model differ in their suffix ("NVIDIA A100-SXM4-80GB"): the model's name among
    the words decides.
    """
    for gpu in _GPUS:
        if gpu.device_kind == device_kind:
            return gpu
    models = {
        "T4": "t4",
        "A100": "a100",
        "L4": "l4",
        "H100": "h100",
        "H200": "h200",
        "B200": "b200",
        "RTX PRO 6000": "rtx_pro_6000",
    }
    words = device_kind.replace("-", " ").split()
    for model, name in models.items():
        if all(word in words for word in model.split()):
            return GPUS[name]
    return None
