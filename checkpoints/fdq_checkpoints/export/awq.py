"""AWQ's files in AutoAWQ's `gemm` layout: 4-bit integers with zero points, packed along N.

The tensors are those that their importer describes (`fdq_checkpoints.sources.gptq`). Source:
AutoAWQ (`packing_utils`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from fdq.formats import packing
from fdq_checkpoints.export import integers
from fdq_checkpoints.export.huggingface import HuggingFaceExporter
from fdq_checkpoints.export.layout import Layer, Layout, Shapes, common
from fdq_checkpoints.sources.stored_weight import StoredWeight
from fdq_checkpoints.sources.tensor_names import Piece

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of 8 columns each nibble of a word holds."""
_ELSEWHERE = "--to compressed-tensors holds it"


class Awq(Layout):
    """One size of groups for all layers that have codes; all else is named in the config."""

    def problem(self, layer: Layer) -> str | None:
        """By the format, dtype of scales, inputs, the name, and words that would not be full."""
        spec = layer.spec
        if integers.stored_bits(spec) != 4:
            return f"AWQ has integers of 4 bits alone; {_ELSEWHERE}, or --to dense decodes it."
        if layer.activation is not None:
            return f"AWQ's config has no word for quantized inputs; {_ELSEWHERE}."
        if spec.scale_dtype != "float16":
            return (
                f"scales in {spec.scale_dtype}, and AWQ's are float16; {_ELSEWHERE}, or quantize "
                "with scales in float16, such as W4A16-g128-asym-f16."
            )
        if layer.module == "lm_head":
            return f"loaders of AWQ leave the head in floats; {_ELSEWHERE}."
        if layer.n % 8:
            return f"{layer.n} columns do not fill words of 8; {_ELSEWHERE}."
        return None

    def problem_of_all(self, layers: Sequence[Layer]) -> str | None:
        """Groups are those of the first."""
        for layer in layers:
            if layer.spec.group_size != layers[0].spec.group_size:
                return (
                    f"{layers[0].label} and {layer.label}: AWQ's config has one size of groups for "
                    "all layers; --to compressed-tensors holds several."
                )
        return None

    def shapes(self, layer: Layer) -> Shapes:
        """As `arrays` makes them."""
        groups = layer.k // layer.group
        return {
            "qweight": (np.int32, (layer.k, layer.n // 8)),
            "qzeros": (np.int32, (groups, layer.n // 8)),
            "scales": (layer.spec.scale_dtype, (groups, layer.n)),
        }

    def arrays(self, layer: Layer, weight: StoredWeight) -> dict[str, np.ndarray]:
        """`[in, out]`, as fdq has it."""
        found = integers.integers(layer, weight)
        padding = packing.padding_rows(layer.k, 4)
        codes = np.asarray(packing.unpack(jnp.asarray(found.codes), 4, padding))
        zero = found.zero
        if zero is None:
            zero = np.full(found.scale.shape, 8, np.uint8)
        return {
            "qweight": _words(codes),
            "qzeros": _words(zero),
            "scales": np.ascontiguousarray(found.scale),
        }

    def config(self, layers: Sequence[Layer], floats: Sequence[Piece]) -> Mapping[str, Any]:
        """Loaders make layers with codes of all linear ones whose names hold none of these."""
        left = [piece.name.removesuffix(".weight") for piece in floats]
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": common([layer.spec.group_size for layer in layers]) or -1,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": left or None,
        }

    def word(self, layer: Layer) -> str:
        """The layout, and fdq's name of the format."""
        return f"awq ({layer.scheme})"

    def notes(self, layers: Sequence[Layer]) -> tuple[str, ...]:
        """Of levels in more bits."""
        return integers.widened(list(layers))


def _words(codes: np.ndarray) -> np.ndarray:
    """Codes uint8 `[rows, N]` -> int32 `[rows, N / 8]`."""
    each = codes.reshape(len(codes), -1, 8)[..., _ORDER]
    pairs = each[..., ::2] | (each[..., 1::2] << np.uint8(4))
    return np.ascontiguousarray(pairs).view(np.int32)[..., 0]


class Exporter(HuggingFaceExporter):
    """The one layout."""

    name = "awq"

    def layout(self, layers: Sequence[Layer]) -> Layout:
        """The same for all."""
        del layers
        return Awq()


AWQ = Exporter()
