"""GGUF, as llama.cpp and what is built on it load models: one file, with its tokenizer.

==========================  ======  =============================================
fdq's format                type    how
==========================  ======  =============================================
int8, symmetric             Q8_0    scales in float16, of 32 rows or a multiple
int4, symmetric             Q4_0    the same
int4 with offsets           Q4_1    the same
MXFP4                       MXFP4
floats                      F32, F16, BF16
==========================  ======  =============================================

Codes and scales are those of fdq, bit for bit. Rows of q and k of Llama are put in llama.cpp's
order.
"""

import collections
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from fdq.formats import packing
from fdq.formats.qtensor import QTensor
from fdq.schemes.scheme import WeightSpec
from fdq_checkpoints import tree_paths
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.export import gguf_metadata
from fdq_checkpoints.export.exporter import Options, Plan
from fdq_checkpoints.export.gguf_writer import GgufWriter, Planned
from fdq_checkpoints.export.origin import Origin
from fdq_checkpoints.sources import ggml_blocks, gguf_config, gguf_tensors, tensor_names
from fdq_checkpoints.sources.stored_weight import StoredWeight
from fdq_checkpoints.sources.tensor_names import Piece
from fdq_checkpoints.stream import Progress
from fdq_checkpoints.tree_paths import Path, Tensor, dotted

FILE_NAME = "model.gguf"
_BLOCK = 32
_FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32, "MXFP4": 38}
_LEFT_OUT = (
    "k_cache_scale",
    "v_cache_scale",
    "k_cache_zero",
    "v_cache_zero",
    "k_cache_mean",
    "activation_scale",
)


class GgufExporter:
    """Holds what has a type of GGML's own exactly, and floats."""

    name = "gguf"

    def plan(self, origin: Origin, options: Options) -> Plan:
        """What would be written; CheckpointError names a tensor that no type holds."""
        return _Plan(origin)

    def wrote(self, file: pathlib.Path) -> bool:
        """By its name."""
        return file.name == FILE_NAME


GGUF = GgufExporter()


def type_of(spec: WeightSpec) -> str | None:
    """The type that holds a format exactly; None where none does."""
    if spec.format == "mxfp4":
        return "MXFP4"
    grouped = spec.granularity == "channel" or (spec.group_size or 1) % _BLOCK == 0
    other = spec.row_order or spec.block_size is not None or spec.scale_dtype != "float16"
    if other or not grouped:
        return None
    return {
        ("int8", "none"): "Q8_0",
        ("int4", "none"): "Q4_0",
        ("int4", "offset"): "Q4_1",
    }.get((spec.format, spec.zero_point))


