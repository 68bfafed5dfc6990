"""NVIDIA ModelOpt: NVFP4, FP8 per tensor or per channel and token, FP8 in blocks, int4 and int8.

======================  ==============================  ========================================
`quant_algo`            codes of a layer `[out, in]`    scales, which all multiply
======================  ==============================  ========================================
`NVFP4`                 `weight` uint8 `[out, in / 2]`  e4m3 `[out, in / 16]`, `weight_scale_2`
`FP8`                   `weight` e4m3                   `weight_scale` float32 `()`
`fp8_pb_wo`             the same                        float32 `[out / 128, 1, in / 128, 1]`
`W4A16_AWQ`             `weight` uint8 `[out / 2, in]`  `[out, in / g]`
`W8A8_SQ_PER_CHANNEL`   `weight` int8                   `[out]`, `input_scale`
======================  ==============================  ========================================

The last two may have `pre_quant_scale` `[in]`, which multiplies inputs: such layers are decoded.
`MIXED_PRECISION` says by layer which of them it is. Source: nvidia-modelopt 0.47 (`export`).
"""

import logging
import re
from typing import Any

import numpy as np

from fdq.schemes.scheme import ActivationSpec, CacheSpec, WeightSpec
from fdq_checkpoints.readers.source_directory import SourceDirectory
from fdq_checkpoints.sources import bits as packing
from fdq_checkpoints.sources.codec import (
    SCALE_DTYPES,
    Codec,
    Names,
    Section,
    check_ignored,
    codes_of_ignored,
    integer_spec,
    scale_dtype,
)
from fdq_checkpoints.sources.stored_cache import StoredCache, plain_scales
from fdq_checkpoints.sources.stored_weight import Linear, StoredWeight

_BLOCK = 128
_PER_TOKEN, _AWQ, _SMOOTH = "FP8_PER_CHANNEL_PER_TOKEN", "W4A16_AWQ", "W8A8_SQ_PER_CHANNEL"
_OF_LAYERS = ("NVFP4", "FP8", _PER_TOKEN, "fp8_pb_wo", "FP8_PB_WO", _AWQ, _SMOOTH)
_MIXED = "MIXED_PRECISION"
_LOGGER = logging.getLogger("fdq")


