"""Models that other tools quantized: their codes and scales become fdq's, and are not made again.

A fused layer of fdq joins several of theirs. Parts that have nothing in common, say q and k in
codes and v in floats, are decoded, and the layer stays in floats.
"""

import collections
import dataclasses
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from fdq import models
from fdq.formats.qtensor import QTensor
from fdq.quantizers.quantization import quantize
from fdq.schemes.recipe import Recipe
from fdq.schemes.scheme import ActivationSpec, Scheme, WeightSpec
from fdq_checkpoints import tree_paths
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.readers import strict_json
from fdq_checkpoints.readers.local_directory import tell_of_adapters
from fdq_checkpoints.readers.source_directory import MAX_CONFIG_BYTES, SourceDirectory
from fdq_checkpoints.sources import float_model
from fdq_checkpoints.sources.bitsandbytes import BitsAndBytes
from fdq_checkpoints.sources.codec import Codec, Section
from fdq_checkpoints.sources.compressed_tensors import CompressedTensors
from fdq_checkpoints.sources.fastdeploy import FastDeploy
from fdq_checkpoints.sources.float8_blocks import Float8
from fdq_checkpoints.sources.gemma import Gemma
from fdq_checkpoints.sources.gptq import Awq, Gptq
from fdq_checkpoints.sources.hqq import Hqq
from fdq_checkpoints.sources.linear_names import LinearNames
from fdq_checkpoints.sources.mlx import Mlx
from fdq_checkpoints.sources.modelopt import ModelOpt
from fdq_checkpoints.sources.mxfp4 import Mxfp4
from fdq_checkpoints.sources.quantized_release import QuantizedRelease
from fdq_checkpoints.sources.source import Source
from fdq_checkpoints.sources.stored_cache import StoredCache
from fdq_checkpoints.sources.stored_weight import Linear, StoredWeight
from fdq_checkpoints.sources.tensor_names import laid_out
from fdq_checkpoints.sources.torchao import TorchAo
from fdq_checkpoints.tree_paths import Path, dotted

_INPUT_SCALE = "activation_scale"
_OF_CACHES = (".k_scale", ".v_scale", "k_matmul.activation_scale", "v_matmul.activation_scale")
_SAY_CACHES = ("kv_cache_scheme", "kv_cache_quant_algo", "kv_cache_quant_type")
_LOGGER = logging.getLogger("fdq")

CODECS: dict[str, type[Codec]] = {
    method: codec
    # FastDeploy's names are those of others too, which come after it.
    for codec in (
        *(FastDeploy, Gptq, Awq, CompressedTensors, Float8, BitsAndBytes, ModelOpt),
        *(Mxfp4, Mlx, Hqq, TorchAo, Gemma),
    )
    for method in codec.methods
}


