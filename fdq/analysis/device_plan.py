"""What each device of a mesh holds of a model and how fast it could decode, from shapes alone.

The model is quantized and cut by the code that does it to arrays, over a mesh of devices that need
not be there: `fdq.shard` of shapes over a `jax.sharding.AbstractMesh`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from fdq.analysis.planner import WeightTable, cache_name, find_config, weight_table
from fdq.analysis.roofline import (
    LINKS,
    Step,
    StepTime,
    attention_products,
    share_of_experts,
    step_time,
)
from fdq.analysis.sums_over_devices import sums_over_devices
from fdq.cache import limits
from fdq.cache.kv_cache import KVCache, abstract_scales
from fdq.cache.stored import on_mesh
from fdq.decoding.chunks import CHUNK, chunk_on_gpu
from fdq.models import DecoderConfig, abstract
from fdq.models.decoder import Decoder
from fdq.nn.parameters import split
from fdq.quantizers.quantization import match_table, quantize
from fdq.schemes.mesh_rules import DEFAULT, Rules, abstract_mesh, shards
from fdq.schemes.recipe import Recipe
from fdq.sharding.distribution import shard
from fdq.text_table import aligned, folded
from fdq.text_table import size as in_units
from pallas_kernels.aot.gpu_targets import Gpu, find

USABLE = 0.92
"""Of a GPU's memory; the rest is the driver's, NCCL's and lost between allocations."""

ONE_DEVICE = {"tensor": 1}


