"""A whole decode step, or a prompt's, compiled for a GPU that is not there, with abstract weights.

A step is what `fdq.decode` runs for each token: the last token in, logits, the most likely token,
the new state; cache and state are donated. With `prefill` it is what `fdq.prefill` runs for so many
tokens of each prompt: a chunk in, the cache out. The weights are shapes only, quantized and laid
out by the code that does it to arrays, so that a model of 300 billion parameters needs no memory.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fdq import sharding
from fdq.analysis.planner import find_config, plan
from fdq.cache.kv_cache import KVCache
from fdq.decoding.functional import functional
from fdq.decoding.programs import extend
from fdq.decoding.state import DecodeState
from fdq.formats.qtensor import QuantizedWeight
from fdq.models import abstract
from fdq.nn.parameters import current_split
from fdq.ops import prepare
from fdq.quantizers.quantization import quantize
from pallas_kernels.aot.ahead_of_time import KernelReport, Report, compile_cases
from pallas_kernels.aot.gpu_targets import find
from pallas_kernels.aot.kernel_cases import KernelCase, Program
from pallas_kernels.device import default_device


@dataclasses.dataclass(frozen=True)
class LargeResult:
    """As `pallas_kernels.aot.launch_sequence.LargeResult`, for `count` instructions alike."""

    operation: str
    shape: str
    source: str
    bytes: int
    count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeStepReport:
    """What a decode step launches, holds and copies on one GPU; `layers` of `of_layers` compiled.

    Attributes:
      launches, launch_kinds: of one step, loops with a known trip count in full.
      unknown_loops: loops whose trip count depends on data; counted as one trip each.
      launches_per_layer: of the last layer: the difference between three and two layers.
      layer_sequence: the launches of the second layer, in their order (see `Launches.sequence`).
      mesh: of several GPUs; then bytes and launches are those of one.
      weight_bytes, cache_bytes: of what is compiled (`layers`).
      alias_bytes: written in place; the whole cache if nothing copies it.
      large_results: copies of weights or of the cache, what stands for one, and what kernels write
        (partial sums; of prompts decoded weights, which products read).
      copies: copy thunks: (count, bytes of all).
    """

    model: str
    scheme: str
    gpu: str
    jax: str
    layers: int
    of_layers: int
    context: int
    batch: int
    prefill: int  # tokens of each prompt; 0 for a decode step
    ok: bool
    error: str
    traceback: str
    launches: int
    launch_kinds: dict[str, int]
    unknown_loops: int
    launches_per_layer: int | None
    layer_sequence: tuple[str, ...]
    weight_bytes: int
    cache_bytes: int
    temp_bytes: int
    alias_bytes: int
    large_results: tuple[LargeResult, ...]
    copies: tuple[int, int]
    kernels: tuple[KernelReport, ...]
    seconds: float
    mesh: str = ""

    @property
    def temp_fraction(self) -> float:
        """Temporaries over weights."""
        return self.temp_bytes / self.weight_bytes if self.weight_bytes else 0.0

    @property
    def weight_copies(self) -> int:
        """Results of the size of a weight or of the cache that XLA writes, not a kernel of ours."""
        return sum(r.count for r in self.large_results if r.operation != "custom-call")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        derived = {"temp_fraction": self.temp_fraction, "weight_copies": self.weight_copies}
        return {**dataclasses.asdict(self), **derived}


def config_for(model: str, gpu: str, layers: int | None = None) -> Any:
    """A model's configuration as it would run on a GPU: float16 before sm_80, else bfloat16."""
    _, config = find_config(model)
    native = find(gpu).compute_capability >= (8, 0)
    config = config.replace(dtype="bfloat16" if native else "float16")
    if layers is None:
        return config
    if not 1 <= layers <= config.num_layers:
        raise ValueError(
            f"--layers {layers}: {model} has {config.num_layers}; expected 1 to {config.num_layers}"
        )
    return config.replace(num_layers=layers)


