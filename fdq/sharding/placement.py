"""A model on a mesh: where its tensors lie, and programs over all devices.

A program is written for one model. `Placement.run` calls it in one `jax.shard_map` with the model
that each device has: fewer heads, channels, experts and tokens of the vocabulary, and the axes
over which its sums are to be added up.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fdq import nn, processes
from fdq.cache.kv_cache import KVCache
from fdq.formats.qtensor import QTensor, QuantizedWeight
from fdq.nn.experts import ExpertShard
from fdq.nn.parameters import Template, bind, current_split, value
from fdq.ops.activation import ShardedRows
from fdq.schemes.mesh_rules import Rules, as_set, explicit_twin, shards
from fdq.sharding import layout
from fdq.sharding.cut import Axes, Cut, partition
from fdq.text_table import aligned, folded


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """How a model lies on a mesh: static, an attribute of `fdq.models.Decoder`.

    Attributes:
      mesh: of Auto axes, over the devices and with the names of the user's.
      rules: by which it was cut.
      cuts: of each tensor that is cut, by dotted path.
      notes: what stayed whole, and why.
    """

    mesh: Mesh
    rules: Rules
    cuts: tuple[tuple[str, Cut], ...]
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def _key(self) -> tuple[Any, ...]:
        return self.mesh, self.rules, self.cuts

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self._key)

    def __hash__(self) -> int:
        """Kept: there are hundreds of cuts."""
        return self._hash

    def __eq__(self, other: object) -> bool:
        """Whether the cuts are the same, on the same mesh."""
        if self is other:
            return True
        return isinstance(other, Placement) and self._key == other._key

    @functools.cached_property
    def of(self) -> dict[str, Cut]:
        """The cuts by path."""
        return dict(self.cuts)

    def axes(self, kind: str) -> Axes:
        """Mesh axes of a kind of the rules."""
        return self.rules.axes(kind, self.mesh)

    def batch_axes(self, batch: int) -> Axes:
        """Those that sequences are cut over; none where these do not divide."""
        axes = self.axes("batch")
        return axes if batch % shards(self.mesh, axes) == 0 else ()

    def __str__(self) -> str:
        """What is cut over which axes, layers alike in one row."""
        rows = []
        for path, cut in self.cuts:
            held = [
                f"{name} over {' x '.join(f'{a}={self.mesh.shape[a]}' for a in axes)}"
                for name, axes in zip(_NAMES[-len(cut.axes) :], cut.axes, strict=True)
                if axes
            ]
            often = max(cut.dealt.repeats, default=1) if cut.dealt is not None else 1
            note = f"each KV head on {often} devices" if often > 1 else ""
            if cut.spec is not None:
                note = "scales of blocks repeated"
            rows.append((path, cut.kind, ", ".join(held), note))
        lines = [("tensor", "kind", "cut", "")]
        lines += [row for _, row in folded(rows)]
        shape = ", ".join(f"{name}={size}" for name, size in self.mesh.shape.items())
        table = aligned([tuple(cell for cell in row) for row in lines])
        return "\n".join([f"mesh {shape}", table, *self.notes])

    def run(
        self,
        model: Any,
        program: Callable[..., Any],
        rows: tuple[Any, ...],
        *,
        whole: tuple[Any, ...] = (),
        settings: tuple[Any, ...] = (),
        out: tuple[Any, ...],
    ) -> Any:
        """`program(model, *rows, *whole, *settings)`, each device with what it has of all this.

        Args:
          model: a placed `fdq.models.Decoder`.
          program: a function of a module, not a closure.
          rows: pytrees whose arrays have the sequences in front, and KV caches.
          whole: pytrees that every device has.
          settings: hashable.
          out: of each result, the number of the argument in `rows` that it is laid out like, or
            `"rows"`, or `"logits"`. One result that is no tuple where there is one.
        """
        template, params = current_split(model)
        return _run(self, template, program, settings, out, params, rows, whole)

    def localized(self, template: Template, params: dict) -> Any:
        """The model that one device has, of its own arrays; inside `jax.shard_map`."""
        model = bind(template, params)
        model.placement = None
        for keys, module in nnx.iter_modules(model):
            self._localize(".".join(map(str, keys)), module)
        model.vocabulary_axes = self.head_axes(model.lm_head is None)
        return model

    def head_axes(self, tied: bool) -> Axes:
        """Mesh axes that the vocabulary of logits is cut over."""
        cut = self.of.get(_TABLE if tied else "lm_head.kernel")
        return () if cut is None else next(axes for axes in cut.axes if axes)

    @functools.cached_property
    def cache_axes(self) -> Axes:
        """Mesh axes that the heads of a KV cache are cut over."""
        ends = ".self_attn.o_proj.kernel"
        return next((cut.axes[-2] for path, cut in self.cuts if path.endswith(ends)), ())

    @property
    def cache_settings(self) -> dict[str, Any]:
        """What `KVCache.init` is told of the mesh."""
        rules = self.rules if self.cache_axes else dataclasses.replace(self.rules, heads=None)
        return {"mesh": self.mesh, "mesh_rules": rules}

    def cache_scales(self, scales: Any) -> Any:
        """Static scales of a cache, each KV head once: the model's are as often as it is held."""
        cut = next((c for p, c in self.cuts if p.endswith(("k_cache_scale", "k_cache_mean"))), None)
        often = 1 if cut is None or cut.dealt is None else max(cut.dealt.repeats, default=1)
        if scales is None or often == 1:
            return scales
        return [None if s is None else jax.tree.map(lambda a: a[::often], s) for s in scales]

    def _localize(self, path: str, module: Any) -> None:
        def rows(name: str) -> Axes:
            cut = self.of.get(f"{path}.{name}.kernel")
            return () if cut is None else cut.axes[-2]

        kind = type(module)
        if kind in (nn.Attention, nn.LatentAttention) and (axes := rows("o_proj")):
            n = shards(self.mesh, axes)
            module.num_heads //= n
            if kind is nn.Attention:
                module.num_kv_heads = max(1, module.num_kv_heads // n)
            _cut_rows(module.o_proj, axes)
        elif kind is nn.MLP and (axes := rows("down_proj")):
            module.intermediate_size //= shards(self.mesh, axes)
            _cut_rows(module.down_proj, axes)
        elif kind is nn.Experts and (cut := self.of.get(f"{path}.down_proj.kernel")):
            lead, inner, _ = cut.axes
            shared = self.of.get(f"{path.removesuffix('experts')}shared_experts.down_proj.kernel")
            module.part = ExpertShard(lead, inner, () if shared is None else shared.axes[-2])
            down = module.down_proj
            module.gate_up_proj.shard = down.shard = bool(lead)
            down.out_dtype = jnp.float32
            if down.bias is not None:
                down.bias = _first_only(value(down.bias), inner)
        elif kind is nn.Embedding and path == "embed_tokens" and (cut := self.of.get(_TABLE)):
            module.vocabulary_axes = cut.axes[0]

    def put(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Rows (see `run`) on the devices where they belong; of abstract ones their shardings."""
        n = shards(self.mesh, self.cache_axes)
        for cache in jax.tree.leaves(arguments, is_leaf=lambda leaf: isinstance(leaf, KVCache)):
            if isinstance(cache, KVCache) and any(
                t.shape[1] > 1 and t.shape[1] % n for layer in cache.layers for t in layer
            ):
                raise ValueError(
                    f"KV cache: {cache.layers[0].k.shape[1]} heads for {n} devices. Make it with "
                    "model.init_cache(...), or fdq.KVCache.init(..., mesh=mesh)."
                )

        mesh = as_set(self.mesh)

        def put(array: Any, spec: PartitionSpec) -> Any:
            where = NamedSharding(mesh, spec)
            if isinstance(array, jax.ShapeDtypeStruct):
                return array.update(sharding=where)
            return processes.onto(array, where)

        return jax.tree.map(put, arguments, self._row_specs(arguments))

    def _row_specs(self, rows: Any) -> Any:
        batch = self.batch_axes(_batch(rows))
        heads = self.cache_axes

        def spec(leaf: Any) -> Any:
            if isinstance(leaf, KVCache):
                return leaf.partition(_entry(batch), _entry(heads))
            return PartitionSpec(*[_entry(batch)][: np.ndim(leaf)])

        return jax.tree.map(spec, rows, is_leaf=lambda leaf: isinstance(leaf, KVCache))

    def param_specs(self, template: Template, params: dict) -> dict:
        """Where the arrays of a model lie, in the structure of `params`."""
        specs: dict = {}
        for path in template.paths:
            leaf, node = params, specs
            for key in path[:-1]:
                leaf, node = leaf[key], node.setdefault(key, {})
            leaf, cut = leaf[path[-1]], self.of.get(".".join(path))
            if cut is None:
                node[path[-1]] = jax.tree.map(lambda _: PartitionSpec(), leaf)
            elif isinstance(leaf, QTensor):
                node[path[-1]] = layout.of_arrays(leaf, cut)
            elif isinstance(leaf, QuantizedWeight):
                node[path[-1]] = jax.tree.map(lambda _, c=cut: layout.of_prepared(c), leaf)
            else:
                node[path[-1]] = partition(cut.axes)
        return specs


_TABLE = "embed_tokens.embedding"
_NAMES = ("E", "K", "N")


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _run(
    placement: Placement,
    template: Template,
    program: Callable[..., Any],
    settings: tuple[Any, ...],
    out: tuple[Any, ...],
    params: dict,
    rows: tuple[Any, ...],
    whole: tuple[Any, ...],
) -> Any:
    specs = placement._row_specs(rows)
    tied = not any(path[0] == "lm_head" for path in template.paths)
    batch = _entry(placement.batch_axes(_batch(rows)))
    vocabulary = _entry(placement.head_axes(tied))

    def spec_of(one: Any) -> Any:
        if isinstance(one, int):
            return specs[one]
        if one == "rows":
            return PartitionSpec(batch)
        return PartitionSpec(batch, *[None] * (one[1] - 2), vocabulary)

    def local(params: dict, rows: tuple[Any, ...], whole: tuple[Any, ...]) -> Any:
        model = placement.localized(template, params)
        return program(model, *rows, *whole, *settings)

    outs: Any = tuple(map(spec_of, out))
    run = jax.shard_map(
        local,
        mesh=placement.mesh,
        in_specs=(placement.param_specs(template, params), specs, PartitionSpec()),
        out_specs=outs if len(outs) > 1 else outs[0],
        check_vma=False,
    )
    current, own = jax.sharding.get_abstract_mesh(), placement.mesh.abstract_mesh
    arguments = params, rows, whole
    if current == own or (current.empty and not any(map(_is_explicit, jax.tree.leaves(arguments)))):
        return run(*arguments)
    # The user's own mesh, which `jax.set_mesh` made the current one, has Explicit axes.
    with jax.sharding.use_abstract_mesh(own):
        made = run(*jax.tree.map(_on_auto_axes, arguments))
    if not explicit_twin(current, own):
        return made

    def seen(spec: PartitionSpec, tree: Any) -> Any:
        where = NamedSharding(current, spec)
        return jax.tree.map(lambda array: jax.sharding.reshard(array, where), tree)

    return jax.tree.map(seen, outs if len(outs) > 1 else outs[0], made)


def _entry(axes: Axes) -> Any:
    return None if not axes else axes[0] if len(axes) == 1 else axes


def _on_auto_axes(array: jax.Array) -> jax.Array:
    """An array whose type says how it lies, as one that may be moved to where it belongs."""
    return jax.sharding.reshard(array, PartitionSpec()) if _is_explicit(array) else array


def _is_explicit(array: jax.Array) -> bool:
    return AxisType.Explicit in jax.typeof(array).sharding.mesh.axis_types


def _batch(rows: Any) -> int:
    for leaf in jax.tree.leaves(rows, is_leaf=lambda leaf: isinstance(leaf, KVCache)):
        if isinstance(leaf, KVCache):
            return leaf.batch
        if np.ndim(leaf):
            return leaf.shape[0]
    return 1


def _cut_rows(layer: nn.Linear, axes: Axes) -> None:
    layer.sum_axes = axes
    layer.activation = ShardedRows.of(layer.activation, axes)


def _first_only(bias: jax.Array, axes: Axes) -> nnx.Variable:
    for name in axes:
        bias = jnp.where(jax.lax.axis_index(name) == 0, bias, jnp.zeros_like(bias))
    return nnx.Param(bias)
