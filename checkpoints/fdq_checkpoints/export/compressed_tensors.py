"""compressed-tensors, which vLLM and transformers load: the tensors that its importer describes.

Names and shapes: `fdq_checkpoints.sources.compressed_tensors`. Source: compressed-tensors 0.20,
whose own choice of a `format` is taken.
"""

import collections
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fdq.schemes.scheme import ActivationSpec, CacheSpec
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.export import integers
from fdq_checkpoints.export.huggingface import HuggingFaceExporter
from fdq_checkpoints.export.layout import (
    Layer,
    Layout,
    Shapes,
    common,
    crosses,
    scale_shape,
    turned,
)
from fdq_checkpoints.sources import bits as words
from fdq_checkpoints.sources.stored_weight import StoredWeight
from fdq_checkpoints.sources.tensor_names import Piece

_E4M3, _DENSE = "float8_e4m3", "--to dense decodes it"
_PACKED, _INTEGERS = "pack-quantized", "int-quantized"
_MICRO = {
    "nvfp4": ("nvfp4-pack-quantized", "torch.float8_e4m3fn"),
    "mxfp4": ("mxfp4-pack-quantized", "torch.uint8"),
    "mxfp8": ("mxfp8-quantized", "torch.uint8"),
}
_WHOLE = "weight_global_scale"