def program(
    model: str,
    scheme: Any,
    gpu: str,
    devices: Sequence[Any] = (),
    *,
    layers: int | None,
    context: int,
    batch: int,
    mesh: dict[str, int] | None = None,
    prefill: int = 0,
) -> Program:
    """The step of a model with abstract weights; called while `gpu` is the default device.

    With `mesh`, the sizes of its axes, over as many `devices`, on which the model is sharded.
    """
    config = config_for(model, gpu, layers)
    quantized = quantize(abstract(config), scheme)
    cache_spec = quantized.cache_spec
    if mesh is None:
        prepared = prepare(quantized, device=default_device())
    else:
        prepared = sharding.shard(quantized, sharding.make_mesh(mesh, devices))
        sharding.prepare(prepared)
    if prefill:
        template, params = current_split(prepared)
        cache = functools.partial(KVCache.init, config, batch, context, cache_spec)
        tokens = jax.ShapeDtypeStruct((batch, prefill), jnp.int32)
        numbers = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((), (batch,)))
        arguments = (params, tokens, jax.eval_shape(cache), *numbers)
        return Program(functools.partial(extend, template), arguments, donate=(2,))
    step, params = functional(prepared)

    def start() -> DecodeState:
        cache = prepared.init_cache(batch, context)
        first = jnp.zeros((batch, 1), jnp.int32)
        return DecodeState.start(first, jnp.ones((batch,), jnp.int32), cache)

    state = jax.eval_shape(start)
    if mesh is not None:
        (state,) = prepared.placement.put((state,))

    def decode_step(params: Any, state: DecodeState) -> DecodeState:
        logits, state = step(params, state)
        return state.push(logits.argmax(-1))

    return Program(function=decode_step, arguments=(params, state), donate=(1,))


def report(
    model: str,
    scheme: Any,
    gpu: str,
    *,
    layers: int | None = None,
    context: int = 4096,
    batch: int = 1,
    mesh: dict[str, int] | None = None,
    prefill: int = 0,
    update: Callable[[Report], None] | None = None,
) -> DecodeStepReport:
    """Compiles a model's decode step, and two and three layers of it for the count a layer.

    `model` is what `fdq.plan` takes, `scheme` what `fdq.quantize` takes and pickle can carry,
    `gpu` a name in `pallas_kernels.aot.gpu_targets.GPUS`; None of `layers` is the whole model.
    `mesh` are axes and sizes, as `fdq.sharding.make_mesh` takes them, of GPUs in one machine.
    With `prefill`, at most `context`, a chunk of so many tokens of each prompt stands in for the
    step; on one GPU only. `update` is called after each of the compiles, up to three. Needs the
    extra `aot`.
    """
    gpu = find(gpu).name
    if not 0 <= prefill <= context:
        raise ValueError(f"--prefill {prefill}: expected 1 to {context}, the slots of the cache.")
    if prefill and mesh is not None:
        raise ValueError("--prefill counts on one GPU: leave out --mesh.")
    of_layers = config_for(model, gpu).num_layers
    wanted = config_for(model, gpu, layers).num_layers
    counts = [wanted] + [n for n in (2, 3) if n != wanted and of_layers >= 3]
    sizes = {"context": context, "batch": batch, "mesh": mesh, "prefill": prefill}
    step = functools.partial(program, model, scheme, gpu, **sizes)
    cases = [
        KernelCase(
            name=f"{model} {scheme}, {count} layers",
            kernel="prefill" if prefill else "decode step",
            build=functools.partial(step, layers=count),
            devices=math.prod(mesh.values()) if mesh else 1,
            xla_kernels=False,
        )
        for count in counts
    ]
    reports = compile_cases(cases, [gpu], update=update)
    by_layers = dict(zip(counts, reports, strict=True))
    full = by_layers[wanted]
    config = config_for(model, gpu, wanted)
    planned = plan(config, scheme, context=context, batch=batch)
    if mesh is None:
        held = planned.weights.bytes, planned.cache_bytes
    else:
        held = full.argument_bytes - full.alias_bytes, full.alias_bytes
    if prefill:
        full = _of_weights(full, config, scheme, (prefill, batch * prefill))
    logits = 4 * batch * config.vocab_size if not prefill else 0
    per_layer = None
    if of_layers >= 3 and full.ok and by_layers[2].ok and by_layers[3].ok:
        per_layer = by_layers[3].launches - by_layers[2].launches
    same = ("jax", "ok", "error", "traceback", "launches", "launch_kinds", "unknown_loops")
    same += ("temp_bytes", "alias_bytes")
    return DecodeStepReport(
        **{name: getattr(full, name) for name in same},
        model=model,
        scheme=str(scheme),
        gpu=gpu,
        layers=wanted,
        of_layers=of_layers,
        context=context,
        batch=batch,
        weight_bytes=held[0],
        cache_bytes=held[1],
        mesh=",".join(f"{name}={size}" for name, size in (mesh or {}).items()),
        prefill=prefill,
        seconds=round(full.lower_seconds + full.compile_seconds, 1),
        launches_per_layer=per_layer,
        layer_sequence=_second_layer(by_layers) if per_layer else (),
        large_results=_grouped(full, logits),
        copies=(
            sum(copy.times for copy in full.copies),
            sum(copy.times * copy.bytes for copy in full.copies),
        ),
        kernels=full.mosaic_kernels,
    )


