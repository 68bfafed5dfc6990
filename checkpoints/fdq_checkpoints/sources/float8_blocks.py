"""Float8 as DeepSeek, Qwen and others publish it, and per channel as fbgemm writes it.

`weight` e4m3 `[out, in]` and `weight_scale_inv` `[ceil(out / 128), ceil(in / 128)]`, which
multiplies in spite of its name; the last blocks may be partial, so their size is what
`weight_block_size` says and is never derived from shapes. `fbgemm_fp8`: `weight_scale` `[out, 1]`.
"""

import numpy as np

from fdq.schemes.scheme import ActivationSpec, WeightSpec
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.readers.source_directory import SourceDirectory
from fdq_checkpoints.sources.codec import (
    SCALE_DTYPES,
    Codec,
    Names,
    Section,
    check_ignored,
    scale_dtype,
)
from fdq_checkpoints.sources.stored_weight import Linear, StoredWeight

_OF_INPUTS = ("input_scale", "activation_scale")


class Float8(Codec):
    """Codes of e4m3."""

    methods = ("fp8", "fbgemm_fp8")
    codes = ("weight_scale_inv", "weight_scale")
    unused = (*_OF_INPUTS, "k_scale", "v_scale", "input_scale_ub")

    def __init__(self, directory: SourceDirectory, section: Section):
        super().__init__(directory, section)
        section.one_of("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
        section.absent("expert_dtype", because="experts in other codes are not read")
        blocks = section.content.get("weight_block_size") is not None
        self.block = section.pair("weight_block_size") if blocks else None
        names = section.names("modules_to_not_convert", "ignored_layers")
        self.ignored = Names(names, section.where)
        scheme = section.one_of("activation_scheme", ("dynamic", "static"), "dynamic")
        spec = ActivationSpec(format="float8_e4m3")
        if scheme == "static":
            spec = ActivationSpec(format="float8_e4m3", granularity="tensor", dynamic=False)
        elif self.block is not None:
            size = self.block[1]
            spec = ActivationSpec(format=spec.format, granularity="token_group", group_size=size)
        self.activation = spec

    def linears(self) -> dict[str, Linear]:
        """Also checks that what is to be left in floats has no codes, and codes have scales."""
        found = super().linears()
        check_ignored(self.directory, found, self.ignored)
        for name, info in self.directory.tensors.items():
            if info.dtype.itemsize == 1 and info.dtype.kind != "b":
                module, _, end = name.rpartition(".")
                if end == "weight" and module not in found:
                    raise CheckpointError(
                        f"{self.directory.file_name(name)}: tensor {name} holds codes without "
                        "scales. Download the model again."
                    )
        return found

    def leaves(self, module: str) -> bool:
        """What the config names."""
        return self.ignored.match(module)

    def linear(self, module: str) -> Linear:
        """By the shape of the codes."""
        info = self.matrix(module, "weight")
        n, k = info.shape
        self.check(module, "weight", (n, k), "float8_e4m3fn")
        end = self.codes[0] if self.has(module, self.codes[0]) else self.codes[1]
        if self.block is not None:
            out, rows = self.block
            dtypes = (*SCALE_DTYPES, "float8_e8m0fnu")
            scales = self.check(module, end, (-(-n // out), -(-k // rows)), *dtypes)
            spec = WeightSpec(
                format="float8_e4m3",
                granularity="block",
                block_size=(rows, out),
                scale_dtype=scales.dtype.name,
            )
        else:
            scales = self.info(module, end)
            per_channel = scales.shape in ((n, 1), (n,))
            if not per_channel and scales.shape not in ((), (1,)):
                raise self.shape_problem(module, f"scales {scales.shape} are not of {(n, k)}")
            spec = WeightSpec(
                format="float8_e4m3",
                granularity="channel" if per_channel else "tensor",
                scale_dtype=scale_dtype(scales, self.directory),
            )
        static = not self.activation.dynamic
        return Linear(
            module=module,
            shape=(n, k),
            spec=spec,
            activation=self.activation,
            ends=("weight", end),
            input_scale=self.static_input(module, *_OF_INPUTS) if static else None,
        )

    def read(self, linear: Linear) -> StoredWeight:
        """Turned from `[out, in]` to `[in, out]`."""
        codes = np.ascontiguousarray(self.float8_of(linear, "weight").T)
        scale = self.scale_of(linear, linear.ends[1])
        if self.block is None:
            scale = scale.reshape(1, -1)
        arrays = {"scale": np.ascontiguousarray(scale if self.block is None else scale.T)}
        return StoredWeight(linear.spec, linear.shape[1], codes, arrays)
