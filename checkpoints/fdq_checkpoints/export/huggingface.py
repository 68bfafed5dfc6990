"""Directories as transformers and vLLM load them: safetensors, config.json, tokenizer."""

import abc
import collections
import dataclasses
import json
import pathlib
import re
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from fdq import models
from fdq.formats.qtensor import QTensor, dequantize
from fdq.models.config_writer import as_written, same_model, to_huggingface
from fdq.schemes.scheme import WeightSpec
from fdq_checkpoints import tree_paths
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.export import integers
from fdq_checkpoints.export.exporter import Options, Plan
from fdq_checkpoints.export.layout import Layer, Layout, Shapes, in_groups
from fdq_checkpoints.export.origin import Origin
from fdq_checkpoints.export.safetensors_writer import Planned, SafetensorsWriter
from fdq_checkpoints.readers.file_names import COMPANION_FILES, INDEX_NAME, companion_name
from fdq_checkpoints.sources import published_names, tensor_names
from fdq_checkpoints.sources.quantized_release import QUANTIZATION_KEYS
from fdq_checkpoints.sources.stored_weight import StoredWeight
from fdq_checkpoints.sources.tensor_names import Piece
from fdq_checkpoints.store.host_memory import Trimmer
from fdq_checkpoints.stream import Progress
from fdq_checkpoints.tree_paths import Path, Tensor, dotted

_WEIGHT, _INPUT_SCALE = ".weight", "input_scale"
_CACHE_SCALES = (
    "k_cache_scale",
    "v_cache_scale",
    "k_cache_zero",
    "v_cache_zero",
    "k_cache_mean",
)
_SHARD = r"model(-\d{5,}-of-\d{5,})?\.safetensors"


class HuggingFaceExporter(abc.ABC):
    """An exporter of such directories; says by `layout` how quantized layers are stored."""

    name: str

    @abc.abstractmethod
    def layout(self, layers: Sequence[Layer]) -> Layout | None:
        """The layout for a model with these quantized layers; None decodes them."""

    def plan(self, origin: Origin, options: Options) -> Plan:
        """What would be written; CheckpointError where the layout cannot hold a tensor."""
        parts = _Parts(origin)
        layout = self.of_stacks() if parts.stacks else None
        return _Plan(self.name, origin, options, parts, layout or self.layout(parts.flat()))

    def of_stacks(self) -> Layout | None:
        """The layout for a model with all experts of a layer in one tensor, if it is another."""
        return None

    def wrote(self, file: pathlib.Path) -> bool:
        """By its name."""
        known = (*COMPANION_FILES, INDEX_NAME)
        return file.name in known or re.fullmatch(_SHARD, file.name) is not None


class _Parts:
    """The tensors of a model by what becomes of them; CheckpointError for one without a name."""

    def __init__(self, origin: Origin):
        config = origin.config
        own = models.FAMILIES[config.model_type].tensor_names
        rules = (*own, *published_names.HUGGING_FACE.rules)
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.floats: dict[Path, list[Piece]] = {}
        self.layers: dict[Path, list[Layer]] = {}
        self.stacks: dict[Path, Piece] = {}  # experts of one tensor, which has no codes
        self.cache: list[Path] = []
        self.input_scales: dict[Path, Path] = {}
        for path, tensor in origin.tensors.items():
            if path[-1] in _CACHE_SCALES:
                self.cache.append(path)
                continue
            if path[-1] == "activation_scale":
                self.input_scales[(*path[:-1], "kernel")] = path
                continue
            shape = tuple(tensor.value.shape)
            pieces = tensor_names.pieces(path, shape, rules, qkv_widths=(q, kv, kv))
            if isinstance(tensor.value, QTensor) and _is_stack(pieces, shape):
                self.stacks[path] = pieces[0]
            elif isinstance(tensor.value, tree_paths.QUANTIZED):
                self.layers[path] = _layers(tensor, pieces, origin)
            else:
                self.floats[path] = pieces
        whole = iter(in_groups(self.flat()))
        self.layers = {path: [next(whole) for _ in own] for path, own in self.layers.items()}
        self.linears = [
            piece
            for pieces in self.floats.values()
            for piece in pieces
            if piece.layout == "transposed" and piece.name.endswith(_WEIGHT)
        ]
        for path, pieces in self.floats.items():
            if path[-1] == "kernel" and _is_stack(pieces, tuple(origin.tensors[path].value.shape)):
                self.linears.append(_module_of(pieces[0]))
        if config.tie_word_embeddings:
            name = published_names.HUGGING_FACE.head
            self.linears.append(Piece(name, name, None, 0, config.vocab_size, "transposed"))

    def flat(self) -> list[Layer]:
        """All quantized layers, in order."""
        return [layer for layers in self.layers.values() for layer in layers]