@dataclasses.dataclass(frozen=True, eq=False)
class Sharded:
    """A model of shapes on a mesh: what a `DevicePlan` of any batch and context is computed from.

    Attributes:
      name, scheme: for people.
      config: of the model.
      model: abstract, quantized, and cut; its `placement` says how.
      recipe: its schemes.
      weights: what one device holds of them.
      remarks: of the scheme, and what stays whole on every device.
    """

    name: str
    scheme: str
    config: DecoderConfig
    model: Decoder
    recipe: Recipe
    weights: WeightTable
    remarks: tuple[str, ...]

    @classmethod
    def of(
        cls,
        model: Any,
        scheme: Any,
        mesh: Any,
        *,
        rules: Rules = DEFAULT,
        compat: str | None = None,
    ) -> "Sharded":
        """Of what `fdq.plan` takes, and a mesh, abstract or not."""
        name, config = find_config(model)
        recipe = Recipe.parse(scheme, compat=compat, has_experts=config.moe is not None)
        config = config.replace(dtype="bfloat16")
        plain = abstract(config)
        remarks = match_table(plain, recipe, compat=compat).remarks
        many = shard(quantize(plain, recipe, compat=compat), mesh, rules)
        return cls(
            name=name,
            scheme=scheme if isinstance(scheme, str) else str(recipe),
            config=config,
            model=many,
            recipe=recipe,
            weights=weight_table(jax.tree.map(_local, split(many)[1])),
            remarks=(*remarks, *_together(many.placement.notes)),
        )

    @functools.cached_property
    def devices(self) -> int:
        """Of the mesh."""
        return math.prod(self.model.placement.mesh.shape.values())

    @functools.cached_property
    def rows_apart(self) -> int:
        """Into how many parts sequences are dealt out."""
        placement = self.model.placement
        return shards(placement.mesh, placement.axes("batch"))

    def cache_bytes(self, batch: int, context: int) -> int:
        """Bytes of the cache that one device has."""
        held = map(_local, jax.tree.leaves(self.cache(batch, context)))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in held)

    def cache(self, batch: int, context: int) -> KVCache:
        """The abstract cache, where it lies."""
        placement, spec = self.model.placement, self.recipe.cache
        static = abstract_scales(self.config, spec) if spec and spec.calibrated else None

        def init(scales: Any) -> KVCache:
            settings = placement.cache_settings
            return KVCache.init(self.config, batch, context, spec, scales=scales, **settings)

        cache = jax.eval_shape(init, static)
        settings = placement.cache_settings
        sharding, _ = on_mesh(self.config, batch, settings["mesh"], settings["mesh_rules"])
        specs = cache.partition(*sharding.spec)
        return jax.tree.map(_with(sharding.mesh), cache, specs)

    def chunk(self, batch: int, context: int, usable: int | None) -> int:
        """Tokens of each prompt that `fdq.prefill` reads at once: more on GPUs with room."""
        if usable is None:
            return CHUNK
        room = usable - self.weights.bytes - self.cache_bytes(batch, context)
        return chunk_on_gpu(self.config, batch, context, room)

    def temporary_bytes(self, batch: int, context: int, tokens: int = CHUNK) -> int:
        """What is held for a moment while `tokens` of each prompt are read; an estimate.

        The largest matrix decoded to 16 bits; of each token four vectors of the model's width and
        two of the widest layer's in float32, or, of each expert that it goes to, two and one of
        these in 16 bits; logits of one token a sequence.
        """
        config, largest, widest, of_experts = self.config, 0, 0, 0
        for entry in self.weights.entries:
            if len(entry.shape) < 2 or not entry.path.endswith("kernel"):
                continue
            k, n = entry.shape[-2:]
            largest = max(largest, k * n if entry.quantized else 0)
            if entry.kind == "routed experts":
                of_experts = max(of_experts, n)
            elif entry.kind != "head":
                widest = max(widest, n)
        placement = self.model.placement
        axes = placement.head_axes(self.model.lm_head is None)
        logits = 8 * config.vocab_size // shards(placement.mesh, axes)
        rows = batch // self.rows_apart
        count, width = rows * min(tokens, context), config.hidden_size
        picked = 0 if config.moe is None else config.moe.top_k
        a_token = max(4 * (4 * width + 2 * widest), 2 * picked * (2 * width + of_experts))
        return 2 * largest + count * a_token + rows * logits

    def step(self, batch: int, context: int) -> Step:
        """What one device does for a token of each sequence, at the full context."""
        rows, moe = batch // self.rows_apart, self.config.moe
        read, multiplied = float(self.cache_bytes(batch, context)), 0.0
        tied = self.model.lm_head is None
        for kind, entries in self.weights.by_kind().items():
            held = sum(entry.bytes for entry in entries)
            numbers = sum(entry.parameters for entry in entries)
            if kind == "routed experts" and moe is not None:
                groups = self._groups_of_experts()
                read += held * share_of_experts(moe.num_experts, moe.top_k, rows, groups)
                multiplied += 2 * numbers * rows * moe.top_k / moe.num_experts
            elif kind == "embeddings" and not tied:
                read += held * min(1.0, rows / self.config.vocab_size)
            else:
                read += held
                multiplied += 2 * numbers * rows
        heads = shards(self.model.placement.mesh, self.model.placement.cache_axes)
        multiplied += rows * attention_products(self.config, context) / heads
        sums = tuple(sums_over_devices(self.model, 4.0 * rows * self.config.hidden_size, rows))
        layers = self.config.num_layers
        return Step(read_bytes=read, multiplications=multiplied, sums=sums, layers=layers)

    def _groups_of_experts(self) -> int:
        placement = self.model.placement
        cuts = (c for path, c in placement.cuts if path.endswith("experts.down_proj.kernel"))
        axes = next((cut.axes[0] for cut in cuts if len(cut.axes) == 3), ())
        return shards(placement.mesh, axes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DevicePlan:
    """A model on the devices of a mesh: bytes of each, and what the GPU allows.

    Attributes:
      model, scheme: as they were given.
      mesh: sizes of its axes.
      context, batch, cache: tokens and sequences in the cache, and its format.
      weight_bytes, cache_bytes, temporary_bytes: of one device; the last is an estimate, of the
        moment in which prompts are read, or what was compiled holds.
      gpu: None where none was named.
      time: of one step at the full context.
      largest_batch: that still fits; 0 where none does.
      largest_batch_time: of a step of that.
      remarks: what may not be what was meant.
    """

    model: str
    scheme: str
    mesh: dict[str, int]
    context: int
    batch: int
    cache: str
    weight_bytes: int
    cache_bytes: int
    temporary_bytes: int
    gpu: Gpu | None = None
    time: StepTime | None = None
    largest_batch: int | None = None
    largest_batch_time: StepTime | None = None
    remarks: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Of one device."""
        return self.weight_bytes + self.cache_bytes + self.temporary_bytes

    @property
    def usable_bytes(self) -> int | None:
        """Of the GPU's memory."""
        return None if self.gpu is None else usable_bytes(self.gpu.name)

    @property
    def fits(self) -> bool | None:
        """Whether a device has the memory; None where no GPU was named."""
        return None if self.usable_bytes is None else self.total_bytes <= self.usable_bytes

    @property
    def tokens_per_second(self) -> float | None:
        """Of all sequences together, at the roofline."""
        return None if self.time is None else self.batch / self.time.total

    def cells(self) -> tuple[str, ...]:
        """One row of a table, see `COLUMNS`."""
        sizes = (self.weight_bytes, self.cache_bytes, self.temporary_bytes, self.total_bytes)
        row = ("" if self.gpu is None else self.gpu.name, self.scheme, *map(in_units, sizes))
        if self.gpu is None:
            return (*row, "", "", "")
        most, best = self.largest_batch or 0, self.largest_batch_time
        return (
            *row,
            f"{self.tokens_per_second:,.0f}" if self.fits else "too large",
            str(most),
            "" if best is None else f"{most / best.total:,.0f}",
        )

    def spent(self) -> str:
        """Where the time of a step goes, for people."""
        if self.time is None:
            return ""
        parts = [f"{name} {1e3 * s:.2f}" for name, s in dataclasses.asdict(self.time).items()]
        return f"a step at the full context: {', '.join(parts)} ms; the longest: {self.time.bound}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("time", "largest_batch_time"):
            if (time := fields[name]) is not None:
                fields[name] = {**dataclasses.asdict(time), "total": time.total}
        derived = ("total_bytes", "usable_bytes", "fits", "tokens_per_second")
        fields |= {name: getattr(self, name) for name in derived}
        gpu = None if self.gpu is None else self.gpu.name
        return {**fields, "gpu": gpu, "remarks": list(self.remarks)}

    def __str__(self) -> str:
        lines = [aligned([COLUMNS, self.cells()], right=range(2, 9)), self.spent(), *self.remarks]
        return "\n".join(filter(None, lines))


COLUMNS = (
    "gpu", "scheme", "weights", "cache", "temp.", "all", "tok/s", "batch", "tok/s",
)  # fmt: skip
"""The last two: the largest batch that fits, and its speed."""


def device_plan(
    model: Any,
    scheme: Any,
    *,
    mesh: dict[str, int] | None = None,
    gpu: str | None = None,
    context: int = 4096,
    batch: int = 1,
    rules: Rules = DEFAULT,
    compat: str | None = None,
) -> DevicePlan:
    """Bytes of each device of a mesh, what fits, and tokens a second at the roofline.

    Arguments are those of `fdq.plan`, and `mesh`, the sizes of its axes (`{"tensor": 8}`, one
    device where not given; they need not be there), `gpu`, a name in
    `pallas_kernels.aot.gpu_targets.GPUS`, and `rules`, which say what is cut over which axes.

    Raises:
      ValueError: as `fdq.plan` and `fdq.shard`: what a mesh does not divide.
    """
    where = abstract_mesh(mesh or ONE_DEVICE)
    sharded = Sharded.of(model, scheme, where, rules=rules, compat=compat)
    return of_sharded(sharded, gpu=gpu, context=context, batch=batch)


def of_sharded(
    sharded: Sharded,
    *,
    gpu: str | None = None,
    context: int = 4096,
    batch: int = 1,
    temporary_bytes: int | None = None,
) -> DevicePlan:
    """`device_plan` of a model that is cut already; `temporary_bytes` replaces the estimate."""
    if context < 1 or batch < 1:
        raise ValueError(f"`context` (={context}) and `batch` (={batch}) must be positive.")
    remarks, most = sharded.remarks, sharded.config.max_position
    if context > most:
        remarks += (limits.beyond_positions("context", context, most),)
    if sharded.devices > 8:
        remarks += ("More than 8 devices: links of one machine are counted, networks are slower.",)
    target = None if gpu is None else find(gpu)
    usable = None if target is None else usable_bytes(target.name)
    chunk = sharded.chunk(batch, context, usable)
    estimate = sharded.temporary_bytes(batch, context, chunk)
    held = estimate if temporary_bytes is None else temporary_bytes
    plan = DevicePlan(
        model=sharded.name,
        scheme=sharded.scheme,
        mesh=dict(sharded.model.placement.mesh.shape),
        context=context,
        batch=batch,
        cache=cache_name(sharded.recipe.cache),
        weight_bytes=sharded.weights.bytes,
        cache_bytes=sharded.cache_bytes(batch, context),
        temporary_bytes=held,
        remarks=remarks,
    )
    if target is None or usable is None:
        return plan

    def time(batch: int) -> StepTime:
        bandwidth = target.measured_bandwidth or target.bandwidth
        step = sharded.step(batch, context)
        return step_time(step, bandwidth=bandwidth, link=LINKS[target.name])

    plan = dataclasses.replace(plan, gpu=target, time=time(batch))
    most = _largest_batch(sharded, context, usable - (held - estimate))
    best = time(most) if most else None
    return dataclasses.replace(plan, largest_batch=most, largest_batch_time=best)


def usable_bytes(gpu: str) -> int:
    """Of the memory of a GPU."""
    return int(USABLE * find(gpu).memory_bytes)


def _largest_batch(sharded: Sharded, context: int, usable: int) -> int:
    """Cache and temporaries grow by as much with each sequence; with the last, chunks are least."""
    unit = sharded.rows_apart

    def needed(batch: int) -> int:
        return sharded.cache_bytes(batch, context) + sharded.temporary_bytes(batch, context)

    one, two = needed(unit), needed(2 * unit)
    room = usable - sharded.weights.bytes - one
    return 0 if room < 0 else unit * (1 + room // (two - one))


def _together(notes: tuple[str, ...]) -> Iterator[str]:
    """Notes of layers alike as one."""
    for _, cells in folded([tuple(note.split(": ", 1)) for note in notes]):
        yield ": ".join(cells)


def _local(leaf: Any) -> Any:
    """The part of an abstract array that one device has."""
    sharding = leaf.sharding
    if not isinstance(sharding, NamedSharding):
        return leaf
    return jax.ShapeDtypeStruct(sharding.shard_shape(leaf.shape), leaf.dtype)


def _with(mesh: Any) -> Callable[[Any, PartitionSpec], Any]:
    def place(leaf: Any, spec: PartitionSpec) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return place