def _second_layer(by_layers: dict[int, Report]) -> tuple[str, ...]:
    """What three layers launch before they go on as two do.

    Both programs end alike (the last layer, the head), and the shorter one's other layers are the
    first of the longer one; the difference lies between.
    """
    shorter, longer = by_layers[2].sequence, by_layers[3].sequence
    same = 0
    while same < len(shorter) and _words(shorter[-1 - same]) == _words(longer[-1 - same]):
        same += 1
    end = len(longer) - same
    return longer[max(0, end - (len(longer) - len(shorter))) : end]


def _words(line: str) -> str:
    """A launch without the numbers of its instruction: kind, and JAX's name."""
    return line.split(" ")[0] + line.partition(":")[2]


def _of_weights(report: Report, config: Any, scheme: Any, rows: tuple[int, ...]) -> Report:
    """Large results that have the shape of a weight, packed or not: a prompt's rows are large too.

    By the sizes of their axes: those of a weight's columns, and of its rows or packed rows. `rows`
    are numbers of tokens, which a size of a weight may equal.
    """
    leaves = jax.tree.leaves(
        quantize(abstract(config), scheme), is_leaf=lambda leaf: isinstance(leaf, QuantizedWeight)
    )
    shapes = {leaf.shape[-2:] for leaf in leaves if isinstance(leaf, QuantizedWeight)}
    packed = {(k // codes, n) for k, n in shapes for codes in (1, 2, 4, 8, 16)}
    known = [collections.Counter(sizes) for sizes in packed if not {*sizes} & {*rows}]

    def is_one(shape: str) -> bool:
        axes = collections.Counter(map(int, re.findall(r"\d+", shape.partition("[")[2])))
        return any(sizes <= axes for sizes in known)

    kept = tuple(result for result in report.large_results if is_one(result.shape))
    return dataclasses.replace(report, large_results=kept)


def _grouped(report: Report, small: int) -> tuple[LargeResult, ...]:
    """The large results, equal ones together; the logits, and what is no larger, are none."""
    large = [r for r in report.large_results if r.bytes > small]
    counted = collections.Counter((r.operation, r.shape, r.source, r.bytes) for r in large)
    found = [LargeResult(*fields, count) for fields, count in counted.items()]
    return tuple(sorted(found, key=lambda result: -result.bytes * result.count))
