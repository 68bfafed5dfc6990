"""bitsandbytes' NF4: the tensors that its importer describes, without double quantization.

Scales become float32, which holds those of 16 bits; what fdq stores of scales in 8 bits is another
thing than bitsandbytes', so the float32 that they stand for is stored.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from fdq.formats import FORMATS
from fdq.formats.normal_float import CODEBOOK
from fdq_checkpoints.export.huggingface import HuggingFaceExporter
from fdq_checkpoints.export.layout import Layer, Layout, Shapes, turned
from fdq_checkpoints.sources import bits as words
from fdq_checkpoints.sources.stored_weight import StoredWeight
from fdq_checkpoints.sources.tensor_names import Piece

_STATE = "weight.quant_state.bitsandbytes__nf4"
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # that its kernels have


class NormalFloat4(Layout):
    """Codes of NF4 in blocks along a row."""

    def problem(self, layer: Layer) -> str | None:
        """By the format and the size of blocks."""
        if layer.spec.format != "nf4":
            return (
                "bitsandbytes' exporter has NF4 alone; --to compressed-tensors has most other "
                "formats, and --to dense decodes all."
            )
        if layer.group not in _BLOCKS:
            return f"blocks of {layer.group}, bitsandbytes has {_BLOCKS}; --to dense decodes it."
        if layer.activation is not None:
            return "bitsandbytes rounds no inputs of NF4; --to dense decodes it."
        return None

    def problem_of_all(self, layers: Sequence[Layer]) -> str | None:
        """The config says one size of blocks."""
        for layer in layers:
            if layer.group != layers[0].group:
                return f"{layer.label}: other blocks than {layers[0].label}; --to dense."
        return None

    def shapes(self, layer: Layer) -> Shapes:
        """As `arrays` makes them."""
        count = layer.n * layer.k
        return {
            "weight": (np.uint8, (count // 2, 1)),
            "weight.absmax": (np.float32, (count // layer.group,)),
            "weight.quant_map": (np.float32, (16,)),
            _STATE: (np.uint8, (len(_state(layer)),)),
        }

    def whole(self, weight: StoredWeight) -> StoredWeight:
        """With scales in float32."""
        parameters = {name: jnp.asarray(array) for name, array in weight.arrays.items()}
        scale = np.asarray(FORMATS["nf4"].multiplier(parameters, weight.spec))
        spec = dataclasses.replace(weight.spec, double_quantization=False, scale_dtype="float32")
        return StoredWeight(spec, weight.k, weight.codes, {"scale": scale})

    def arrays(self, layer: Layer, weight: StoredWeight) -> dict[str, np.ndarray]:
        """Row by row of `[out, in]`, the high nibble first."""
        return {
            "weight": words.nibbles_swapped(turned(weight.codes)).reshape(-1, 1),
            "weight.absmax": turned(weight.arrays["scale"]).reshape(-1),
            "weight.quant_map": np.asarray(CODEBOOK, np.float32),
            _STATE: np.frombuffer(_state(layer), np.uint8),
        }

    def config(self, layers: Sequence[Layer], floats: Sequence[Piece]) -> Mapping[str, Any]:
        """As transformers writes it."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_blocksize": layers[0].group,
            "llm_int8_skip_modules": [piece.name.removesuffix(".weight") for piece in floats],
        }


def _state(layer: Layer) -> bytes:
    state = {
        "quant_type": "nf4",
        "blocksize": layer.group,
        "dtype": "float32",
        "shape": [layer.n, layer.k],
    }
    return json.dumps(state).encode()


class Exporter(HuggingFaceExporter):
    """Models all of whose quantized layers are in NF4."""

    name = "bitsandbytes"

    def layout(self, layers: Sequence[Layer]) -> Layout:
        """The same for all."""
        del layers
        return NormalFloat4()


BITSANDBYTES = Exporter()
