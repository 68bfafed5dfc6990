"""GPTQ's files, of both versions: the tensors that their importer describes, rows in their order.

The first version stores zero points less one, so a zero point of 0 wraps around, which readers
disagree about; the second (`gptq_v2`) stores them as they are. Sources: AutoGPTQ, GPTQModel.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.export import integers
from fdq_checkpoints.export.huggingface import HuggingFaceExporter
from fdq_checkpoints.export.layout import Layer, Layout, Shapes
from fdq_checkpoints.sources import bits as words
from fdq_checkpoints.sources.stored_weight import StoredWeight
from fdq_checkpoints.sources.tensor_names import Piece

_ELSEWHERE = "--to compressed-tensors holds it"
_SCALES = ("float16", "bfloat16")


class Gptq(Layout):
    """One number of bits and one size of groups for all layers that have codes."""

    has_row_order = True

    def __init__(self, checkpoint_format: str):
        self.checkpoint_format = checkpoint_format

    def problem(self, layer: Layer) -> str | None:
        """By the format, dtype of scales, inputs, and words that would not be full."""
        spec = layer.spec
        bits = integers.stored_bits(spec)
        if integers.own_bits(spec) is None:
            return (
                "GPTQ has integers alone; --to compressed-tensors has most other formats, and "
                "--to dense decodes all."
            )
        if bits is None:
            return "levels at odd multiples of scale / 2 in 8 bits; --to dense decodes it."
        if layer.activation is not None:
            return f"GPTQ's config has no word for quantized inputs; {_ELSEWHERE}."
        if spec.scale_dtype not in _SCALES:
            return (
                f"scales in {spec.scale_dtype}, and GPTQ's kernels have 16 bits; {_ELSEWHERE}, "
                "or quantize with scales in float16, such as W4A16-g128-f16."
            )
        for size, what in ((layer.n, "columns"), (layer.k, "rows")):
            if size * bits % 32:
                return f"{size} {what} of {bits} bits do not fill words of 32; {_ELSEWHERE}."
        return None

    def problem_of_all(self, layers: Sequence[Layer]) -> str | None:
        """Bits, groups and symmetry are those of the first."""
        first = layers[0]
        for layer in layers:
            if _said(layer) != _said(first):
                return (
                    f"{first.label} and {layer.label}: GPTQ's config has one number of bits and "
                    "one size of groups for all layers; --to compressed-tensors holds several."
                )
        return None

    def shapes(self, layer: Layer) -> Shapes:
        """As `arrays` makes them."""
        bits = integers.stored_bits(layer.spec)
        assert bits is not None
        groups = layer.k // layer.group
        return {
            "qweight": (np.int32, (layer.k * bits // 32, layer.n)),
            "qzeros": (np.int32, (groups, layer.n * bits // 32)),
            "scales": (layer.spec.scale_dtype, (groups, layer.n)),
            "g_idx": (np.int32, (layer.k,)),
        }

    def arrays(self, layer: Layer, weight: StoredWeight) -> dict[str, np.ndarray]:
        """`[in, out]`, as fdq has it."""
        found = integers.integers(layer, weight)
        is_first, zero = self.checkpoint_format == "gptq", found.zero
        if zero is None:
            stored = 2 ** (found.bits - 1) - is_first
            zeros = integers.constant_zeros(layer.k // layer.group, layer.n, stored, found.bits)
        else:
            if is_first and not zero.all():
                raise CheckpointError(
                    f"{layer.label}: a zero point of 0, which GPTQ's first version stores as -1 "
                    "and its readers disagree about; --to gptq_v2 holds it."
                )
            zeros = integers.packed_along_columns(zero - np.uint8(is_first), found.bits)
        return {
            "qweight": words.words_along_rows(found.codes, layer.k, found.bits),
            "qzeros": zeros,
            "scales": np.ascontiguousarray(found.scale),
            "g_idx": integers.group_index(layer, weight),
        }

    def config(self, layers: Sequence[Layer], floats: Sequence[Piece]) -> Mapping[str, Any]:
        """Layers beside those with codes are named where a loader would expect codes."""
        bits, group, symmetric = _said(layers[0])
        kinds = {layer.pattern for layer in layers}
        left = [
            p.name.removesuffix(".weight")
            for p in floats
            if p.pattern.removesuffix(".weight") in kinds
        ]
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group,
            "desc_act": any(layer.spec.row_order for layer in layers),
            "sym": symmetric,
            "lm_head": any(layer.module == "lm_head" for layer in layers),
            "checkpoint_format": self.checkpoint_format,
            "pack_dtype": "int32",
        }
        if left:
            config["dynamic"] = {f"-:^{name.replace('.', chr(92) + '.')}$": {} for name in left}
        return config

    def word(self, layer: Layer) -> str:
        """The version, and fdq's name of the format."""
        return f"{self.checkpoint_format} ({layer.scheme})"

    def notes(self, layers: Sequence[Layer]) -> tuple[str, ...]:
        """Of levels in more bits."""
        return integers.widened(list(layers))


def _said(layer: Layer) -> tuple[int | None, int, bool]:
    return integers.stored_bits(layer.spec), layer.spec.group_size or -1, layer.spec.symmetric


class Exporter(HuggingFaceExporter):
    """One of the versions."""

    def __init__(self, name: str):
        self.name = name

    def layout(self, layers: Sequence[Layer]) -> Layout:
        """The same for all."""
        del layers
        return Gptq(self.name)


GPTQ = Exporter("gptq")
GPTQ_V2 = Exporter("gptq_v2")
