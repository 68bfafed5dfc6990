"""Slices of models on this card: the first step, decoding at several batches, and prompts.

Four layers and twelve have a difference of eight: a layer takes an eighth of it, and the whole
model what its layers do. Where the seconds before the first token go is told apart.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import fdq
from benchmarks.gpu_child import Emit, Settings, run_cases, section_main
from benchmarks.gpu_model import bytes_a_step, decode_loop, random_parameters, random_state, tiny
from fdq.analysis.startup_time import measured
from fdq.models import CONFIGS, abstract

LAYERS = (4, 12)
_CONTEXT, _SLOTS, _STEPS, _CALLS = 1024, 2048, 32, 5
_LLAMA, _ERNIE = "llama-3-8b", "ernie-4.5-21b-a3b"


@dataclasses.dataclass(frozen=True)
class StepCase:
    """The first layers of a model.

    Attributes:
      model: a name in `fdq.models.CONFIGS`.
      scheme: its name; None is 16 bits.
      layers: how many.
      batch: sequences that are decoded, each after 1024 tokens.
      prompt: tokens of a prompt that is read instead; 0 decodes.
      graphs: what `benchmarks.gpu_model.GRAPHS` calls the command buffers of the process.
    """

    model: str
    scheme: str | None
    layers: int
    batch: int = 1
    prompt: int = 0
    graphs: str = "default"

    @property
    def key(self) -> str:
        """Unique."""
        what = f"prompt of {self.prompt}" if self.prompt else f"batch {self.batch}"
        graphs = "" if self.graphs == "default" else f", command buffers {self.graphs}"
        return f"{self.model}, {self.scheme or '16-bit'}, {self.layers} layers, {what}{graphs}"


def step_cases(part: str) -> list[StepCase]:
    """Those of ``decode``, ``graphs off``, ``prompts`` or ``batches``, the important first."""
    few = LAYERS[0]
    if part == "decode":
        pairs = ((_LLAMA, "W4A16C8"), (_ERNIE, "W4A16C8"), (_LLAMA, None), (_LLAMA, "W8A16C8"))
        return [StepCase(*pair, layers) for pair in pairs for layers in LAYERS]
    if part == "graphs off":
        return [StepCase(_LLAMA, "W4A16C8", layers, graphs="off") for layers in LAYERS]
    if part == "prompts":
        schemes = ("W4A16C8", None)
        return [
            StepCase(_LLAMA, scheme, few, prompt=tokens)
            for tokens in (2048, 512)
            for scheme in schemes
        ] + [StepCase(_ERNIE, "W4A16C8", few, prompt=2048)]
    if part == "batches":
        return [StepCase(_LLAMA, "W4A16C8", few, batch=batch) for batch in (8, 9, 16, 64)]
    raise ValueError(f"unknown part {part!r}: decode, graphs off, prompts, batches")


def run(settings: Settings, emit: Emit) -> None:
    """Measures the cases of the part ``more["part"]``."""
    cases = step_cases(settings.more["part"])
    run_cases(cases[:1] if settings.smoke else cases, settings, emit, measure)


def measure(case: StepCase, settings: Settings) -> dict[str, Any]:
    """Seconds of a step, or of a prompt, and of all that comes before the first."""
    config = CONFIGS[case.model].replace(dtype=settings.dtype, num_layers=case.layers)
    steps, slots, context, prompt = _STEPS, _SLOTS, _CONTEXT, case.prompt
    if settings.smoke:
        config, steps, slots, context = tiny(config), 2, 64, 16
        prompt = min(prompt, 32)
    if prompt:
        slots += prompt
    module: Any = abstract(config)
    if case.scheme is not None:
        module = fdq.quantize(module, case.scheme)
    params = random_parameters(module, jax.devices()[0])
    state = random_state(config, module.cache_spec, slots, context, case.batch)
    functions = fdq.functional(module)
    size = bytes_a_step(config, params, state)
    turns = 1 if prompt else steps
    with measured() as spent:
        start = time.perf_counter()
        if prompt:
            advance = _prompt(functions, config, prompt, slots, case.batch)
        else:
            advance = decode_loop(functions.step, steps)
        held = jax.block_until_ready(advance(params, state))
        first = time.perf_counter() - start
        startup = {
            "lowering_seconds": round(spent.lowering, 2),
            "compiling_seconds": round(spent.compiling, 2),
            "self_check_seconds": round(spent.self_check, 2),
            "first_seconds": round(first, 2),
        }
    seconds = []
    for _ in range(1 if settings.smoke else _CALLS + 1):
        start = time.perf_counter()
        held = jax.block_until_ready(advance(params, held))
        seconds.append((time.perf_counter() - start) / turns)
    seconds = seconds[-_CALLS:]  # command buffers are recorded before
    return {
        "section": "steps",
        "model": case.model,
        "scheme": case.scheme or "16-bit",
        "layers": config.num_layers,
        "of_layers": CONFIGS[case.model].num_layers,
        "batch": case.batch,
        "prompt": prompt,
        "graphs": case.graphs,
        "bytes": size,
        "seconds": float(np.median(seconds)),
        **startup,
    }


def _prompt(
    functions: Any, config: Any, tokens: int, slots: int, batch: int
) -> Callable[[Any, Any], Any]:
    """Reads the same prompt at every call; what it is given of the last call is not used."""
    ids = jax.random.randint(jax.random.key(5), (batch, tokens), 0, config.vocab_size, "int32")
    read = jax.jit(lambda params, ids: functions.init(params, ids, slots))
    return lambda params, _: read(params, ids)


def whole_models(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What whole models would take, from slices of 4 and of 12 layers: seconds a step each."""
    found = []
    groups: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        if not row["prompt"] and row["batch"] == 1:
            group = groups.setdefault((row["model"], row["scheme"], row["graphs"]), {})
            group[row["layers"]] = row
    for (model, scheme, graphs), by_layers in groups.items():
        if set(LAYERS) <= set(by_layers):
            few, more = (by_layers[n] for n in LAYERS)
            layer = (more["seconds"] - few["seconds"]) / (LAYERS[1] - LAYERS[0])
            seconds = few["seconds"] + layer * (few["of_layers"] - LAYERS[0])
            bytes_of = (more["bytes"] - few["bytes"]) / (LAYERS[1] - LAYERS[0])
            found.append(
                {
                    "model": model,
                    "scheme": scheme,
                    "graphs": graphs,
                    "seconds": seconds,
                    "tokens_per_second": 1 / seconds,
                    "layer_seconds": layer,
                    "bytes": few["bytes"] + bytes_of * (few["of_layers"] - LAYERS[0]),
                }
            )
    return found


if __name__ == "__main__":
    section_main(run)
