"""NVIDIA ModelOpt: NVFP4, FP8 per tensor or per channel and token, FP8 in blocks.

============  ==============================  ==================================================
`quant_algo`  codes of a layer `[out, in]`    scales, which all multiply
============  ==============================  ==================================================
`NVFP4`       `weight` uint8 `[out, in / 2]`  e4m3 `[out, in / 16]`, `weight_scale_2` float32
`FP8`         `weight` e4m3                   `weight_scale` float32 `()`
`fp8_pb_wo`   the same                        float32 `[out / 128, 1, in / 128, 1]`
============  ==============================  ==================================================

Source: nvidia-modelopt 0.47 (`export`).
"""

import re

import numpy as np

from fdq.schemes.scheme import ActivationSpec, WeightSpec
from fdq_checkpoints.readers.source_directory import SourceDirectory
from fdq_checkpoints.sources.codec import Codec, Names, Section, check_ignored
from fdq_checkpoints.sources.stored_weight import Linear, StoredWeight

_BLOCK = 128
_PER_TOKEN = "FP8_PER_CHANNEL_PER_TOKEN"
_ALGORITHMS = ("NVFP4", "FP8", _PER_TOKEN, "fp8_pb_wo", "FP8_PB_WO")


class ModelOpt(Codec):
    """Weights, and static scales of inputs in float8; inputs in four bits stay in 16."""

    methods = ("modelopt", "modelopt_fp4", "nvfp4")
    codes = ("weight_scale",)
    unused = ("input_scale", "k_scale", "v_scale")

    def __init__(self, directory: SourceDirectory, section: Section):
        super().__init__(directory, section)
        self.algorithm = section.one_of("quant_algo", _ALGORITHMS)
        names = section.names("ignore", "exclude_modules")
        # With `*` for anything.
        patterns = [
            f"re:{'.*'.join(map(re.escape, n.split('*')))}$" if "*" in n else n for n in names
        ]
        self.ignored = Names(tuple(patterns), section.where)

    def linears(self) -> dict[str, Linear]:
        """Also checks that what is to be ignored has no codes."""
        found = super().linears()
        check_ignored(self.directory, found, self.ignored)
        return found

    def linear(self, module: str) -> Linear:
        """By the dtype of the codes, which says more than the config's label."""
        info = self.matrix(module, "weight")
        if info.dtype.name == "uint8":
            if self.algorithm != "NVFP4":
                raise self.shape_problem(
                    module, f"uint8, which quant_algo {self.algorithm} has not"
                )
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
        if self.algorithm == _PER_TOKEN:
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

    def read(self, linear: Linear) -> StoredWeight:
        """Turned from `[out, in]` to `[in, out]`."""
        k, spec, arrays = linear.shape[1], linear.spec, {}
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
