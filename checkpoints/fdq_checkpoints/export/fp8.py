"""Float8: in blocks as DeepSeek and Qwen publish it (`quant_method` fp8), else compressed-tensors'.

`fp8` says of all layers alike that inputs are rounded a token and a block's rows at a time, so
blocks with other inputs, or with none that are rounded, are compressed-tensors' too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fdq.schemes.scheme import ActivationSpec
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.export.compressed_tensors import CompressedTensors
from fdq_checkpoints.export.huggingface import HuggingFaceExporter
from fdq_checkpoints.export.layout import Layer, Layout, Shapes, crosses, scale_shape, turned
from fdq_checkpoints.sources.stored_weight import StoredWeight
from fdq_checkpoints.sources.tensor_names import Piece

_E4M3 = "float8_e4m3"


class Float8Blocks(Layout):
    """`weight` e4m3 and `weight_scale_inv`, which multiplies."""

    def problem(self, layer: Layer) -> str | None:
        """Where blocks lie across two layers."""
        if crosses(layer):
            return f"its blocks lie across {layer.module} and its neighbour; --to dense decodes it."
        return None

    def shapes(self, layer: Layer) -> Shapes:
        """As `arrays` makes them."""
        scale = (layer.spec.scale_dtype, scale_shape(layer))
        return {"weight": ("float8_e4m3fn", (layer.n, layer.k)), "weight_scale_inv": scale}

    def arrays(self, layer: Layer, weight: StoredWeight) -> dict[str, np.ndarray]:
        """Turned from `[in, out]` to `[out, in]`."""
        del layer
        return {"weight": turned(weight.codes), "weight_scale_inv": turned(weight.arrays["scale"])}

    def config(self, layers: Sequence[Layer], floats: Sequence[Piece]) -> Mapping[str, Any]:
        """The blocks, and what is left in floats."""
        spec = layers[0].spec
        assert spec.block_size is not None
        rows, columns = spec.block_size
        powers = {"scale_fmt": "ue8m0"} if spec.scale_dtype == "float8_e8m0fnu" else {}
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "weight_block_size": [columns, rows],
            "activation_scheme": "dynamic",
            "modules_to_not_convert": [piece.name.removesuffix(".weight") for piece in floats],
            **powers,
        }

    def word(self, layer: Layer) -> str:
        """The format as fdq names it."""
        return f"fp8 ({layer.scheme})"


class Exporter(HuggingFaceExporter):
    """Models all of whose quantized layers have weights in e4m3."""

    name = "fp8"

    def layout(self, layers: Sequence[Layer]) -> Layout:
        """In blocks where all are; CheckpointError where one is no float8."""
        for layer in layers:
            if layer.spec.format != _E4M3:
                raise CheckpointError(
                    f"{layer.label} is no float8 (e4m3). Quantize it so first, or export it --to "
                    "compressed-tensors, which holds most formats, or dense."
                )
        stored = {(layer.spec, layer.activation) for layer in layers}
        if len(stored) == 1:
            ((spec, activation),) = stored
            if spec.block_size is not None:
                inputs = ActivationSpec(
                    format=_E4M3, granularity="token_group", group_size=spec.block_size[0]
                )
                if activation == inputs:
                    return Float8Blocks()
        return CompressedTensors()


FP8 = Exporter()
