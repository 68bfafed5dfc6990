"""The tensors of a GGUF model, in one file or in parts: their names in fdq's tree, and their rows.

Where llama.cpp keeps rows of q and k in the order of GPT-J's rotary (`llama`), they are put back as
Hugging Face has them: whole rows of blocks, whatever their type.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from fdq.models.family import Rule, Widths
from fdq.schemes.scheme import WeightSpec
from fdq_checkpoints.errors import CheckpointError, nearest, shown
from fdq_checkpoints.readers.gguf_reader import GgufFile, GgufTensor
from fdq_checkpoints.readers.local_directory import gguf_parts
from fdq_checkpoints.readers.safetensors_reader import TensorInfo
from fdq_checkpoints.sources import ggml_blocks, gguf_config, gguf_tokenizer
from fdq_checkpoints.sources.ggml_blocks import BlockWeight
from fdq_checkpoints.sources.published_names import Names
from fdq_checkpoints.sources.stored_weight import Linear

_CHUNK_BYTES = 32 * 2**20
_MOST_MATRICES = 2**18
_MOST_EXPERTS = 2**12
_EXPERT = re.compile(r"(.+)\[(\d+)\]")
PERMUTED = re.compile(r"blk\.\d+\.attn_([qk])\.(?:weight|bias)")


def _names(qkv: tuple[str, ...], gate_up: tuple[str, ...]) -> Names:
    block, layer = "blk.{i}.", "layers.{i}."

    def linear(path: str, *parts: str, widths: Widths = "equal") -> tuple[Rule, ...]:
        theirs = [block + part for part in parts]
        kernel = Rule(
            f"{layer}{path}.kernel", tuple(f"{x}.weight" for x in theirs), "transposed", widths
        )
        bias = Rule(f"{layer}{path}.bias", tuple(f"{x}.bias" for x in theirs), "same", widths)
        return kernel, bias

    def experts(path: str, *parts: str) -> Rule:
        names = tuple(f"{block}{part}.weight[{{e}}]" for part in parts)
        return Rule(f"{layer}mlp.experts.{path}.kernel", names, "transposed")

    def norm(path: str, name: str) -> Rule:
        return Rule(f"{layer}{path}.scale", (f"{block}{name}.weight",))

    embedding, head = "token_embd.weight", "output"
    rules = (
        Rule("embed_tokens.embedding", (embedding,)),
        Rule("norm.scale", ("output_norm.weight",)),
        Rule("lm_head.kernel", (f"{head}.weight",), "transposed"),
        Rule("lm_head.bias", (f"{head}.bias",)),
        norm("input_layernorm", "attn_norm"),
        norm("post_attention_layernorm", "ffn_norm"),
        *linear("self_attn.qkv_proj", *qkv, widths="qkv"),
        *linear("self_attn.o_proj", "attn_output"),
        norm("self_attn.q_norm", "attn_q_norm"),
        norm("self_attn.k_norm", "attn_k_norm"),
        *linear("mlp.gate_up_proj", *gate_up),
        *linear("mlp.down_proj", "ffn_down"),
        Rule(f"{layer}mlp.router.kernel", (f"{block}ffn_gate_inp.weight",), "transposed"),
        Rule(f"{layer}mlp.router.correction_bias", (f"{block}exp_probs_b.bias",)),
        experts("gate_up_proj", "ffn_gate_exps", "ffn_up_exps"),
        experts("down_proj", "ffn_down_exps"),
        *linear("mlp.shared_experts.gate_up_proj", "ffn_gate_shexp", "ffn_up_shexp"),
        *linear("mlp.shared_experts.down_proj", "ffn_down_shexp"),
    )
    return Names(embedding, f"{head}.weight", rules)


APART = _names(("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up"))
JOINED = _names(("attn_qkv",), ("ffn_up",))


def names_of(model_type: str) -> Names:
    """The names of the tensors of a family."""
    return JOINED if model_type == "phi3" else APART


@dataclasses.dataclass(frozen=True)
class _Stored:
    """Where a tensor is: rows `[start, start + rows)` of one in a file, so many a head permuted."""

    file: GgufFile
    tensor: GgufTensor
    start: int
    shape: tuple[int, ...]
    heads: int | None = None


class GgufTensors:
    """A model in GGUF as tensor names see it: floats, whatever a tensor is stored as.

    One expert of a stack is a tensor of its own, `<name>[<expert>]`.
    """

    config_name = "metadata"

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.files: list[GgufFile] = []
        try:
            for part in gguf_parts(path):
                self.files.append(GgufFile(part))
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        first = self.files[0]
        self.metadata = first.metadata
        found: dict[str, GgufFile] = {}
        for number, file in enumerate(self.files):
            place = (file.metadata.get("split.no", 0), file.metadata.get("split.count", 1))
            is_whole = [type(one) for one in place] == [int, int]
            if not is_whole or (place[0], place[1] or 1) != (number, len(self.files)):
                raise CheckpointError(
                    f"{file.path}: says that it is part {place[0]} (from 0) of {place[1]}, found "
                    f"as {number} of {len(self.files)}. Keep the parts' names, and all of them."
                )
            for name in file.tensors:
                if name in found:
                    raise CheckpointError(
                        f"{file.path}: tensor {shown(name)} is also in {found[name].path}."
                    )
                found[name] = file
        shapes = {name: file.tensors[name].shape for name, file in found.items()}
        rope = {
            name: self._rope(found[name], name)
            for name in gguf_config.ROPE_TENSORS
            if name in found
        }
        metadata = gguf_config.Metadata(first.path, self.metadata, shapes)
        self.architecture, self.config = gguf_config.huggingface_config(metadata, rope)
        self.names = names_of(self.architecture.model_type)
        self._stored: dict[str, _Stored] = {}
        for name, file in found.items():
            if name not in rope:
                self._add(file, file.tensors[name])
        self.tensors = {
            name: TensorInfo(name, self._dtype(stored), stored.shape, 0, 0)
            for name, stored in self._stored.items()
        }

    def _rope(self, file: GgufFile, name: str) -> np.ndarray:
        tensor = file.tensors[name]
        if tensor.type.name != "F32" or len(tensor.shape) != 1:
            raise CheckpointError(f"{file.path}: tensor {shown(name)}: expected a vector of F32.")
        factors = file.rows(name, 0, 1).view("<f4")[0]
        if not (np.isfinite(factors).all() and (factors > 0).all()):
            raise CheckpointError(f"{file.path}: tensor {shown(name)} holds no positive numbers.")
        return factors

    def _add(self, file: GgufFile, tensor: GgufTensor) -> None:
        kind, shape = tensor.type.name, tensor.shape
        if kind not in ggml_blocks.FLOATS and kind not in ggml_blocks.READERS:
            raise CheckpointError(
                f"{file.path}: tensor {shown(tensor.name)} is {kind}, which fdq does not read; it "
                f"reads {', '.join((*ggml_blocks.FLOATS, *ggml_blocks.READERS))}. Take the model "
                "in one of these, or its safetensors release."
            )
        if len(shape) == 3:
            if shape[0] > _MOST_EXPERTS:
                raise CheckpointError(
                    f"{file.path}: tensor {shown(tensor.name)} has {shape[0]} experts, more than "
                    f"{_MOST_EXPERTS}."
                )
            if len(self._stored) + shape[0] > _MOST_MATRICES:
                raise CheckpointError(
                    f"{file.path}: more than {_MOST_MATRICES} matrices of experts."
                )
            for expert in range(shape[0]):
                rows = _Stored(file, tensor, expert * shape[1], shape[1:])
                self._stored[f"{tensor.name}[{expert}]"] = rows
            return
        heads, match = None, PERMUTED.fullmatch(tensor.name)
        if self.architecture.permuted and match is not None:
            key = {"q": "num_attention_heads", "k": "num_key_value_heads"}[match[1]]
            heads = self.config[key]
            if shape[0 if len(shape) == 2 else -1] % (2 * heads):
                raise CheckpointError(
                    f"{file.path}: tensor {shown(tensor.name)} of {shape} is not of {heads} heads."
                )
        self._stored[tensor.name] = _Stored(file, tensor, 0, shape, heads)

    def _dtype(self, stored: _Stored) -> np.dtype:
        """Of a tensor in floats; of codes that which holds all of their values."""
        return ggml_blocks.FLOATS.get(stored.tensor.type.name, np.dtype(np.float32))

    def type_of(self, name: str) -> str:
        """The name of a tensor's type."""
        return self._stored[name].tensor.type.name

    has_rows = True  # are read without the others

    def files_of(self, name: str) -> set[str]:
        """The paths of all files that a tensor is read from."""
        return {self.file_name(name)}

    def cache(self, config: object) -> None:
        """Nothing is said of a KV cache."""
        del config

    def file_name(self, name: str) -> str:
        """The file that holds a tensor, for errors."""
        return self._find(name).file.path

    def _find(self, name: str) -> _Stored:
        try:
            return self._stored[name]
        except KeyError:
            raise CheckpointError(
                f"{self.path}: no tensor {shown(name)}.{nearest(name, self._stored)}"
            ) from None

    def linear(self, name: str) -> Linear | None:
        """A matrix of codes."""
        stored = self._stored.get(name)
        if stored is None or len(stored.shape) != 2:
            return None
        kind = stored.tensor.type.name
        if kind not in ggml_blocks.READERS:
            return None
        return Linear(
            module=name,
            shape=(stored.shape[0], stored.shape[1]),
            spec=ggml_blocks.spec_of([kind]),
            activation=None,
            ends=(kind,),
        )

    def joined_spec(self, parts: Sequence[Linear]) -> WeightSpec | None:
        """How fdq holds layers of these types joined."""
        return ggml_blocks.spec_of([part.ends[0] for part in parts])

    def weight(self, linear: Linear) -> BlockWeight:
        """The codes of a matrix."""
        stored = self._find(linear.module)
        rows = self._rows(stored, 0, stored.shape[0])
        return self._blocks(linear.module, stored, rows)

    def read(self, name: str) -> np.ndarray:
        """A tensor in floats."""
        stored = self._find(name)
        count = math.prod(stored.shape[:-1])
        result = np.empty((count, stored.shape[-1]), self._dtype(stored))
        step = max(1, _CHUNK_BYTES // (4 * stored.shape[-1]))
        for start in range(0, count, step):
            stop = min(start + step, count)
            result[start:stop] = self._floats(name, stored, self._rows(stored, start, stop))
        return self._unpermuted(stored, result.reshape(stored.shape))

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of a matrix in floats."""
        stored = self._find(name)
        return self._floats(name, stored, self._rows(stored, start, stop))

    def _rows(self, stored: _Stored, start: int, stop: int) -> np.ndarray:
        """Rows of bytes, in the order of Hugging Face."""
        begin = stored.start
        if stored.heads is None or len(stored.shape) != 2:
            return stored.file.rows(stored.tensor.name, begin + start, begin + stop)
        order = _unpermuted_order(stored.shape[0], stored.heads)[start:stop]
        if not len(order):
            return stored.file.rows(stored.tensor.name, begin, begin)
        low, high = int(order.min()), int(order.max()) + 1
        return stored.file.rows(stored.tensor.name, begin + low, begin + high)[order - low]

    def _unpermuted(self, stored: _Stored, array: np.ndarray) -> np.ndarray:
        """A bias, which is one row of all heads."""
        if stored.heads is None or array.ndim != 1:
            return array
        return array[_unpermuted_order(len(array), stored.heads)]

    def _floats(self, name: str, stored: _Stored, rows: np.ndarray) -> np.ndarray:
        dtype = ggml_blocks.FLOATS.get(stored.tensor.type.name)
        if dtype is not None:
            return rows.view(dtype)
        return self._blocks(name, stored, rows).floats()

    def _blocks(self, name: str, stored: _Stored, rows: np.ndarray) -> BlockWeight:
        weight = BlockWeight(stored.tensor.type.name, stored.shape[-1], rows)
        if not weight.is_finite():
            raise CheckpointError(
                f"{stored.file.path}: tensor {shown(name)} holds a scale that is not finite. "
                "Download it again."
            )
        return weight

    def companions(self) -> list[pathlib.Path]:
        """The config and the tokenizer, as files of Hugging Face's."""
        return gguf_tokenizer.companions(self.path, self.metadata, self.config)

    def close(self) -> None:
        """Closes the files."""
        for file in self.files:
            file.close()


def _unpermuted_order(rows: int, heads: int) -> np.ndarray:
    """For each row as Hugging Face has them, its number where pairs of a head lie together."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