def _is_stack(pieces: list[Piece], shape: tuple[int, ...]) -> bool:
    return len(pieces) == 1 and pieces[0].expert is None and len(shape) == 3


def _module_of(stack: Piece) -> Piece:
    """The experts as the linear layer that they are to who matches names."""
    name, pattern = (one.rpartition(".")[0] for one in (stack.name, stack.pattern))
    return dataclasses.replace(stack, name=name, pattern=pattern)


def _layers(tensor: Tensor, pieces: list[Piece], origin: Origin) -> list[Layer]:
    q, last = tensor.value, max(piece.stop for piece in pieces)
    is_linear = all(p.layout == "transposed" and p.name.endswith(_WEIGHT) for p in pieces)
    if not isinstance(q, QTensor) or not is_linear or q.ndim - (pieces[0].expert is not None) != 2:
        raise CheckpointError(
            f"{origin.where}: {dotted(tensor.path)} ({q.spec}) is quantized, and no linear layer "
            "of the published model. Convert it again with this tensor left in floats."
        )
    k = q.shape[-2]
    return [
        Layer(tensor.path, p, k, p.stop - p.start, q.spec, tensor.activation, p.stop == last)
        for p in pieces
    ]


class _Plan(Plan):
    def __init__(
        self, name: str, origin: Origin, options: Options, parts: _Parts, layout: Layout | None
    ):
        self._origin, self._options, self._parts = origin, options, parts
        self._layout = layout
        flat = parts.flat()
        if layout is not None:
            _check_stacks(origin, parts.stacks, layout)
            _check(name, origin, layout, flat, with_stacks=bool(parts.stacks))
            parts.layers = {
                p: integers.without_offsets(own, origin) for p, own in parts.layers.items()
            }
            flat = parts.flat()
        self._dtype = np.dtype(options.dtype or origin.config.dtype)
        cache, stored = self._cache(), []
        self._keeps_cache = cache is not None
        for path, tensor in origin.tensors.items():
            stored.extend(self._planned(path, tensor))
        self._tensors: list[Planned] = stored
        quantization = None
        if layout is not None:
            quantization = {**layout.config(flat, parts.linears), **(cache or {})}
        self.config = self._config_json(quantization)
        self.nbytes = sum(one.nbytes for one in stored)
        self.formats = dict(self._formats(flat))
        self.notes = (*self._notes(flat), *(layout.notes(flat) if layout is not None else ()))

    def _planned(self, path: Path, tensor: Tensor) -> Iterator[Planned]:
        parts = self._parts
        if path in parts.floats:
            dtype = np.dtype(tensor.value.dtype)
            for piece in parts.floats[path]:
                shape = tuple(tensor.value.shape)[piece.expert is not None :]
                yield Planned(piece.name, dtype, piece.shape(shape))
        if path in parts.stacks:
            piece, shape = parts.stacks[path], tuple(tensor.value.shape)
            for stored, (dtype, size) in self._stack_shapes(piece, shape).items():
                yield Planned(stored, np.dtype(dtype), size)
        for layer in parts.layers.get(path, ()):
            if self._layout is None:
                yield Planned(layer.piece.name, self._dtype, (layer.n, layer.k))
                continue
            for end, (dtype, shape) in self._layout.shapes(layer).items():
                yield Planned(f"{layer.module}.{end}", np.dtype(dtype), shape)
            if layer.activation is not None and not layer.activation.dynamic:
                yield Planned(f"{layer.module}.{_INPUT_SCALE}", np.dtype(np.float32), (1,))
        if path in parts.cache and self._keeps_cache:
            yield Planned(_cache_name(path), np.dtype(np.float32), (*tensor.value.shape, 1))

    def write(self, folder: pathlib.Path, progress: Progress | None) -> None:
        """Tensor by tensor of fdq's tree: about one of them is in memory."""
        sizes = {p: _nbytes(t) for p, t in self._origin.tensors.items()}
        total, done, memory = sum(sizes.values()), 0, Trimmer()
        shard_bytes = self._options.shard_bytes
        with SafetensorsWriter(folder, self._tensors, shard_bytes=shard_bytes) as writer:
            for path in self._origin.tensors:
                self._write(writer, path)
                memory.worked(sizes[path])
                done += sizes[path]
                if progress is not None:
                    progress(done, total, dotted(path))
        text = json.dumps(self.config, indent=2, ensure_ascii=False)
        (folder / "config.json").write_text(text + "\n", "utf-8")
        for file in self._origin.companions():
            (folder / companion_name(file)).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / companion_name(file))

    def _write(self, writer: SafetensorsWriter, path: Path) -> None:
        parts, layers = self._parts, self._parts.layers.get(path, [])
        if path in parts.floats:
            value = self._origin.read(path)
            for piece in parts.floats[path]:
                writer.write(
                    piece.name, piece.of(value if piece.expert is None else value[piece.expert])
                )
        elif path in parts.stacks:
            q, piece = self._origin.read(path), parts.stacks[path]
            shapes = self._stack_shapes(piece, q.shape)
            stacks = [np.empty(size, dtype) for dtype, size in shapes.values()]
            for expert in range(q.shape[0]):
                one = self._prepared(q[expert], path)
                layout = self._layout
                found = [piece.of(one)] if layout is None else layout.expert_arrays(piece, one)
                for stack, array in zip(stacks, found, strict=True):
                    stack[expert] = array
            for name, stack in zip(shapes, stacks, strict=True):
                writer.write(name, stack)
        elif layers:
            q = self._origin.read(path)
            source = parts.input_scales.get(path)
            scale = None if source is None else self._origin.read(source)
            held: tuple[int | None, Any] = (-1, None)
            for layer in layers:
                expert = layer.piece.expert
                if held[0] != expert:  # the parts of an expert follow each other
                    held = expert, self._prepared(q if expert is None else q[expert], path)
                self._write_layer(writer, layer, held[1], scale)
        elif path in parts.cache and self._keeps_cache:
            value = np.asarray(self._origin.read(path), np.float32)
            writer.write(_cache_name(path), value[..., None])

    def _stack_shapes(self, piece: Piece, shape: tuple[int, ...]) -> Shapes:
        if self._layout is None:
            return {piece.name: (self._dtype, piece.shape(shape))}
        return self._layout.stack_shapes(piece, shape)

    def _prepared(self, q: QTensor, path: Path) -> Any:
        """A matrix as its parts are cut out of it: its arrays, or decoded."""
        if self._layout is not None:
            weight = StoredWeight.of(q)
            if weight.spec.zero_point == "offset":  # one of those that were looked at
                weight = integers.with_zero_points(weight) or weight
            return self._layout.whole(weight)
        with np.errstate(over="ignore"):
            floats = np.asarray(dequantize(q)).astype(self._dtype)
        if not np.isfinite(floats).all():
            raise CheckpointError(
                f"{dotted(path)}: its values are beyond the range of {self._dtype.name}. Export "
                "with dtype='bfloat16' or 'float32'."
            )
        return floats

    def _write_layer(
        self, writer: SafetensorsWriter, layer: Layer, matrix: Any, scale: np.ndarray | None
    ) -> None:
        if self._layout is None:
            writer.write(layer.piece.name, layer.piece.of(matrix))
            return
        weight = matrix.columns(layer.piece.start, layer.piece.stop)
        for end, array in self._layout.arrays(layer, weight).items():
            writer.write(f"{layer.module}.{end}", array)
        if layer.activation is not None and not layer.activation.dynamic:
            assert scale is not None
            value = np.asarray(scale, np.float32).reshape(1)
            writer.write(f"{layer.module}.{_INPUT_SCALE}", value)

    def _cache(self) -> Any:
        """What the config says of static scales of the cache, if they are written."""
        spec = self._origin.cache
        if not self._parts.cache or spec is None or self._layout is None:
            return None
        return self._layout.cache(spec)

    def _notes(self, layers: Sequence[Layer]) -> Iterator[str]:
        spec = self._origin.cache
        if spec is not None and not self._keeps_cache:
            scales = " and what is calibrated of it" if spec.calibrated else ""
            yield f"The KV cache's format ({spec}){scales} are left out: who runs it chooses one."
        stacks = [self._origin.tensors[path] for path in self._parts.stacks]
        if self._layout is None and any(x.activation is not None for x in (*layers, *stacks)):
            yield "Weights are decoded, and inputs stay in floats: the scheme's are not rounded."
        if (own := self._origin.config.model_type) != (text := self.config["model_type"]):
            yield f"Of {own} the text model alone is written, as {text}."
        if not any(f.name.startswith("tokenizer") for f in self._origin.companions()):
            yield "No tokenizer is beside the model, so none is written."

    def _formats(self, layers: Sequence[Layer]) -> collections.Counter[str]:
        counts = collections.Counter(
            f"{self._dtype.name} (decoded)" if self._layout is None else self._layout.word(layer)
            for layer in layers
        )
        for path in self._parts.stacks:
            spec = self._origin.tensors[path].value.spec
            word = (
                f"{self._dtype.name} (decoded)"
                if self._layout is None
                else f"{spec.format} of experts"
            )
            counts[word] += 1
        for path, pieces in self._parts.floats.items():
            counts[np.dtype(self._origin.tensors[path].value.dtype).name] += len(pieces)
        return counts

    def _config_json(self, quantization: dict[str, Any] | None) -> dict[str, Any]:
        """The model's own where it still describes it, or else one that is made."""
        config, found = as_written(self._origin.config), self._origin.published_config or {}
        content = {k: v for k, v in found.items() if k not in (*QUANTIZATION_KEYS, "auto_map")}
        if not same_model(content, config):
            try:
                content = to_huggingface(config)
            except ValueError as error:
                raise CheckpointError(f"{self._origin.where}: {error}") from error
        architecture = models.FAMILIES[config.model_type].architecture
        if architecture is not None:
            content["architectures"] = [architecture]
        key = "dtype" if "dtype" in content else "torch_dtype"
        content.pop("torch_dtype", None)
        content[key] = self._dtype.name if self._layout is None else config.dtype
        return content | ({} if quantization is None else {"quantization_config": quantization})


