"""MXFP4: compressed-tensors' of most models, and of gpt-oss the layout that it is published in.

What gpt-oss' tensors are: `fdq_checkpoints.sources.mxfp4`. Source: transformers 5.23.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fdq.schemes.scheme import WeightSpec
from fdq_checkpoints.export.compressed_tensors import OneFormat
from fdq_checkpoints.export.layout import Layer, Layout, Shapes
from fdq_checkpoints.sources.stored_weight import StoredWeight
from fdq_checkpoints.sources.tensor_names import Piece

_GROUP = 32
_FLOATS = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")


class GptOss(Layout):
    """Codes of experts alone, all of a layer in one tensor of blocks and one of scales."""

    def problem(self, layer: Layer) -> str | None:
        """Whatever it is of."""
        return "gpt-oss has codes of experts alone. Leave other layers in floats, by a recipe."

    def stack_problem(self, spec: WeightSpec) -> str | None:
        """By the format."""
        if spec.format == "mxfp4":
            return None
        return "its layout has codes in MXFP4 alone. Export it --to dense, which decodes it."

    def stack_shapes(self, piece: Piece, shape: tuple[int, ...]) -> Shapes:
        """Blocks of 32 codes, two a byte, and a scale each."""
        experts, k, n = shape
        groups = k // _GROUP
        return {
            f"{piece.name}_blocks": (np.uint8, (experts, n, groups, _GROUP // 2)),
            f"{piece.name}_scales": (np.uint8, (experts, n, groups)),
        }

    def expert_arrays(self, piece: Piece, weight: StoredWeight) -> list[np.ndarray]:
        """Turned from `[in, out]` to `[out, in]`, columns of gate and up in turns."""
        codes, scale = (
            np.ascontiguousarray(piece.of(array).T)
            for array in (weight.codes, weight.arrays["scale"].view(np.uint8))
        )
        return [codes.reshape(len(codes), -1, _GROUP // 2), scale]

    def shapes(self, layer: Layer) -> Shapes:
        """There are none."""
        raise NotImplementedError

    def arrays(self, layer: Layer, weight: StoredWeight) -> dict[str, np.ndarray]:
        """There are none."""
        raise NotImplementedError

    def config(self, layers: Sequence[Layer], floats: Sequence[Piece]) -> Mapping[str, Any]:
        """As it is published."""
        del layers, floats
        return {"quant_method": "mxfp4", "modules_to_not_convert": list(_FLOATS)}


class Mxfp4(OneFormat):
    """compressed-tensors', or gpt-oss' own."""

    def of_stacks(self) -> Layout | None:
        """gpt-oss' own: the only model that has such, and the only layout for them."""
        return GptOss()


MXFP4 = Mxfp4("mxfp4", ("mxfp4",))
