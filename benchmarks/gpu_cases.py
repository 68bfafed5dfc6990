"""What the GPU benchmark measures: layer shapes, formats and batch sizes, the important first."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from benchmarks.gpu_weights import weight_spec
from fdq.models import CONFIGS, DecoderConfig
from fdq.ops.matmul import check_cases
from fdq.ops.prepared_weight import kernel_weight
from pallas_kernels.matmul import float8_blocks, mma

if TYPE_CHECKING:
    from pallas_kernels.weights.layout import WeightLayout

MODELS = ("llama-3-8b", "qwen3-32b", "ernie-4.5-21b-a3b", "ernie-4.5-300b-a47b")

KERNEL = "kernel"
"""Entry of a kernel alone; of products its float32 partial sums, which the consumer adds up."""

MAIN_FORMATS = ("W4", "W8")
"""Measured at every shape and number of rows."""

OTHER_FORMATS = (
    "W4-asym",
    "W4-channel",
    "W3",
    "W2",
    "WCC2",
    "WNF4",
    "Wfp8",
    "WMXFP4",
    "WNVFP4",
)
"""Measured at two shapes."""

DYNAMIC_FORMATS = (("W8", "int8"), ("W4", "int8"))
"""Weights, and what activations are quantized to."""

ROWS = (1, 2, 4, 8)
CORE_ROWS = (16, 64)
"""Of batches, which tensor cores multiply."""

LARGE = 24 << 20
"""Packed bytes from which a matrix must reach its share of the bandwidth."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatrixCase:
    """A product ``x [M, K] @ w [K, N]``.

    Attributes:
      format: weight part of a scheme's name.
      activation: what x is quantized to, or None.
      model, layer: where the shape is from.
      m, k, n: sizes.
      urgent: is measured with every peer, the reference of the figures that must be reached.
    """

    format: str
    model: str
    layer: str
    m: int
    k: int
    n: int
    activation: str | None = None
    urgent: bool = False

    @property
    def scheme(self) -> str:
        """``W4A16``, with what differs from it in the weight's name behind it."""
        name, _, suffix = self.format.partition("-")
        activation = {None: "16", "int8": "8"}[self.activation]
        return f"{name}A{activation}" + (f"-{suffix}" if suffix else "")

    @property
    def key(self) -> str:
        """Unique."""
        return (
            f"{self.scheme} {self.model} {self.layer} [{self.m}, {self.k}] x [{self.k}, {self.n}]"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertCase:
    """Rows of x, each times the weight of the expert that was picked for it.

    Attributes:
      format, model, layer: as in `MatrixCase`.
      tokens: rows of the batch; each goes to ``top_k`` experts.
      experts, top_k, k, n: of the layer.
    """

    format: str
    model: str
    layer: str
    tokens: int
    experts: int
    top_k: int
    k: int
    n: int

    @property
    def key(self) -> str:
        """Unique."""
        return (
            f"{self.format}A16 {self.model} experts.{self.layer}, {self.tokens} x top {self.top_k} "
            f"of {self.experts}, [{self.k}, {self.n}]"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """One new token for each of ``batch`` sequences, over ``slots`` of a cache that are all in use.

    Attributes:
      format: ``C16``, ``C8``, ...
      model: whose heads.
      batch, slots, heads, kv_heads, head_dim: sizes.
    """

    format: str
    model: str
    batch: int
    slots: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def key(self) -> str:
        """Unique."""
        return (
            f"{self.format} {self.model} {self.batch} x {self.slots} tokens, {self.heads} heads, "
            f"{self.kv_heads} KV heads of {self.head_dim}"
        )


def linear_layers(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """``(K, N)`` of each linear layer of a decoder, experts and head left out."""
    hidden, width = config.hidden_size, config.num_heads * config.head_dim
    kv = 2 * config.num_kv_heads * config.head_dim
    layers = {
        "qkv": (hidden, width + kv),
        "o": (width, hidden),
        "gate_up": (hidden, 2 * config.intermediate_size),
        "down": (config.intermediate_size, hidden),
    }
    if config.moe is not None and config.moe.shared_intermediate_size:
        shared = config.moe.shared_intermediate_size
        layers |= {"shared gate_up": (hidden, 2 * shared), "shared down": (shared, hidden)}
    return layers


def on_tensor_cores(format: str) -> bool:
    """Whether the tensor cores' kernel takes a format on this device."""
    return mma.unsupported(_layout(format), jnp.bfloat16) is None


def multiplies_float8(format: str) -> bool:
    """Whether the kernel for many rows of float8 takes a format on this device."""
    return float8_blocks.unsupported(_layout(format)) is None


@functools.cache
def _layout(format: str) -> WeightLayout:
    spec = weight_spec(format)
    return jax.eval_shape(lambda: kernel_weight(check_cases.sample(spec))).layout


def matrix_cases() -> list[MatrixCase]:
    """Every product, by importance: a run that is short of time leaves out the last ones."""
    shapes = [
        (model, layer, k, n)
        for model in MODELS
        for layer, (k, n) in linear_layers(CONFIGS[model]).items()
    ]
    cases: list[MatrixCase] = []

    def add(format: str, model: str, layer: str, m: int, **more) -> None:
        k, n = linear_layers(CONFIGS[model])[layer]
        case = MatrixCase(format=format, model=model, layer=layer, m=m, k=k, n=n, **more)
        if case.key not in known:
            known.add(case.key)
            cases.append(case)

    known: set[str] = set()
    largest = [s for s in shapes if packed_bytes("W4", s[2], s[3]) >= LARGE and s[0] != MODELS[3]]
    for model, layer, _, _ in largest:
        for format in MAIN_FORMATS:
            add(format, model, layer, 1, urgent=True)
    for layer in ("qkv", "o"):
        for format in MAIN_FORMATS:
            add(format, MODELS[3], layer, 1, urgent=True)
    for format in MAIN_FORMATS:
        add(format, MODELS[0], "down", 8, urgent=True)
    for format in OTHER_FORMATS:
        add(format, MODELS[0], "down", 1)
    for format, activation in DYNAMIC_FORMATS:
        add(format, MODELS[0], "down", 1, activation=activation)
    for format in MAIN_FORMATS:
        for model, layer, _, _ in shapes:
            add(format, model, layer, 1)
    for m in ROWS[1:]:
        for format in MAIN_FORMATS:
            for layer in ("down", "gate_up"):
                add(format, MODELS[0], layer, m)
    for m in CORE_ROWS:
        for format in filter(on_tensor_cores, MAIN_FORMATS):
            for layer in ("down", "gate_up"):
                add(format, MODELS[0], layer, m)
    for format in OTHER_FORMATS:
        add(format, MODELS[2], "qkv", 1)
    for format in OTHER_FORMATS:
        add(format, MODELS[0], "down", 8)
    for format, activation in DYNAMIC_FORMATS:
        add(format, MODELS[2], "qkv", 1, activation=activation)
    for m in ROWS[1:]:
        for format in MAIN_FORMATS:
            for model, layer, _, _ in shapes:
                add(format, model, layer, m)
        for format in OTHER_FORMATS:
            for model, layer in ((MODELS[0], "down"), (MODELS[2], "qkv")):
                add(format, model, layer, m)
    return cases


def proof_matrices() -> list[MatrixCase]:
    """One row and eight of 4- and 8-bit weights, each layer of Llama-3-8B and ERNIE-21B."""
    wanted = [c for c in matrix_cases() if c.format in MAIN_FORMATS and c.m in (1, 8)]
    wanted = [c for c in wanted if c.model in (MODELS[0], MODELS[2]) and c.activation is None]
    return sorted(wanted, key=lambda c: (c.m, -c.k * c.n))


def proof_attention() -> list[AttentionCase]:
    """One sequence of 1k to 128k tokens in Llama's heads, 32k first."""
    wanted = [c for c in attention_cases() if c.model == MODELS[0] and c.batch == 1]
    wanted = [c for c in wanted if c.format in ("C16", "C8", "C4")]
    return sorted(wanted, key=lambda c: (c.slots != 32768, c.slots))


def packed_bytes(format: str, k: int, n: int) -> int:
    """Bytes of a weight, scales left out."""
    from fdq.formats import FORMATS

    return k * n * FORMATS[weight_spec(format).format].bits // 8


def expert_cases() -> list[ExpertCase]:
    """Both products of the experts of both ERNIE models, one token first."""
    cases = []
    for tokens in (1, 8, 4, 2):
        for model in MODELS[2:]:
            moe = CONFIGS[model].moe
            assert moe is not None
            hidden = CONFIGS[model].hidden_size
            shapes = {
                "gate_up": (hidden, 2 * moe.intermediate_size),
                "down": (moe.intermediate_size, hidden),
            }
            for format in ("W4", "W8", "WCC2") if tokens == 1 else ("W4",):
                for layer, (k, n) in shapes.items():
                    cases.append(
                        ExpertCase(
                            format=format,
                            model=model,
                            layer=layer,
                            tokens=tokens,
                            experts=moe.num_experts,
                            top_k=moe.top_k,
                            k=k,
                            n=n,
                        )
                    )
    return cases


def attention_cases() -> list[AttentionCase]:
    """Each cache format over 1k to 128k tokens, and a batch; Llama's heads, then ERNIE's."""
    cases = []

    def add(format: str, model: str, batch: int, slots: int) -> None:
        config = CONFIGS[model]
        cases.append(
            AttentionCase(
                format=format,
                model=model,
                batch=batch,
                slots=slots,
                heads=config.num_heads,
                kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
            )
        )

    main = ("C16", "C8", "C4")
    # Short caches last: so many exceed the L2 cache that XLA compiles for a minute.
    for batch, slots in ((1, 32768), (8, 8192), (1, 8192), (1, 131072), (1, 1024)):
        for format in main:
            add(format, MODELS[0], batch, slots)
    for format in ("Cfp8", "C8-kvchannel"):
        for slots in (32768, 8192, 131072, 1024):
            add(format, MODELS[0], 1, slots)
    for format in main:
        add(format, MODELS[2], 1, 32768)
    for format in main:
        add(format, MODELS[0], 64, 2048)
    for format in ("C8", "C4"):
        add(format, MODELS[2], 1, 1024)
        add(format, MODELS[2], 64, 2048)
    return cases
