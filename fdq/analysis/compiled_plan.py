"""What the compiler says that a device holds: a plan held against `memory_analysis`.

The step of `fdq.decode` and the reading of a chunk of prompts are compiled for as many simulated
CPU devices as a mesh has, in a process of their own, from shapes: no weight is ever there. What is
held for a moment does not grow with the layers, so a few are enough, one of each kind.
"""

import dataclasses
import json
import math
import os
import pickle
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from fdq.analysis.device_plan import ONE_DEVICE, Sharded
from fdq.analysis.planner import find_config
from fdq.decoding import programs
from fdq.decoding.chunks import CHUNK
from fdq.decoding.state import DecodeState
from fdq.models import DecoderConfig
from fdq.nn.parameters import split
from fdq.schemes.mesh_rules import DEFAULT, Rules, make_mesh

_SECONDS = 1800


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """Bytes of one device in compiled programs, beside what is planned for the same layers.

    Attributes:
      layers: of the model that was compiled.
      planned_bytes: weights and cache, from shapes.
      argument_bytes: weights, cache and the few numbers beside it, as compiled.
      step_bytes, prompt_bytes: what a step, and a chunk of prompts, holds for a moment.
    """

    layers: int
    planned_bytes: int
    argument_bytes: int
    step_bytes: int
    prompt_bytes: int


def layers_of_each_kind(config: DecoderConfig) -> int:
    """The least number of first layers among which are all kinds."""
    kinds = [config.block.layer_kind(config, layer) for layer in range(config.num_layers)]
    return max((kinds.index(kind) + 1 for kind in set(kinds)), default=0)


def compiled(
    model: Any,
    scheme: Any,
    *,
    mesh: dict[str, int] | None = None,
    context: int = 4096,
    batch: int = 1,
    rules: Rules = DEFAULT,
    compat: str | None = None,
    layers: int | None = None,
    prompts: bool = True,
    chunk: int = CHUNK,
) -> Compiled:
    """Compiles the first `layers` of a model, by default one of each kind; a minute or two.

    Arguments are those of `device_plan`; without `prompts` only the step is compiled,
    with them the reading of `chunk` tokens of each.

    Raises:
      RuntimeError: the process failed; its last words.
      ValueError: as `device_plan`.
    """
    _, config = find_config(model)
    config = config.replace(num_layers=layers or layers_of_each_kind(config))
    work = (config, scheme, mesh or ONE_DEVICE, context, batch, rules, compat, prompts, chunk)
    environment = {name: text for name, text in os.environ.items() if name != "XLA_FLAGS"}
    process = subprocess.run(
        [sys.executable, "-m", __spec__.name],
        input=pickle.dumps(work),
        capture_output=True,
        check=False,
        timeout=_SECONDS,
        env={**environment, "JAX_PLATFORMS": "cpu"},
    )
    if process.returncode:
        lines = process.stderr.decode(errors="replace").strip().splitlines()
        raise RuntimeError(f"compiling for {mesh}: {lines[-1] if lines else 'no word'}")
    return Compiled(**json.loads(process.stdout.splitlines()[-1]))


def compile_here(
    sharded: Sharded, context: int, batch: int, *, prompts: bool = True, chunk: int = CHUNK
) -> Compiled:
    """`compiled` in this process, of a model on a mesh of devices that are there."""
    template, params = split(sharded.model)
    placement, cache = sharded.model.placement, sharded.cache(batch, context)

    def start(cache: Any) -> DecodeState:
        tokens = jnp.zeros((batch, 1), jnp.int32)
        return DecodeState.start(tokens, jnp.ones((batch,), jnp.int32), cache)

    def place(leaf: Any, spec: Any) -> Any:
        sharding = NamedSharding(placement.mesh, spec)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.eval_shape(start, cache)
    state = jax.tree.map(place, state, placement._row_specs(state))
    stops = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    step = programs.decode.lower(template, params, state, stops, steps=1).compile()
    memory: Any = step.memory_analysis()
    held = 0
    if prompts:
        shapes = ((batch, min(chunk, context)), (), (batch,))
        tokens, first, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes)
        read = programs.extend.lower(template, params, tokens, state.cache, first, lengths)
        found: Any = read.compile().memory_analysis()
        held = found.temp_size_in_bytes
    return Compiled(
        layers=sharded.config.num_layers,
        planned_bytes=sharded.weights.bytes + sharded.cache_bytes(batch, context),
        argument_bytes=memory.argument_size_in_bytes,
        step_bytes=memory.temp_size_in_bytes,
        prompt_bytes=held,
    )


def main() -> None:
    """The process: what `compiled` pickled on standard input, one JSON object on the output."""
    work = pickle.load(sys.stdin.buffer)  # of our own parent
    config, scheme, sizes, context, batch, rules, compat, prompts, chunk = work
    jax.config.update("jax_num_cpu_devices", math.prod(sizes.values()))
    sharded = Sharded.of(config, scheme, make_mesh(sizes), rules=rules, compat=compat)
    found = compile_here(sharded, context, batch, prompts=prompts, chunk=chunk)
    print(json.dumps(dataclasses.asdict(found)))


if __name__ == "__main__":
    main()