class QuantizedModel(Source):
    """A directory of another tool's codes, seen as a quantized fdq model."""

    def __init__(
        self, names: Any, model: models.Decoder, parts: Any, release: QuantizedRelease | str | None
    ):
        self.release: QuantizedRelease | str | None = release
        self.folder, self.config = names.path, model.config
        self._names, self._parts = names, parts
        self._model = model
        self._tell()
        self._specs = {path: spec for path in parts if (spec := self._spec(path)) is not None}
        schemes, cache = self._schemes(), names.cache(model.config)
        self._cache = cache if isinstance(cache, StoredCache) else None
        recipe = _recipe(model, schemes) if schemes else Recipe()
        if cache is not None:
            spec = cache.spec if isinstance(cache, StoredCache) else cache
            recipe = Recipe(recipe.rules, recipe.default, cache=spec)
        self.tree = quantize(model, recipe) if schemes or cache is not None else model

    def _linears(self, path: Path) -> list[list[Linear | None]]:
        """By expert (or once), the parts of a target."""
        found = [[self._names.linear(name) for name in names] for names in self._parts[path].parts]
        first = found[0][0]
        if first is None or first.experts is None:
            return found
        return [[one] for one in first.each()]

    def _spec(self, path: Path) -> Any:
        experts = self._linears(path)
        flat = [linear for parts in experts for linear in parts]
        if all(linear is None for linear in flat):
            return None
        if any(linear is not None and linear.input_factor for linear in flat):
            return None
        specs = {
            None if None in parts else self._names.joined_spec([x for x in parts if x is not None])
            for parts in experts
        }
        specs = _with_order(specs)
        if (
            self._is_linear(path)
            and len(specs) == 1
            and None not in specs
            and len(self._activations(path)) < 2
        ):
            return specs.pop()
        why = "is stored in different ways that one layer of fdq cannot hold"
        if not self._is_linear(path):
            why = "has codes, which fdq holds in floats"
        _LOGGER.warning(
            "%s: %s %s; it is decoded and stays in floats.", self.folder, dotted(path), why
        )
        return None

    def _tell(self) -> None:
        """Says what of the source is left out, or otherwise than its config says."""
        self._tell_of_factors()
        self._tell_of_the_rest()

    def _tell_of_the_rest(self) -> None:
        """Scales of a cache that nobody asked for; layers in floats that nobody named."""
        names, codec = self._names, self._names.codec
        scales = [name for name in names.directory.tensors if name.endswith(_OF_CACHES)]
        if scales and not any(map(codec.section.content.get, _SAY_CACHES)):
            _LOGGER.warning(
                "%s: %s and %d more scales of a KV cache are left out: the config does not say "
                "what they are. Choose the cache, such as cache='C8'.",
                self.folder,
                scales[0],
                len(scales) - 1,
            )
        floats = [
            name.rpartition(".")[0]
            for path, source in self._parts.items()
            for parts in source.parts
            for name in parts
            if path[0] == "layers" and path[-1] == "kernel" and "router" not in path
            if names.linear(name) is None and not codec.leaves(name.rpartition(".")[0])
        ]
        if floats:
            _LOGGER.warning(
                "%s: %s and %d more layers are in floats, which the config does not say; they stay "
                "so.",
                self.folder,
                floats[0],
                len(floats) - 1,
            )

    def _tell_of_factors(self) -> None:
        linears = self._names.linears.values()
        modules = [linear.module for linear in linears if linear.input_factor]
        if modules:
            _LOGGER.warning(
                "%s: %s and %d more layers multiply channels of their input (pre_quant_scale), "
                "which fdq's do not; they are decoded and stay in floats.",
                self.folder,
                modules[0],
                len(modules) - 1,
            )

    def _is_linear(self, path: Path) -> bool:
        """Embeddings, whose rows are looked up, and routers are floats in fdq."""
        return path[-1] == "kernel" and "router" not in path

    def _activations(self, path: Path) -> set[ActivationSpec]:
        """How the input of a target's parts is quantized, where it is."""
        flat = [one for parts in self._linears(path) for one in parts if one is not None]
        return {one.activation for one in flat if one.activation is not None}

    def _schemes(self) -> dict[Path, Scheme]:
        found = {}
        for path, spec in self._specs.items():
            activation = next(iter(self._activations(path)), None)
            found[path] = Scheme(weight=spec, activation=activation)
        return found

    def decoded(self) -> Source:
        """The same model in floats, to quantize in another way."""
        return float_model.FloatModel(self._names, self._model, self._parts)

    def read(self, path: Path, index: int | None = None) -> np.ndarray | QTensor:
        """The weight at `path`, or one expert of it, in fdq's layout; or the scale of an input."""
        if path[-1] == _INPUT_SCALE:
            return self._input_scale((*path[:-1], "kernel"))
        if self._cache is not None and path[-1] in self._cache.names:
            return self._cache.read(int(path[1]), path[-1])  # layers.{i}.self_attn
        spec = self._specs.get(path)
        if spec is None:
            return self._parts[path].read(self._names, index)
        experts = self._linears(path)
        if len(self._parts[path].shape) == 2 or index is not None:
            return self._weight(path, experts[index or 0]).qtensor()
        first = self._weight(path, experts[0]).qtensor()
        arrays = {
            name: np.empty((len(experts), *array.shape), array.dtype)
            for name, array in first.arrays().items()
        }
        for i, parts in enumerate(experts):
            weight = first if i == 0 else self._weight(path, parts).qtensor()
            for name, array in weight.arrays().items():
                arrays[name][i] = array
        return first.replace(**arrays)

    def _input_scale(self, kernel: Path) -> np.ndarray:
        """The static scale of a fused layer's input: the widest of its parts and experts."""
        linears = [
            one
            for parts in self._linears(kernel)
            for one in parts
            if one is not None and one.input_scale is not None  # of experts that saw no token
        ]
        return np.asarray(max(map(self._names.input_scale, linears)), np.float32)

    def _weight(self, path: Path, parts: Sequence[Linear | None]) -> StoredWeight:
        spec = self._specs[path]
        weights = [self._names.weight(one).as_spec(spec) for one in parts if one is not None]
        joined, layout = weights[0].joined_with(weights[1:]), self._parts[path].layout
        if layout == "transposed":  # as codecs read
            return joined
        arrays = {name: laid_out(array, layout) for name, array in joined.arrays.items()}
        return dataclasses.replace(joined, codes=laid_out(joined.codes, layout), arrays=arrays)

    def companions(self) -> list[pathlib.Path]:
        """The config, tokenizer and generation files that are there."""
        return self._names.companions()

    def close(self) -> None:
        """Closes the shards."""
        self._names.close()


