"""Models in GGUF, as llama.cpp's tools write them: codes become fdq's, value for value.

A fused layer of fdq whose parts are of several types (q and k in Q4_K, v in Q6_K, as the mixtures
`_M` have) takes the narrowest format that holds all of them exactly.
"""

import collections
import pathlib
from typing import Any

from fdq import models
from fdq_checkpoints.readers.local_directory import is_gguf, model_gguf
from fdq_checkpoints.sources import float_model
from fdq_checkpoints.sources.gguf_tensors import GgufTensors
from fdq_checkpoints.sources.quantized_model import QuantizedModel
from fdq_checkpoints.tree_paths import Path


class GgufModel(QuantizedModel):
    """A GGUF file, or the parts of one, seen as a quantized fdq model; one of floats where it is.

    `release` says of which types its tensors are.
    """

    def __init__(self, tensors: GgufTensors, model: models.Decoder, parts: float_model.Parts):
        super().__init__(tensors, model, parts, _types(tensors))

    def _tell(self) -> None:
        """Nothing is left out: what a file may not have is refused."""

    def _spec(self, path: Path) -> Any:
        """Embeddings and routers are decoded without a word: nearly all files have codes there."""
        return super()._spec(path) if self._is_linear(path) else None


class GgufModels:
    """Claims a .gguf file, and a directory of one without safetensors."""

    name = "model in GGUF"

    def claims(self, folder: pathlib.Path) -> bool:
        """By name, or by the first bytes of a file."""
        if not folder.is_dir():
            return is_gguf(folder)
        names = [entry.name.lower() for entry in folder.iterdir()]
        others = any(name.endswith(".safetensors") or name == "fdq.json" for name in names)
        return not others and any(name.endswith(".gguf") for name in names)

    def open(self, folder: pathlib.Path, *, dtype: Any = None) -> GgufModel:
        """Looks at metadata, names, shapes and types; reads no weights."""
        tensors = GgufTensors(model_gguf(folder))
        try:
            dtype = _float_dtype(tensors) if dtype is None else dtype
            model, parts = float_model.parts_of(tensors, dtype, names=tensors.names)
            return GgufModel(tensors, model, parts)
        except BaseException:
            tensors.close()
            raise


GGUF_MODELS = GgufModels()


def _float_dtype(tensors: GgufTensors) -> str:
    """Of what is not quantized: that of the embedding, or bfloat16 where it has codes."""
    if tensors.linear("token_embd.weight") is not None:
        return "bfloat16"
    found = tensors.tensors["token_embd.weight"].dtype.name
    return found if found in ("bfloat16", "float16") else "float32"


def _types(tensors: GgufTensors) -> str | None:
    """`"Q4_K (168), Q6_K (25)"`: types of matrices, and how many; None for floats."""
    kinds = collections.Counter(
        tensors.type_of(name) for name in tensors.tensors if tensors.linear(name) is not None
    )
    if not kinds:
        return None
    return ", ".join(f"{kind} ({n})" for kind, n in kinds.most_common())
