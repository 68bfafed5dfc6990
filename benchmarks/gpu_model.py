"""Whole-model decoding with random weights: tokens a second of one jitted loop.

Weights are made on the device, a tensor at a time, already quantized. A model that does not fit
loses layers, and its name says so. The loop runs a few times before it is timed: compilation, the
first tokens and the recording of command buffers are not part of the figure.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import fdq
from benchmarks.gpu_child import Emit, Settings, run_cases, section_main
from benchmarks.gpu_weights import nbytes, random_array, random_cache, random_weight
from fdq.cache import KVCache, LayerCache, parse_format
from fdq.formats.qtensor import QTensor, QuantizedWeight
from fdq.models import CONFIGS, DecoderConfig, abstract

GRAPHS = {
    "default": None,
    "off": "",
    "with loop": (
        "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,DYNAMIC_SLICE_FUSION,WHILE"
    ),
}
"""Command buffers (CUDA graphs): XLA's own choice, none, and the decode loop in one as well."""

_STEPS, _WARM_UPS, _CALLS = 64, 2, 5
_CONTEXT, _SLOTS = 1024, 2048
_ROOM = 0.92  # of the device's memory, for weights and cache; the rest is temporaries


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """One decoder to time.

    Attributes:
      model: a name in `fdq.models.CONFIGS`.
      scheme: its name; None is 16 bits.
      graphs: a key of `GRAPHS`.
      implementation: ``FDQ_IMPLEMENTATION`` of the process; None is fdq's own choice.
    """

    model: str
    scheme: str | None
    graphs: str = "default"
    implementation: str | None = None

    @property
    def key(self) -> str:
        """Unique."""
        parts = [self.model, self.scheme or "16-bit"]
        if self.implementation:
            parts.append(self.implementation)
        if self.graphs != "default":
            parts.append(f"command buffers {self.graphs}")
        return ", ".join(parts)

    def environment(self) -> dict[str, str]:
        """Variables of the process that measures it."""
        flags = os.environ.get("XLA_FLAGS", "")
        if GRAPHS[self.graphs] is not None:
            flags += f" --xla_gpu_enable_command_buffer={GRAPHS[self.graphs]}"
        return {"XLA_FLAGS": flags.strip(), "FDQ_IMPLEMENTATION": self.implementation or ""}


_LLAMA, _ERNIE = "llama-3-8b", "ernie-4.5-21b-a3b"
CASES = (
    ModelCase(_LLAMA, "W4A16C8"),
    ModelCase(_LLAMA, None),
    ModelCase(_ERNIE, "W4A16C8"),
    ModelCase(_LLAMA, "W8A16C8"),
    ModelCase(_LLAMA, "W4A16C8", "off"),
    ModelCase(_ERNIE, "W4A16C8", "off"),
    ModelCase(_LLAMA, "W4A16C8", implementation="xla"),
    ModelCase(_LLAMA, "W4A16C8", "with loop"),
    ModelCase(_ERNIE, "W4A16C8", "with loop"),
    ModelCase(_LLAMA, None, "off"),
    ModelCase(_LLAMA, "W8A16C8", "off"),
)
"""The important first; each is measured in a process of its own."""


def run(settings: Settings, emit: Emit) -> None:
    """Measures the case of ``more``."""
    run_cases([ModelCase(**settings.more)], settings, emit, measure)


def tiny(config: DecoderConfig) -> DecoderConfig:
    """Two small layers of the family, of whole groups of 128."""
    moe = config.moe
    if moe is not None:
        shared = 256 if moe.shared_intermediate_size else 0
        moe = dataclasses.replace(
            moe,
            num_experts=4,
            top_k=2,
            intermediate_size=128,
            layers=(1,),
            shared_intermediate_size=shared,
        )
    return config.replace(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        moe=moe,
    )