def _with_order(specs: set[WeightSpec | None]) -> set[WeightSpec | None]:
    """The same specs, but an order for all experts where some have their rows in one."""
    known = [spec for spec in specs if spec is not None]
    plain = {dataclasses.replace(spec, row_order=False) for spec in known}
    if len(known) < len(specs) or len(plain) > 1 or not any(spec.row_order for spec in known):
        return specs
    return {dataclasses.replace(known[0], row_order=True)}


def _recipe(model: models.Decoder, schemes: dict[Path, Scheme]) -> Recipe:
    """As short as it can be: one scheme for all, or one a kind of layer, or one a tensor."""
    (most, _), *_ = collections.Counter(schemes.values()).most_common(1)
    for recipe in (Recipe.parse(most), _by_kind(model, schemes)):
        try:
            quantized_so = quantize(model, recipe)
        except ValueError:  # of a layer that is in floats, and that it does not fit
            continue
        tensors = {tensor.path: tensor for tensor in tree_paths.flatten(quantized_so)}
        quantized = {p: t for p, t in tensors.items() if isinstance(t.value, QTensor)}
        if quantized.keys() == schemes.keys() and all(
            (quantized[path].value.spec, quantized[path].activation)
            == (scheme.weight, scheme.activation)
            for path, scheme in schemes.items()
        ):
            return recipe
    return tree_paths.exact_recipe(schemes)


def _by_kind(model: models.Decoder, schemes: dict[Path, Scheme]) -> Recipe:
    """The first scheme of each kind of layer."""
    rules: dict[str, Scheme | None] = {}
    for tensor in tree_paths.flatten(model):
        pattern = ".".join("*" if part.isdecimal() else part for part in tensor.path)
        if rules.get(pattern) is None:
            rules[pattern] = schemes.get(tensor.path)
    return Recipe([(pattern, scheme) for pattern, scheme in rules.items() if scheme is not None])


class QuantizedModels:
    """Claims what says in its config that it is quantized by a tool that fdq reads."""

    name = "model quantized by another tool"

    def claims(self, folder: pathlib.Path) -> bool:
        """By `quant_method`."""
        try:
            config = strict_json.read_object(folder / "config.json", max_bytes=MAX_CONFIG_BYTES)
            release = QuantizedRelease.of(folder, config)
        except (CheckpointError, OSError):
            return False  # who reads floats says what is wrong with it
        return release is not None and release.method.lower() in CODECS

    def open(self, folder: pathlib.Path, *, dtype: Any = None) -> QuantizedModel:
        """Looks at all names, shapes and dtypes, and reads no weights."""
        directory = SourceDirectory(folder)
        release = QuantizedRelease.of(directory.path, directory.config)
        assert release is not None
        try:
            release.check_side_files(directory.path)
            tell_of_adapters(folder)
            section = Section(release.content, release.where)
            codec = CODECS[release.method.lower()](directory, section)
            floats = directory.config.get("dtype", directory.config.get("torch_dtype"))
            stored = np.dtype(floats if floats in ("float32", "float16", "bfloat16") else "float32")
            names = LinearNames(directory, codec, stored)
            if not names.linears and not codec.floats_are_meant:
                raise CheckpointError(
                    f"{release.where}: says {release}, but no tensor holds codes."
                )
            optional = codec.unused_biases(names.linears)
            model, parts = float_model.parts_of(names, dtype, optional=optional)
            return QuantizedModel(names, model, parts, release)
        except ValueError as error:  # and what a spec finds wrong with its fields
            directory.close()
            raise CheckpointError(
                f"{release.where} ({release.method}): the weights are quantized already: {release}"
                f", and not as fdq reads them: {error} {release.advice()}"
            ) from None
        except BaseException:
            directory.close()
            raise


QUANTIZED_MODELS = QuantizedModels()