class CompressedTensors(Layout):
    """All of its formats that fdq has weights for."""

    def problem(self, layer: Layer) -> str | None:
        """By the format, its zero points, and blocks."""
        spec = layer.spec
        if spec.format == "nf4":
            return (
                "compressed-tensors has no NF4; --to bitsandbytes has it, and --to dense "
                "decodes it."
            )
        if integers.own_bits(spec) is not None:
            if integers.stored_bits(spec) is None:
                return f"levels at odd multiples of scale / 2 in 8 bits; {_DENSE}."
            return None
        if spec.format not in (*_MICRO, _E4M3):
            return f"compressed-tensors has no such weights; {_DENSE}."
        if crosses(layer):
            return f"its blocks lie across {layer.module} and its neighbour; {_DENSE}."
        return None

    def format(self, layer: Layer) -> str:
        """What compressed-tensors calls the format."""
        spec = layer.spec
        if spec.format in _MICRO:
            return _MICRO[spec.format][0]
        if spec.format == _E4M3:
            return "naive-quantized" if layer.activation is None else "float-quantized"
        # It also has int-quantized weights with zero points, and of fewer bits in whole bytes.
        plain = (spec.format, spec.zero_point) == ("int8", "none")
        return _INTEGERS if plain and layer.activation is not None else _PACKED

    def word(self, layer: Layer) -> str:
        """The format, and fdq's name of it."""
        return f"{self.format(layer)} ({layer.scheme})"

    def shapes(self, layer: Layer) -> Shapes:
        """As `arrays` makes them."""
        spec, n, k = layer.spec, layer.n, layer.k
        kind, scale = self.format(layer), (spec.scale_dtype, scale_shape(layer))
        if kind == _PACKED:
            bits = integers.stored_bits(spec)
            assert bits is not None
            groups = k // layer.group
            found: Shapes = {
                "weight_packed": (np.int32, (n, -(-k * bits // 32))),
                "weight_scale": (spec.scale_dtype, (n, groups)),
                "weight_shape": (np.int64, (2,)),
            }
            if spec.zero_point == "integer":
                found["weight_zero_point"] = (np.int32, (-(-n * bits // 32), groups))
            return found
        if spec.format in ("nvfp4", "mxfp4"):
            dtype = spec.scale_dtype if spec.format == "nvfp4" else np.uint8
            found = {"weight_packed": (np.uint8, (n, k // 2)), "weight_scale": (dtype, scale[1])}
            return found | ({_WHOLE: (np.float32, (1,))} if spec.format == "nvfp4" else {})
        dtype = np.int8 if kind == _INTEGERS else "float8_e4m3fn"
        if spec.format == "mxfp8":
            scale = (np.uint8, scale[1])
        elif spec.scale_dtype == "float8_e8m0fnu":
            scale = (np.float32, scale[1])
        if spec.granularity == "tensor":
            scale = (scale[0], (1,) if spec.format == _E4M3 else (n, 1))
        return {"weight": (dtype, (n, k)), "weight_scale": scale}

    def arrays(self, layer: Layer, weight: StoredWeight) -> dict[str, np.ndarray]:
        """Turned from `[in, out]` to `[out, in]`."""
        spec, shapes = layer.spec, self.shapes(layer)
        if self.format(layer) == _PACKED:
            found = integers.integers(layer, weight)
            arrays = {
                "weight_packed": words.words_along_in(found.codes, layer.k, found.bits),
                "weight_scale": turned(found.scale),
                "weight_shape": np.array([layer.n, layer.k], np.int64),
            }
            if found.zero is not None:
                zero = integers.packed_along_columns(found.zero, found.bits)
                arrays["weight_zero_point"] = turned(zero)
            return arrays
        if spec.granularity == "tensor" and spec.format == "int8":
            weight = weight.as_spec(type(spec)(format="int8", scale_dtype=spec.scale_dtype))
        (codes, _), (scale, (scale_dtype, scale_size)) = (
            next(iter(shapes.items())), ("weight_scale", shapes["weight_scale"]))  # fmt: skip
        stored = weight.arrays["scale"]
        if np.dtype(scale_dtype) == np.uint8:
            stored = stored.view(np.uint8)
        arrays = {
            codes: turned(weight.codes),
            scale: turned(stored).astype(scale_dtype).reshape(scale_size),
        }
        if _WHOLE in shapes:
            arrays[_WHOLE] = np.array([_inverse(weight.arrays["global_scale"].item())], np.float32)
        return arrays

    def config(self, layers: Sequence[Layer], floats: Sequence[Piece]) -> Mapping[str, Any]:
        """One group for each way to store a layer."""
        groups: dict[str, list[Layer]] = collections.defaultdict(list)
        for layer in layers:
            groups[json.dumps(self._group(layer))].append(layer)
        formats = [self.format(members[0]) for members in groups.values()]
        others = {_pattern_of(piece) for piece in floats}
        config_groups = {}
        for number, (said, members) in enumerate(groups.items()):
            rest = [m for key, other in groups.items() if key != said for m in other]
            mixed = others | {layer.pattern for layer in rest}
            targets = ["Linear"] if len(groups) == 1 else _targets(members, mixed)
            config_groups[f"group_{number}"] = {"targets": targets, **json.loads(said)}
        return {
            "quant_method": "compressed-tensors",
            "format": common(formats) or "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": config_groups,
            "ignore": _names((p.name.removesuffix(".weight"), _pattern_of(p)) for p in floats),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def _group(self, layer: Layer) -> dict[str, Any]:
        spec = layer.spec
        bits = integers.stored_bits(spec) or (4 if spec.format in ("nvfp4", "mxfp4") else 8)
        strategy = "tensor_group" if spec.format == "nvfp4" else spec.granularity
        if strategy == "tensor" and spec.format != _E4M3:
            strategy = "channel"
        weights: dict[str, Any] = {
            "num_bits": bits,
            "type": "int" if spec.format.startswith("int") else "float",
            "symmetric": spec.symmetric,
            "strategy": strategy,
            "group_size": spec.group_size,
            "dynamic": False,
        }
        if spec.block_size is not None:
            weights["block_structure"] = [spec.block_size[1], spec.block_size[0]]
        if spec.format in _MICRO:
            weights["scale_dtype"] = _MICRO[spec.format][1]
        return {
            "format": self.format(layer),
            "weights": weights,
            "input_activations": _inputs(layer.activation),
            "output_activations": None,
        }

    def notes(self, layers: Sequence[Layer]) -> tuple[str, ...]:
        """Of levels in more bits, and of what is a reciprocal."""
        whole = any(layer.spec.format == "nvfp4" for layer in layers)
        reciprocal = (
            "compressed-tensors stores the reciprocal of NVFP4's global scale: the last "
            "bit of that float32 may differ.",
        )
        return (*integers.widened(list(layers)), *(reciprocal if whole else ()))

    def cache(self, spec: CacheSpec) -> Mapping[str, Any] | None:
        """Float8 with a scale a head: what vLLM reads of those that fdq has."""
        if (spec.format, spec.granularity) != (_E4M3, "head"):
            return None
        float8 = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
        return {"kv_cache_scheme": float8 | {"strategy": "attn_head"}}


def _inputs(activation: ActivationSpec | None) -> dict[str, Any] | None:
    if activation is None:
        return None
    strategy = "group" if activation.granularity == "token_group" else activation.granularity
    return {
        "num_bits": 8,
        "type": "int" if activation.format == "int8" else "float",
        "symmetric": True,
        "strategy": strategy,
        "group_size": activation.group_size,
        "dynamic": activation.dynamic,
    }


def _inverse(scale: float) -> np.float32:
    """The float32 whose reciprocal is a scale, or is nearest to it."""
    one, wanted = np.float32(1), np.float32(scale)
    near = one / wanted
    tries = (near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(np.inf)))
    return next((x for x in tries if one / x == wanted), near)


def _pattern_of(piece: Piece) -> str:
    return piece.pattern.removesuffix(".weight")


def _targets(members: Sequence[Layer], mixed: set[str]) -> list[str]:
    """Names of the modules: a pattern for a kind of layer that is all of this group."""
    kinds = dict.fromkeys(layer.pattern for layer in members)
    whole = [_expression(kind) for kind in kinds if kind not in mixed]
    rest = ((m.module, m.pattern) for m in members if m.pattern in mixed)
    return [*whole, *_names(rest)]


def _names(modules: Iterable[tuple[str, str]]) -> list[str]:
    """Modules by name, all experts of a layer by one pattern."""
    found: dict[str, None] = {}
    for module, pattern in modules:
        before, expert, after = pattern.partition("{e}")
        if not expert:
            found[module] = None
            continue
        match = re.fullmatch(
            rf"(.*{re.escape(before.rpartition('}')[2])})\d+({re.escape(after)})", module
        )
        assert match is not None, (module, pattern)
        found[_expression(f"{match[1]}{{e}}{match[2]}")] = None
    return list(found)


def _expression(pattern: str) -> str:
    parts = re.split(r"\{[ie]\}", pattern)
    return "re:^" + r"\d+".join(map(re.escape, parts)) + "$"


class Exporter(HuggingFaceExporter):
    """Whatever compressed-tensors has a format for, several in one model too."""

    name = "compressed-tensors"

    def layout(self, layers: Sequence[Layer]) -> Layout:
        """The same for all."""
        del layers
        return CompressedTensors()


class OneFormat(HuggingFaceExporter):
    """compressed-tensors, of models all of whose quantized layers are of some formats."""

    def __init__(self, name: str, formats: tuple[str, ...]):
        self.name, self.formats = name, formats

    def layout(self, layers: Sequence[Layer]) -> Layout:
        """CheckpointError where a layer is of another format."""
        for layer in layers:
            if layer.spec.format not in self.formats:
                raise CheckpointError(
                    f"{layer.label} is not in {self.name}. Quantize it so first, or export it --to "
                    "compressed-tensors, which holds several formats."
                )
        return CompressedTensors()


COMPRESSED_TENSORS = Exporter()