def _check_stacks(origin: Origin, stacks: dict[Path, Piece], layout: Layout) -> None:
    """CheckpointError for experts in one tensor that the layout cannot hold."""
    specs = {path: origin.tensors[path].value.spec for path in stacks}
    problems = {path: why for path, spec in specs.items() if (why := layout.stack_problem(spec))}
    if problems:
        path, more = next(iter(problems)), len(problems) - 1
        raise CheckpointError(
            f"{origin.where}: {dotted(path)} ({specs[path]})"
            f"{f' (and {more} more)' if more else ''}: {origin.config.model_type} has all experts "
            f"of a layer in one tensor, and {problems[path]}"
        )


def _unheld(spec: WeightSpec, layout: Layout) -> str | None:
    """What a layout of safetensors has not."""
    if spec.row_order and not layout.has_row_order:
        return (
            "rows in an order of their own, which it has no place for (compressed-tensors took "
            "`actorder` group out). --to gptq has one, and --to dense decodes it."
        )
    return None


def _check(
    name: str, origin: Origin, layout: Layout, layers: Sequence[Layer], *, with_stacks: bool
) -> None:
    """CheckpointError for what the layout cannot hold."""
    if not layers and not with_stacks:
        raise CheckpointError(
            f"{origin.where}: nothing in it is quantized, so there is nothing for {name} to hold. "
            "Export it --to dense, or quantize it first."
        )
    problems = [
        (layer, why)
        for layer in layers
        if (why := _unheld(layer.spec, layout) or layout.problem(layer)) is not None
    ]
    if problems:
        layer, why = problems[0]
        paths = len({other.path for other, _ in problems}) - 1
        more = f" (and {paths} more)" if paths else ""
        raise CheckpointError(f"{origin.where}: {layer.label}{more}: {why}")
    if layers and (why := layout.problem_of_all(layers)):
        raise CheckpointError(f"{origin.where}: {why}")


def _cache_name(path: Path) -> str:
    """`layers.0.self_attn.k_cache_scale` -> `model.layers.0.self_attn.k_scale`."""
    return f"model.{dotted(path).replace('_cache_', '_')}"


def _nbytes(tensor: Tensor) -> int:
    arrays = tree_paths.arrays_of(tensor.value).values()
    return sum(int(np.prod(a.shape)) * jnp.dtype(a.dtype).itemsize for a in arrays)