def fit(config: DecoderConfig, scheme: str | None, memory: int) -> tuple[DecoderConfig, str]:
    """The model with as many layers as fit in ``memory`` bytes, and what to call it."""

    def needed(layers: int) -> int:
        plan = fdq.plan(config.replace(num_layers=layers), scheme or "W16A16C16", context=_SLOTS)
        return plan.weights.bytes + plan.cache_bytes

    layers, room = config.num_layers, _ROOM * memory
    while layers > 2 and needed(layers) > room:
        one = needed(layers) - needed(layers - 1)
        layers = max(2, min(layers - 1, layers - int((needed(layers) - room) // max(one, 1))))
    if layers == config.num_layers:
        return config, ""
    note = f"cut to {layers} of {config.num_layers} layers, which is what fits in memory"
    return config.replace(num_layers=layers), note


def random_parameters(module: nnx.Module, device: Any) -> dict:
    """Random arrays for an abstract decoder, each laid out for ``device`` as soon as it is made.

    Args:
      module: with ShapeDtypeStructs, as `fdq.quantize` returns it.
      device: as in `fdq.prepare`.

    Returns:
      Parameters as `fdq.functional` gives them: norms are 1, biases 0, everything else normal
      with variance 1 / K.
    """
    _, shapes = fdq.functional(module)
    leaves, tree = jax.tree_util.tree_flatten_with_path(
        shapes, is_leaf=lambda a: isinstance(a, QTensor)
    )
    keys = jax.random.split(jax.random.key(0), len(leaves))
    made = []
    for key, (path, leaf) in zip(keys, leaves, strict=True):
        name = jax.tree_util.keystr(path)
        if isinstance(leaf, QTensor):
            made.append(fdq.prepare(random_weight(key, tuple(leaf.shape), leaf.spec), device))
        elif "bias" in name:
            made.append(jnp.zeros(leaf.shape, leaf.dtype))
        elif len(leaf.shape) < 2:
            made.append(jnp.ones(leaf.shape, leaf.dtype))
        else:
            made.append(random_array(key, tuple(leaf.shape), leaf.dtype, leaf.shape[-2] ** -0.5))
    return jax.tree.unflatten(tree, made)


def random_state(
    config: DecoderConfig, spec: Any, slots: int, context: int, batch: int = 1
) -> fdq.DecodeState:
    """Sequences of ``context`` tokens whose cache is full of random numbers."""
    shape = (batch, config.num_kv_heads, slots, config.head_dim)
    keys = jax.random.split(jax.random.key(1), 2 * config.num_layers)
    sides = [random_cache(key, shape, parse_format(spec), config.dtype) for key in keys]
    layers = tuple(LayerCache(*pair) for pair in zip(sides[::2], sides[1::2], strict=True))
    length = jnp.full((batch,), context, jnp.int32)
    tokens = jax.random.randint(jax.random.key(2), (batch, slots), 0, config.vocab_size, jnp.int32)
    return fdq.DecodeState.start(tokens, length, KVCache(layers, length - 1), key=jax.random.key(3))


def bytes_a_step(config: DecoderConfig, params: dict, state: fdq.DecodeState) -> int:
    """Bytes that a step reads: weights (of experts those picked) and the cache in use."""
    total = 0.0
    leaves = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda a: isinstance(a, QuantizedWeight)
    )
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path)
        size = nbytes(leaf)
        if "embed_tokens" in name and not config.tie_word_embeddings:
            continue  # one row of it
        if "experts" in name and "shared" not in name and config.moe is not None:
            size *= config.moe.top_k / config.moe.num_experts
        total += size
    used = float(jax.device_get(state.length).max()) / state.cache.max_length
    return int(total + used * state.cache.nbytes)


def measure(case: ModelCase, settings: Settings) -> dict[str, Any]:
    """Tokens a second of one case."""
    device = jax.devices()[0]
    log = _listen()
    config = CONFIGS[case.model].replace(dtype=settings.dtype)
    steps, slots, context, note = _STEPS, _SLOTS, _CONTEXT, ""
    if settings.smoke:
        config, steps, slots, context = tiny(config), 2, 64, 16
    else:
        limit = (device.memory_stats() or {}).get("bytes_limit", 8 << 30)
        config, note = fit(config, case.scheme, limit)
    module: Any = abstract(config)
    if case.scheme is not None:
        module = fdq.quantize(module, case.scheme)
    spec = module.cache_spec
    params = random_parameters(module, device)
    state = random_state(config, spec, slots, context)
    size = bytes_a_step(config, params, state)
    step, _ = fdq.functional(module)
    difference = compare_with_xla(config, case.scheme, params, settings)

    decode = decode_loop(step, steps)
    start = time.perf_counter()
    program = decode.lower(params, state).compile()
    compiled = time.perf_counter() - start
    memory = program.memory_analysis()
    warm_ups, calls = (1, 1) if settings.smoke else (_WARM_UPS, _CALLS)
    seconds = []
    for _ in range(warm_ups + calls):
        start = time.perf_counter()
        state = jax.block_until_ready(program(params, state))
        seconds.append((time.perf_counter() - start) / steps)
    seconds = seconds[warm_ups:]
    median = float(np.median(seconds))
    return {
        "section": "model",
        "model": case.model,
        "scheme": case.scheme or "16-bit",
        "graphs": case.graphs,
        "implementation": case.implementation or "fdq's choice",
        "layers": config.num_layers,
        "note": note,
        "context": int(jax.device_get(state.length)[0]),
        "bytes": size,
        "seconds": median,
        "spread": round((max(seconds) - min(seconds)) / 2 / median, 4),
        "tokens_per_second": 1 / median,
        "compile_seconds": round(compiled, 1),
        "temporary_bytes": getattr(memory, "temp_size_in_bytes", None),
        "difference": difference,
        "log": log,
    }


def decode_loop(step: Any, steps: int) -> Callable[[Any, Any], Any]:
    """`decode(params, state)`: so many greedy tokens a sequence; the state is donated."""

    @functools.partial(jax.jit, donate_argnums=1)
    def decode(params: Any, state: fdq.DecodeState) -> fdq.DecodeState:
        def body(state: fdq.DecodeState, _: None) -> tuple[fdq.DecodeState, None]:
            logits, state = step(params, state)
            return state.push(logits.argmax(-1)), None

        return jax.lax.scan(body, state, None, length=steps)[0]

    return decode


def _listen() -> list[str]:
    """What fdq logs from now on: which implementation each op got, and why."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger = logging.getLogger("fdq")
    logger.addHandler(Handler())
    logger.setLevel(logging.INFO)
    return lines


def compare_with_xla(
    config: DecoderConfig, scheme: str | None, params: dict, settings: Settings
) -> float:
    """How far the logits of the first two layers are from XLA's, relative in the 2-norm.

    Raises:
      ValueError: so far that something is wrong. With experts a rounding may pick another one.
    """
    small = config.replace(num_layers=2)
    module: Any = abstract(small)
    if scheme is not None:
        module = fdq.quantize(module, scheme)
    step, _ = fdq.functional(module)
    layers = {index: params["layers"][index] for index in list(params["layers"])[:2]}
    state = random_state(small, module.cache_spec, 64 if settings.smoke else 512, 48)
    first_layers = {**params, "layers": layers}

    def logits(params: dict, state: fdq.DecodeState) -> jax.Array:
        return step(params, state)[0]

    found = []
    for implementation in (os.environ.get("FDQ_IMPLEMENTATION"), "xla"):
        with _implementation(implementation):
            result = jax.jit(lambda params, state: logits(params, state))(first_layers, state)
        found.append(np.asarray(jax.device_get(result), np.float64))
    distance = float(np.linalg.norm(found[0] - found[1]) / np.linalg.norm(found[1]))
    allowed = 0.05 if config.moe is None else 0.5
    if not distance <= allowed:
        raise ValueError(f"logits of two layers differ from XLA's by {distance:.2g} of their norm")
    return distance


@contextlib.contextmanager
def _implementation(name: str | None) -> Iterator[None]:
    """Sets ``FDQ_IMPLEMENTATION``, which is read while tracing."""
    old = os.environ.pop("FDQ_IMPLEMENTATION", None)
    if name:
        os.environ["FDQ_IMPLEMENTATION"] = name
    try:
        yield
    finally:
        os.environ.pop("FDQ_IMPLEMENTATION", None)
        if old is not None:
            os.environ["FDQ_IMPLEMENTATION"] = old


if __name__ == "__main__":
    section_main(run)
