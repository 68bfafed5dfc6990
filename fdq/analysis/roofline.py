"""How long a decode step takes at the least: memory, matrix units, links between devices, launches.

The time of a step is that of reading the weights and the cache, or of multiplying where that is
longer, and what comes on top: sums over devices, and the gaps between launches. No kernel is
perfect; measured speed is below.
"""

import dataclasses
import math

import numpy as np

from fdq.models import DecoderConfig
from fdq.models.latent import Latent

LAUNCH_SECONDS = 2e-6
"""Between the end of a kernel and the start of the next one; an estimate."""

LAUNCHES_A_LAYER, LAUNCHES_BESIDE = 11, 12
"""Of one layer (docs/gpu.md) and of the embedding, the head and drawing a token."""

DRAWS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """What joins GPUs of one machine, and what one of them multiplies.

    Attributes:
      name: NVLink or PCIe, with the generation.
      bandwidth: bytes a second in one direction, as published.
      latency: seconds of a sum of a few bytes over several devices; an estimate.
      matrix_rate: products and sums of 16-bit numbers in a second, dense, as published.
    """

    name: str
    bandwidth: float
    latency: float
    matrix_rate: float


LINKS = {
    "t4": Link(name="PCIe 3", bandwidth=16e9, latency=20e-6, matrix_rate=65e12),
    "l4": Link(name="PCIe 4", bandwidth=32e9, latency=20e-6, matrix_rate=121e12),
    "a100": Link(name="NVLink 3", bandwidth=300e9, latency=10e-6, matrix_rate=312e12),
    "h100": Link(name="NVLink 4", bandwidth=450e9, latency=8e-6, matrix_rate=989e12),
    "h200": Link(name="NVLink 4", bandwidth=450e9, latency=8e-6, matrix_rate=989e12),
    "b200": Link(name="NVLink 5", bandwidth=900e9, latency=8e-6, matrix_rate=2250e12),
    "rtx_pro_6000": Link(name="PCIe 5", bandwidth=64e9, latency=20e-6, matrix_rate=500e12),
}
"""By the name of a GPU in `pallas_kernels.aot.gpu_targets.GPUS`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What one device does in a step.

    Attributes:
      read_bytes: of weights and cache.
      multiplications: products and sums, each counted.
      sums: (devices, bytes) of each sum over devices.
      layers: of the model.
    """

    read_bytes: float
    multiplications: float
    sums: tuple[tuple[int, float], ...]
    layers: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step, by what they are spent on."""

    memory: float
    matrix: float
    links: float
    launches: float

    @property
    def total(self) -> float:
        """Memory or matrix units, whichever is longer, and the rest."""
        return max(self.memory, self.matrix) + self.links + self.launches

    @property
    def bound(self) -> str:
        """What the most time goes to."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


def step_time(step: Step, *, bandwidth: float, link: Link) -> StepTime:
    """Seconds of a step on a device that reads `bandwidth` bytes a second.

    A sum of s bytes over n devices moves 2 (n - 1) / n * s over each link (ring).
    """
    moved = sum(2 * (n - 1) / n * size for n, size in step.sums)
    launches = LAUNCHES_A_LAYER * step.layers + LAUNCHES_BESIDE
    return StepTime(
        memory=step.read_bytes / bandwidth,
        matrix=step.multiplications / link.matrix_rate,
        links=len(step.sums) * link.latency + moved / link.bandwidth,
        launches=launches * LAUNCH_SECONDS,
    )


def attention_products(config: DecoderConfig, context: int) -> float:
    """Products and sums, each counted, of a token with `context` others in all layers and heads."""
    part, total = config.attention, 0.0
    widths = 2 * config.head_dim
    if isinstance(part, Latent):
        widths = (part.rank + part.rope_dim) + part.rank
    for layer in range(config.num_layers):
        seen = min(context, part.ring_window(config, layer) or context)
        total += 2 * config.num_heads * widths * seen
    return total


def share_of_experts(experts: int, picked: int, tokens: int, groups: int = 1) -> float:
    """Which part of its experts the busiest of `groups` of devices reads for `tokens`.

    Each token goes to `picked` of all, every choice being as likely; the mean of a few draws, for
    a step takes as long as its slowest device. One group: 1 - (1 - picked / experts) ** tokens.
    """
    if groups == 1:
        return 1 - (1 - picked / experts) ** tokens
    if tokens * picked > 8 * experts * math.log(experts):  # all are read
        return 1.0
    rng, most = np.random.default_rng(0), 0.0
    for _ in range(DRAWS):
        order = np.argpartition(rng.random((tokens, experts)), picked - 1, axis=1)
        hit = np.zeros(experts, bool)
        hit[order[:, :picked]] = True
        most += float(hit.reshape(groups, -1).mean(axis=1).max())
    return most / DRAWS
