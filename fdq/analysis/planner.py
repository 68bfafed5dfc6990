"""How many bytes a model takes under a scheme, from shapes alone.

`plan` builds the model of a configuration abstractly, quantizes the shapes with the same code that
quantizes arrays, and adds up what the result holds, by kind of layer.
"""

import dataclasses
import difflib
import json
import math
import os
import pathlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fdq.cache import limits
from fdq.cache.kv_cache import KVCache, LayerScales, abstract_scales
from fdq.formats.qtensor import QuantizedWeight
from fdq.models import CONFIGS, DecoderConfig, abstract, abstract_layer, from_huggingface
from fdq.nn.parameters import value
from fdq.quantizers.quantization import match_table, quantize
from fdq.schemes.path_pattern import path_keys
from fdq.schemes.recipe import Recipe
from fdq.schemes.scheme import CacheSpec
from fdq.text_table import aligned

# The order of the printed table.
KINDS = (
    "embeddings", "attention", "dense mlp", "shared experts", "routed experts", "router", "norms",
    "head", "other",
)  # fmt: skip
# First match wins; the fragments are those of the paths in `fdq.models`.
_KIND_OF_FRAGMENT = (
    ("embed_tokens", "embeddings"),
    ("lm_head", "head"),
    ("router", "router"),
    ("norm", "norms"),
    ("shared_experts", "shared experts"),
    ("experts", "routed experts"),
    ("self_attn", "attention"),
    ("mlp", "dense mlp"),
)


@dataclasses.dataclass(frozen=True)
class WeightEntry:
    """One weight of a model, its `kind` one of `KINDS`; `bytes` are held, scales included.

    `format` is that of the codes ("int4"), or the dtype of a weight that is not quantized; `shape`
    is that of the weight that it stands for.
    """

    path: str
    kind: str
    format: str
    quantized: bool
    shape: tuple[int, ...]
    bytes: int

    @property
    def parameters(self) -> int:
        """Elements of the weight that it stands for."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class WeightTable:
    """All weights of a model, in the order of its tree."""

    entries: tuple[WeightEntry, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all weights."""
        return sum(e.bytes for e in self.entries)

    @property
    def parameters(self) -> int:
        """Elements of all weights."""
        return sum(e.parameters for e in self.entries)

    @property
    def bits_per_weight(self) -> float | None:
        """Of all weights, scales included; None where there are none."""
        return _bits(self.entries)

    @property
    def quantized_bits_per_weight(self) -> float | None:
        """Of the quantized weights, scales included; None where none is."""
        return _bits([entry for entry in self.entries if entry.quantized])

    def by_kind(self) -> dict[str, tuple[WeightEntry, ...]]:
        """The entries by kind of layer, in the order of `KINDS`, kinds without entries left out."""
        groups = {kind: tuple(e for e in self.entries if e.kind == kind) for kind in KINDS}
        return {kind: entries for kind, entries in groups.items() if entries}


def kind_of(path: str) -> str:
    """The kind of layer, one of `KINDS`, that a dotted path of a model belongs to."""
    return next((kind for part, kind in _KIND_OF_FRAGMENT if part in path), "other")


def _bits(entries: Sequence[WeightEntry]) -> float | None:
    parameters = sum(entry.parameters for entry in entries)
    return 8 * sum(entry.bytes for entry in entries) / parameters if parameters else None