class _Plan(Plan):
    def __init__(self, origin: Origin):
        self._origin, config = origin, origin.config
        self.architecture = gguf_metadata.architecture_of(config.model_type, origin.where)
        names = gguf_tensors.names_of(config.model_type)
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self._pieces: dict[Path, list[Piece]] = {}
        self._planned: dict[str, Planned] = {}
        for path, tensor in origin.tensors.items():
            if path[-1] in _LEFT_OUT:
                continue
            shape = tuple(tensor.value.shape)
            pieces = tensor_names.pieces(path, shape, names.rules, qkv_widths=(q, kv, kv))
            self._pieces[path] = pieces
            for piece in pieces:
                self._plan_piece(tensor, piece)
        self._rope = gguf_metadata.rope_tensors(config)
        for name, factors in self._rope.items():
            self._planned[name] = Planned(name, "F32", factors.shape)
        kinds = collections.Counter(one.type for one in self._planned.values())
        self.formats = dict(kinds)
        self.nbytes = sum(one.nbytes for one in self._planned.values())
        most = max(self._planned.values(), key=lambda one: one.nbytes).type
        shapes = {name: one.shape for name, one in self._planned.items()}
        said = {
            "general.architecture": self.architecture,
            "general.type": "model",
            "general.name": _name(origin),
            "general.quantization_version": 2,
            "general.file_type": _FILE_TYPES[most],
            **gguf_metadata.of_config(config, self.architecture),
            **gguf_metadata.of_special_tokens(config),
        }
        gguf_metadata.check(origin.where, config, said, shapes, self._rope)
        notes = []
        try:
            files = origin.files()
            said |= gguf_metadata.of_tokenizer(files, config, self.architecture)
        except gguf_metadata.NoTokenizer as reason:
            notes.append(f"Without its tokenizer, which llama.cpp needs: {reason}.")
        if origin.cache is not None:
            notes.append("The format of the cache is left out: GGUF has no word for it.")
        self.metadata, self.notes = said, tuple(notes)

    def _plan_piece(self, tensor: Tensor, piece: Piece) -> None:
        value, name = tensor.value, piece.name.partition("[")[0]
        label = f"{self._origin.where}: {dotted(tensor.path)}"
        shape = piece.shape(tuple(value.shape)[piece.expert is not None :])
        if piece.expert is not None:
            shape = (value.shape[0], *shape)
        if isinstance(value, tree_paths.QUANTIZED):
            kind = type_of(value.spec) if isinstance(value, QTensor) else None
            if kind is None or len(shape) < 2 or shape[-1] % _BLOCK:
                raise CheckpointError(
                    f"{label} ({value.spec}): no type of GGUF holds it exactly; they hold "
                    "W8-g32-f16, W4-g32-f16, W4-g32-affine-f16 and WMXFP4. Convert the original "
                    "to one of these, or --to dense decodes all."
                )
            if tensor.activation is not None:
                raise CheckpointError(
                    f"{label} ({value.spec}{tensor.activation}): GGUF has no word for quantized "
                    "inputs; --to compressed-tensors has, or convert with A16."
                )
        else:
            # llama.cpp computes with vectors, and chooses experts, in float32.
            kind = _FLOATS[jnp.dtype(value.dtype).name]
            kind = "F32" if len(shape) == 1 or "router" in tensor.path else kind
        self._planned[name] = Planned(name, kind, shape)

    def write(self, folder: pathlib.Path, progress: Progress | None) -> None:
        """Tensor by tensor of fdq's tree: about one of them is in memory."""
        total, done = max(1, self.nbytes), 0
        with GgufWriter(folder / FILE_NAME, self.metadata, self._planned.values()) as writer:
            for name, factors in self._rope.items():
                writer.write(name, factors)
            for path, pieces in self._pieces.items():
                value = self._origin.read(path)
                for piece in pieces:
                    name = piece.name.partition("[")[0]
                    part = value if piece.expert is None else value[piece.expert]
                    writer.write(name, self._content(part, piece), piece.expert or 0)
                    one = self._planned[name]
                    done += one.nbytes // (one.shape[0] if piece.expert is not None else 1)
                del value
                if progress is not None:
                    progress(done, total, dotted(path))

    def _content(self, value: Any, piece: Piece) -> np.ndarray:
        """The bytes of a tensor: rows of blocks, or of floats."""
        name = piece.name.partition("[")[0]
        order = self._order(name, piece.stop - piece.start)
        if not isinstance(value, QTensor):
            array = piece.of(np.asarray(value))
            kind = self._planned[name].type
            return (array if order is None else array[order]).astype(ggml_blocks.FLOATS[kind])
        weight = StoredWeight.of(value).columns(piece.start, piece.stop)
        rows = blocks_of(weight)
        return rows if order is None else rows[order]

    def _order(self, name: str, rows: int) -> np.ndarray | None:
        """For each row of q and k as llama.cpp has them, its number in fdq."""
        if not gguf_config.ARCHITECTURES[self.architecture].permuted:
            return None
        match = gguf_tensors.PERMUTED.fullmatch(name)
        if match is None:
            return None
        config = self._origin.config
        heads = {"q": config.num_heads, "k": config.num_kv_heads}[match[1]]
        return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _name(origin: Origin) -> str:
    """Of the checkpoint, or the family of a model in memory."""
    path = pathlib.Path(origin.where)
    return path.resolve().name if path.exists() else origin.config.model_type


def blocks_of(weight: StoredWeight) -> np.ndarray:
    """Rows of blocks uint8 `[N, bytes]` of a weight `[K, N]`, as `type_of` its spec has them."""
    kind, k, n = type_of(weight.spec), weight.k, weight.codes.shape[-1]
    scale = np.ascontiguousarray(weight.arrays["scale"].T)
    times = k // _BLOCK // scale.shape[1]
    head = [np.repeat(scale, times, axis=1)]
    if "offset" in weight.arrays:
        head.append(np.repeat(weight.arrays["offset"].T, times, axis=1))
    parts = [np.ascontiguousarray(x)[..., None].view(np.uint8) for x in head]
    if kind == "Q8_0":
        codes = weight.codes.view(np.uint8)
    else:
        codes = np.asarray(packing.unpack(jnp.asarray(weight.codes), 4, packing.padding_rows(k, 4)))
    codes = np.ascontiguousarray(codes.T).reshape(n, -1, _BLOCK)
    if kind != "Q8_0":
        half = _BLOCK // 2
        codes = codes[..., :half] | (codes[..., half:] << np.uint8(4))
    return np.concatenate([*parts, codes], axis=-1).reshape(n, -1)