class ModelOpt(Codec):
    """Weights, and static scales of inputs in 8 bits; inputs in four bits stay in 16."""

    methods = ("modelopt", "modelopt_fp4", "nvfp4")
    codes = ("weight_scale",)
    unused = ("input_scale", "k_scale", "v_scale")

    def __init__(self, directory: SourceDirectory, section: Section):
        super().__init__(directory, section)
        algorithm = section.one_of("quant_algo", (*_OF_LAYERS, _MIXED))
        self.of_layers: dict[str, Section] | None = None
        if algorithm == _MIXED:
            layers = section.part("quantized_layers")
            if layers is None:
                raise section.wrong("quantized_layers", "an object of layers")
            self.of_layers = dict(zip(layers.content, layers.parts(), strict=True))
            for layer in self.of_layers.values():
                layer.one_of("quant_algo", _OF_LAYERS)
        names = section.names("ignore", "exclude_modules")
        # With `*` for anything.
        patterns = [
            f"re:{'.*'.join(map(re.escape, n.split('*')))}$" if "*" in n else n for n in names
        ]
        self.ignored = Names(tuple(patterns), section.where)

    def _section(self, module: str) -> Section:
        """What the config says of a layer."""
        if self.of_layers is None:
            return self.section
        if module not in self.of_layers:
            raise codes_of_ignored(self.directory, module)
        return self.of_layers[module]

    def cache(self, config: Any) -> StoredCache | None:
        """Scales of keys and values, which are beside those of the projections that make them."""
        said = self.section.content.get("kv_cache_quant_algo")
        part = self.section.part("kv_cache_scheme")
        if said is None and part is None:
            return None
        scheme = None if part is None else (part.content.get("type"), part.content.get("num_bits"))
        if said not in (None, "FP8") or scheme not in (None, ("float", 8)):
            _LOGGER.warning(
                "%s: scales of a KV cache that is none of fdq's static ones are left out; choose "
                "the cache, such as cache='C8'.",
                self.section.where,
            )
            return None
        spec, prefix = CacheSpec.parse("Cfp8-kvhead"), "model.layers.{i}.self_attn."
        assert spec is not None
        names = (f"{prefix}k_proj.k_scale", f"{prefix}v_proj.v_scale")
        return plain_scales(self.directory, config, spec, *names, self.section.where)

    def linears(self) -> dict[str, Linear]:
        """Also checks that what is to be ignored has no codes."""
        found = super().linears()
        check_ignored(self.directory, found, self.ignored)
        if any(linear.input_scale for linear in found.values()):
            for module, linear in found.items():  # but of experts that saw no token
                static = linear.spec.format == "float8_e4m3" and linear.activation is None
                if static and ".experts." not in module:
                    self.static_input(module, "input_scale")
        return found

    def leaves(self, module: str) -> bool:
        """What is to be ignored; of several algorithms, what has none."""
        return self.ignored.match(module) or module not in (self.of_layers or {module})

    def linear(self, module: str) -> Linear:
        """By the dtype of the codes, which says more than the config's label."""
        info, section = self.matrix(module, "weight"), self._section(module)
        algorithm = section.content["quant_algo"]
        if algorithm in (_AWQ, _SMOOTH):
            return self._integers(module, section)
        if info.dtype.name == "uint8":
            if algorithm != "NVFP4":
                raise self.shape_problem(module, f"uint8, which quant_algo {algorithm} has not")
            n, k = info.shape[0], 2 * info.shape[1]
            self.check(module, "weight_scale", (n, k // 16), "float8_e4m3fn")
            spec = WeightSpec(
                format="nvfp4",
                granularity="group",
                group_size=16,
                scale_dtype="float8_e4m3fn",
            )
            ends = ("weight", "weight_scale", "weight_scale_2")
            return Linear(
                module=module,
                shape=(n, k),
                spec=spec,
                activation=None,
                ends=ends,
                whole=self.whole_scale(module, ends[2]),
            )
        n, k = info.shape
        self.check(module, "weight", (n, k), "float8_e4m3fn")
        scales = self.info(module, "weight_scale")
        spec = WeightSpec(format="float8_e4m3")
        if len(scales.shape) == 4:
            self.check(module, "weight_scale", (-(-n // _BLOCK), 1, -(-k // _BLOCK), 1), "float32")
            size = (_BLOCK, _BLOCK)
            spec = WeightSpec(format="float8_e4m3", granularity="block", block_size=size)
        elif scales.shape in ((), (1,)):
            self.check(module, "weight_scale", scales.shape, "float32")
            spec = WeightSpec(format="float8_e4m3", granularity="tensor")
        else:
            self.check(module, "weight_scale", (n,), "float32")
        activation = scale = None
        if algorithm == _PER_TOKEN:
            activation = ActivationSpec(format="float8_e4m3")
        elif self.has(module, "input_scale"):
            scale = self.static_input(module, "input_scale")
            activation = ActivationSpec(format="float8_e4m3", granularity="tensor", dynamic=False)
        return Linear(
            module=module,
            shape=(n, k),
            spec=spec,
            activation=activation,
            ends=("weight", "weight_scale"),
            input_scale=scale,
        )

    def _integers(self, module: str, section: Section) -> Linear:
        """A layer of int4, packed along out, or of int8."""
        info, activation, scale = self.matrix(module, "weight"), None, None
        n, k = info.shape
        if section.content["quant_algo"] == _AWQ:
            n *= 2
            self.check(module, "weight", info.shape, "uint8")
            group = section.whole("group_size", k)
            if group < 1 or k % group:
                raise self.shape_problem(module, f"groups of {group} rows do not divide {k}")
            scales = self.check(module, "weight_scale", (n, k // group), *SCALE_DTYPES)
            dtype = scale_dtype(scales, self.directory)
            spec = integer_spec(4, None if group == k else group, scale_dtype=dtype)
        else:
            self.check(module, "weight", info.shape, "int8")
            scales = self.check(module, "weight_scale", (n,), *SCALE_DTYPES)
            spec = integer_spec(8, None, scale_dtype=scale_dtype(scales, self.directory))
            scale = self.static_input(module, "input_scale")
            activation = ActivationSpec(format="int8", granularity="tensor", dynamic=False)
        factor = "pre_quant_scale" if self.has(module, "pre_quant_scale") else None
        if factor is not None:
            self.check(module, factor, (k,), *SCALE_DTYPES)
        return Linear(
            module=module,
            shape=(n, k),
            spec=spec,
            activation=activation,
            ends=("weight", "weight_scale", *([factor] if factor else [])),
            input_scale=scale,
            input_factor=factor,
        )

    def read(self, linear: Linear) -> StoredWeight:
        """Turned from `[out, in]` to `[in, out]`."""
        k, spec, arrays = linear.shape[1], linear.spec, {}
        if spec.format in ("int4", "int8"):
            codes, scale = self.read_end(linear, "weight"), self.scale_of(linear, "weight_scale")
            if spec.format == "int4":  # rows 2r and 2r + 1 in a byte, two's complement
                halves = (codes & np.uint8(15), codes >> np.uint8(4))
                rows = np.stack(halves, axis=1).reshape(linear.shape) ^ np.uint8(8)
                codes = packing.packed(np.ascontiguousarray(rows.T), 4).T
            arrays["scale"] = np.ascontiguousarray(scale.reshape(linear.shape[0], -1).T)
            return StoredWeight(spec, k, np.ascontiguousarray(codes.T), arrays)
        if spec.format == "nvfp4":
            codes, scale = (
                self.read_end(linear, "weight"),
                self.float8_scale_of(linear, "weight_scale"),
            )
            arrays["global_scale"] = np.full((1, 1), linear.whole, np.float32)
        else:
            codes, scale = self.float8_of(linear, "weight"), self.scale_of(linear, "weight_scale")
            if scale.ndim == 4:
                scale = scale[:, 0, :, 0]
            elif scale.ndim < 2:
                scale = scale.reshape(-1, 1)
        arrays["scale"] = np.ascontiguousarray(scale.T)
        return StoredWeight(spec, k, np.ascontiguousarray(codes.T), arrays)
