"""gpt-oss as it is published: its experts in MXFP4, all else in floats.

    <experts>.gate_up_proj_blocks   uint8 [E, out, in / 32, 16]   two codes of e2m1, the lower first
    <experts>.gate_up_proj_scales   uint8 [E, out, in / 32]       e8m0: 2^(s - 127)
    <experts>.gate_up_proj_bias     floats [E, out]

and the same of `down_proj`. Decoded it is `gate_up_proj [E, in, out]`, gate and up in turns.
"""

from typing import ClassVar

import ml_dtypes
import numpy as np

from fdq.schemes.scheme import WeightSpec
from fdq_checkpoints.sources.codec import Codec, Names, check_ignored
from fdq_checkpoints.sources.stored_weight import Linear, StoredWeight

_GROUP = 32
_SPEC = WeightSpec(
    format="mxfp4", granularity="group", group_size=_GROUP, scale_dtype="float8_e8m0fnu"
)
_BLOCKS = "_blocks"
_NO_SCALE = 0xFF  # e8m0's NaN


class Mxfp4(Codec):
    """Stacks of experts, each named by its weight in floats."""

    methods: ClassVar = ("mxfp4",)
    codes: ClassVar = ()

    def linears(self) -> dict[str, Linear]:
        """Every tensor of blocks."""
        found = {}
        for name in self.directory.tensors:
            if name.endswith(_BLOCKS):
                linear = self.linear(name.removesuffix(_BLOCKS))
                found[linear.floats] = linear
        self.section.flag("dequantize", False)
        ignored = Names(self.section.names("modules_to_not_convert"), self.section.where)
        check_ignored(self.directory, found, ignored)
        return found

    def linear(self, module: str) -> Linear:
        """The stack whose weight in floats is called `module`."""
        experts, _, weight = module.rpartition(".")
        ends = (f"{weight}{_BLOCKS}", f"{weight}_scales")
        shape = self.info(experts, ends[0]).shape
        if len(shape) != 4 or shape[-1] != _GROUP // 2 or not all(shape):
            problem = f"{shape} is not [experts, out, in / {_GROUP}, {_GROUP // 2}]"
            raise self.shape_problem(module, problem)
        count, n, groups, _ = shape
        self.check(experts, ends[0], shape, "uint8")
        self.check(experts, ends[1], (count, n, groups), "uint8")
        return Linear(
            module=experts,
            shape=(n, groups * _GROUP),
            spec=_SPEC,
            activation=None,
            ends=ends,
            weight=weight,
            experts=count,
        )

    def read(self, linear: Linear) -> StoredWeight:
        """One expert, turned from `[out, in]` to `[in, out]`."""
        assert linear.expert is not None
        blocks, scale = (
            self.directory.read_rows(name, linear.expert, linear.expert + 1)[0]
            for name in linear.names
        )
        if (scale == _NO_SCALE).any():
            raise self.bad(linear, linear.ends[1], "NaN")
        n, k = linear.shape
        codes = np.ascontiguousarray(blocks.reshape(n, k // 2).T)
        scale = np.ascontiguousarray(scale.view(ml_dtypes.float8_e8m0fnu).T)
        return StoredWeight(linear.spec, k, codes, {"scale": scale})