def weight_table(tree: Any) -> WeightTable:
    """What each weight of a module or params pytree stands for and holds.

    Leaves may be arrays or ShapeDtypeStructs; a Variable that occurs twice is counted once.
    """
    seen: set[int] = set()
    entries = []
    leaves = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: isinstance(x, QuantizedWeight | nnx.Variable)
    )[0]
    for key, leaf in leaves:
        path = ".".join(map(str, path_keys(key)))
        if isinstance(leaf, QuantizedWeight):
            # A prepared weight's codes may be a pytree.
            arrays = jax.tree.leaves([value(a) for a in leaf.arrays().values()])
            shape, kind_of_format = tuple(leaf.shape), leaf.spec.format
        else:
            arrays = [value(leaf)]
            if isinstance(leaf, nnx.RngState) or not hasattr(arrays[0], "dtype"):
                continue
            shape, kind_of_format = tuple(arrays[0].shape), str(arrays[0].dtype)
        if id(arrays[0]) in seen:
            continue
        seen.add(id(arrays[0]))
        entries.append(
            WeightEntry(
                path=path,
                kind=kind_of(path),
                format=kind_of_format,
                quantized=isinstance(leaf, QuantizedWeight),
                shape=shape,
                bytes=sum(math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for a in arrays),
            )
        )
    return WeightTable(tuple(entries))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a model takes under a scheme, for `batch` sequences of `context` tokens in the cache.

    `cache` is the name of the cache's format, `cache_bytes` those of the whole, scales included;
    `remarks` say what may not be what was meant, such as more tokens than the model has positions.
    """

    model: str
    scheme: str
    weights: WeightTable
    context: int
    batch: int
    cache: str
    cache_bytes: int
    remarks: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Weights and cache."""
        return self.weights.bytes + self.cache_bytes

    def rows(self) -> list[tuple[str, int, int, str]]:
        """(kind, parameters, bytes, formats) of each kind of layer."""
        return [
            (
                kind,
                sum(e.parameters for e in entries),
                sum(e.bytes for e in entries),
                ", ".join(sorted({e.format for e in entries})),
            )
            for kind, entries in self.weights.by_kind().items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """The totals and the rows by kind, for JSON."""
        kinds = {
            kind: {"parameters": parameters, "bytes": size, "formats": formats.split(", ")}
            for kind, parameters, size, formats in self.rows()
        }
        return {
            "model": self.model,
            "scheme": self.scheme,
            "weights": {
                "parameters": self.weights.parameters,
                "bytes": self.weights.bytes,
                "bits_per_weight": self.weights.bits_per_weight,
                "quantized_bits_per_weight": self.weights.quantized_bits_per_weight,
                "kinds": kinds,
            },
            "cache": {
                "format": self.cache,
                "context": self.context,
                "batch": self.batch,
                "bytes": self.cache_bytes,
            },
            "total_bytes": self.total_bytes,
            "remarks": list(self.remarks),
        }

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def lines(self, size: Callable[[int], str]) -> list[tuple[str, ...]]:
        """(kind, parameters, bytes, bits/weight, formats) as text; `size` writes bytes."""
        quantized = [entry for entry in self.weights.entries if entry.quantized]
        totals = [("all weights", self.weights.parameters, self.weights.bytes, "")]
        if quantized:
            counts = (sum(e.parameters for e in quantized), sum(e.bytes for e in quantized))
            totals.insert(0, ("quantized weights", *counts, ""))
        lines = [
            (kind, f"{parameters:,}", size(held), f"{8 * held / parameters:.3f}", formats)
            for kind, parameters, held, formats in [*self.rows(), *totals]
        ]
        cached = f"{self.cache}, {self.batch} x {self.context:,} tokens"
        lines.append(("cache", "", size(self.cache_bytes), "", cached))
        return [*lines, ("total", "", size(self.total_bytes), "", "")]

    def __str__(self) -> str:
        heading = ("kind", "parameters", "bytes", "bits/weight", "formats")
        lines = aligned([heading, *self.lines("{:,}".format)], right={1, 2, 3})
        return "\n".join([f"{self.model} in {self.scheme}", lines, *self.remarks])


def plan(
    model: Any, scheme: Any, *, context: int = 4096, batch: int = 1, compat: str | None = None
) -> Plan:
    """Bytes of a model's weights by kind of layer and of its cache, before anything is loaded.

    Args:
      model: a name in `fdq.models.CONFIGS` ("ernie-4.5-300b-a47b"), a `DecoderConfig`, or a
        directory with a Hugging Face config.json (weights need not be there).
      scheme: scheme name, `Scheme`, `Recipe`, or FastDeploy's `quantization_config` as a dict.
      context: tokens in the cache of each sequence.
      batch: sequences.
      compat: "fastdeploy" for its layer rules, as in `fdq.quantize`.

    Raises:
      ValueError: an unknown model or scheme name (with the nearest one), a context or batch that
        is not positive, or a group size that does not divide a weight.
      TypeError: no model at all.

    Example:
      >>> print(fdq.plan("ernie-4.5-21b-a3b", "W4A16C8", context=32768))  # doctest: +SKIP
    """
    if context < 1 or batch < 1:
        raise ValueError(f"`context` (={context}) and `batch` (={batch}) must be positive.")
    name, config = find_config(model)
    recipe = Recipe.parse(scheme, compat=compat, has_experts=config.moe is not None)
    config = config.replace(dtype="bfloat16")
    model = abstract(config)
    quantized = quantize(model, recipe, compat=compat)
    remarks = match_table(model, recipe, compat=compat).remarks
    if context > config.max_position:
        remarks += (limits.beyond_positions("context", context, config.max_position),)
    return Plan(
        model=name,
        scheme=scheme if isinstance(scheme, str) else str(recipe),
        weights=weight_table(quantized),
        context=context,
        batch=batch,
        cache=cache_name(recipe.cache),
        cache_bytes=cache_bytes(config, recipe.cache, batch=batch, context=context),
        remarks=remarks,
    )


def cache_bytes(config: DecoderConfig, cache: CacheSpec | None, *, batch: int, context: int) -> int:
    """Bytes of a cache of `context` tokens for `batch` sequences, scales included; None is C16."""
    static = abstract_scales(config, cache) if cache and cache.calibrated else None

    def init(scales: list[LayerScales] | None) -> KVCache:
        return KVCache.init(config, batch, context, cache, scales=scales)

    return jax.eval_shape(init, static).nbytes


def cache_bytes_per_token(config: DecoderConfig, cache: CacheSpec | None) -> float:
    """Bytes that one token adds to the cache of one sequence, over all layers."""
    low, high = (cache_bytes(config, cache, batch=1, context=n) for n in (128, 256))
    return (high - low) / 128


def cache_name(cache: CacheSpec | None) -> str:
    """The name of a cache's format: "C16", "C8", "C4", "Cfp8-kvhead"."""
    return "C16" if cache is None else str(cache)


def known_models() -> dict[str, dict[str, Any]]:
    """Family, parameters, layers and positions of each model in `fdq.models.CONFIGS`, by name."""
    return {
        name: {
            "family": config.model_type,
            "parameters": parameter_count(config),
            "layers": config.num_layers,
            "max_position": config.max_position,
        }
        for name, config in CONFIGS.items()
    }


def parameter_count(config: DecoderConfig) -> int:
    """Parameters of `abstract(config)`, from one abstract layer of each kind: many times sooner."""
    kinds: dict[Hashable, list[int]] = {}
    for layer in range(config.num_layers):
        kinds.setdefault(config.block.layer_kind(config, layer), []).append(layer)
    rest = weight_table(abstract(config.replace(num_layers=0))).parameters
    return rest + sum(
        len(layers) * weight_table(abstract_layer(config, layers[0])).parameters
        for layers in kinds.values()
    )


def find_config(model: Any) -> tuple[str, DecoderConfig]:
    """(name, configuration) of what `plan` was given."""
    if isinstance(model, DecoderConfig):
        return model.model_type, model
    if isinstance(model, str) and model.lower() in CONFIGS:
        return model.lower(), CONFIGS[model.lower()]
    if not isinstance(model, str | os.PathLike):
        hint = "; that of a model is model.config" if hasattr(model, "config") else ""
        raise TypeError(
            "plan: expected the name of a model, a DecoderConfig or a directory, found a "
            f"{type(model).__name__}{hint}."
        )
    directory = pathlib.Path(model)
    path = directory / "config.json"
    if path.is_file():
        try:
            config = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not valid JSON: {error}") from error
        return directory.name, from_huggingface(config)
    name = str(model).lower()
    near = [known for known in CONFIGS if name and known.startswith(name)]
    near = near or difflib.get_close_matches(name, CONFIGS, n=1, cutoff=0.3)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"Unknown model {str(model)!r}: neither a directory with a config.json nor one of "
        f"{', '.join(CONFIGS)}.{hint}"
    )
