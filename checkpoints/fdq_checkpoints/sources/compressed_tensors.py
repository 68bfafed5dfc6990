"""compressed-tensors: what llm-compressor and much of vLLM's hub write.

=========================  ==========================================================  ==========
`format`                   codes of a layer `[out, in]`                                scales
=========================  ==========================================================  ==========
`pack-quantized`           `weight_packed` int32 `[out, in bits / 32]`, offset binary  `[out, G]`
`int-quantized`            `weight` int8                                               `[out, G]`
`float-quantized`,         `weight` e4m3                                               `[out, 1]`,
`naive-quantized`                                                                      `[1]`, blocks
`nvfp4-pack-quantized`     `weight_packed` uint8, low nibble first                     e4m3, float32
`mxfp4-pack-quantized`     the same                                                    e8m0 as uint8
`mxfp8-quantized`          `weight` e4m3                                               e8m0 as uint8
=========================  ==========================================================  ==========

Source: compressed-tensors 0.20. Its 3-bit words were not dense before (ten codes in 32 bits).
"""

import dataclasses
import logging
from typing import Any

import ml_dtypes
import numpy as np

from fdq.schemes.scheme import ActivationSpec, WeightSpec
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.readers.source_directory import SourceDirectory
from fdq_checkpoints.sources import bits as packing
from fdq_checkpoints.sources.codec import (
    Codec,
    Names,
    Section,
    check_ignored,
    integer_spec,
    scale_dtype,
)
from fdq_checkpoints.sources.stored_weight import Linear, StoredWeight

_FLOATS = ("float-quantized", "naive-quantized")
_FORMATS = (
    *("pack-quantized", "int-quantized", *_FLOATS),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"),
)
_LINEAR = "Linear"
_LOGGER = logging.getLogger("fdq")


@dataclasses.dataclass(frozen=True)
class _Group:
    """One of `config_groups`: which modules, and how they are stored."""

    format: str
    targets: Names
    all_linear: bool
    weights: Section
    activation: ActivationSpec | None


class CompressedTensors(Codec):
    """All its formats but sparse ones."""

    methods = ("compressed-tensors",)
    codes = ("weight_packed", "weight_scale")
    unused = (
        *("input_scale", "input_zero_point", "input_global_scale", "k_scale", "v_scale"),
        *("output_scale", "output_zero_point", "q_scale"),
    )

    def __init__(self, directory: SourceDirectory, section: Section):
        super().__init__(directory, section)
        if section.content.get("quantization_status") not in ("compressed", "frozen", None):
            raise section.wrong("quantization_status", "'compressed'")
        sparsity = section.part("sparsity_config")
        if sparsity and sparsity.content.get("format") not in (None, "dense"):
            raise sparsity.wrong("format", "'dense': sparse weights are not read")
        section.absent("transform_config", because="rotations of weights are not undone")
        if section.content.get("kv_cache_scheme"):
            _LOGGER.warning(
                "%s: kv_cache_scheme is not read; choose the cache, such as cache='C8'.",
                section.where,
            )
        default = section.content.get("format")
        groups = section.part("config_groups")
        if groups is None:
            raise section.wrong("config_groups", "an object")
        self.groups = [self._group(part, default) for part in groups.parts()]
        self.ignored = Names(section.names("ignore"), section.where)

    def _group(self, part: Section, default: Any) -> _Group:
        known = Section({"format": part.content.get("format") or default}, part.where)
        part.absent("output_activations", because="outputs are not quantized here")
        targets = part.names("targets")
        weights = part.part("weights")
        if weights is None:
            raise part.wrong("weights", "an object")
        named = tuple(name for name in targets if name != _LINEAR)
        return _Group(
            known.one_of("format", _FORMATS),
            Names(named, part.where),
            _LINEAR in targets,
            weights,
            _activation(part.part("input_activations")),
        )

    def linears(self) -> dict[str, Linear]:
        """Also checks that what is to be ignored has no codes."""
        found = super().linears()
        check_ignored(self.directory, found, self.ignored)
        return found

    def linear(self, module: str) -> Linear | None:
        """By the first group that a module is of."""
        group = next((one for one in self.groups if one.targets.match(module)), None)
        group = group or next((one for one in self.groups if one.all_linear), None)
        if group is None:
            raise CheckpointError(
                f"{self.directory.path}: {module} has codes, but no config group of "
                f"{self.section.where} is about it."
            )
        if "pack" in group.format:
            make = self._packed if group.format == "pack-quantized" else self._float4
        else:
            make = self._plain
        spec, shape, ends = make(module, group)
        if self.has(module, "weight_shape"):
            ends = (*ends, "weight_shape")
        activation, scale = group.activation, None
        if activation is not None and not activation.dynamic:
            scale = self.static_input(module, "input_scale")
        return Linear(
            module=module,
            shape=shape,
            spec=spec,
            activation=activation,
            ends=ends,
            input_scale=scale,
            whole=self.whole_scale(module, ends[2]) if spec.format == "nvfp4" else None,
        )

    def _packed(self, module: str, group: _Group) -> tuple[WeightSpec, tuple[int, int], Any]:
        weights = group.weights
        bits = weights.one_of("num_bits", (2, 3, 4, 8))
        weights.one_of("type", ("int",), "int")
        if self.has(module, "weight_g_idx"):
            raise CheckpointError(
                f"{self.directory.path}: {module} has its rows in the order of activations "
                "(weight_g_idx), which is not read. Load the float original."
            )
        words = self.check(module, "weight_packed", self.info(module, "weight_packed").shape,
                           "int32")  # fmt: skip
        n, k = self._shape(module)
        if words.shape not in ((n, -(-k * bits // 32)), (n, -(-k // (32 // bits)))):
            raise self.shape_problem(module, f"{words.shape} are no {bits}-bit codes of [{n}, {k}]")
        size = self._group_size(module, weights, k)
        groups = k // size
        scales = self.check(module, "weight_scale", (n, groups), "float32", "bfloat16", "float16")
        symmetric = weights.flag("symmetric", True)
        ends = ("weight_packed", "weight_scale")
        if not symmetric:
            zero = (-(-n * bits // 32), groups)
            self.check(module, "weight_zero_point", zero, "int32")
            ends = (*ends, "weight_zero_point")
        spec = integer_spec(
            bits,
            None if groups == 1 else size,
            zero_point="none" if symmetric else "integer",
            scale_dtype=scale_dtype(scales, self.directory),
        )
        return spec, (n, k), ends

    def _plain(self, module: str, group: _Group) -> tuple[WeightSpec, tuple[int, int], Any]:
        info = self.matrix(module, "weight")
        n, k = info.shape
        kind = "int8" if group.format == "int-quantized" else "float8_e4m3fn"
        self.check(module, "weight", (n, k), kind)
        scales, ends = self.info(module, "weight_scale"), ("weight", "weight_scale")
        if group.format == "mxfp8-quantized":
            self.check(module, "weight_scale", (n, k // 32), "uint8")
            return _spec("mxfp8", "group", 32, "float8_e8m0fnu"), (n, k), ends
        if not group.weights.flag("symmetric", True) or self.has(module, "weight_zero_point"):
            self.info(module, "weight_zero_point")
            ends = (*ends, "weight_zero_point")
        dtype, name = scale_dtype(scales, self.directory), kind.removesuffix("fn")
        strategy = group.weights.one_of("strategy", ("tensor", "channel", "group", "block"))
        expected: tuple[int, ...] = (n, 1)
        spec = _spec(name, "channel", None, dtype)
        if strategy == "tensor":
            # A scale of one number has had both shapes.
            expected = () if scales.shape == () else (1,)
            spec = _spec(name, "tensor", None, dtype)
        elif strategy == "group":
            size = self._group_size(module, group.weights, k)
            expected, spec = (n, k // size), _spec(name, "group", size, dtype)
        elif strategy == "block":
            out, rows = group.weights.pair("block_structure")
            expected = (-(-n // out), -(-k // rows))
            spec = WeightSpec(
                format=name, granularity="block", block_size=(rows, out), scale_dtype=dtype
            )
        self.check(module, "weight_scale", expected, dtype)
        return spec, (n, k), ends

    def _float4(self, module: str, group: _Group) -> tuple[WeightSpec, tuple[int, int], Any]:
        info = self.matrix(module, "weight_packed")
        n, k = info.shape[0], 2 * info.shape[1]
        self.check(module, "weight_packed", info.shape, "uint8")
        if group.format == "mxfp4-pack-quantized":
            self.check(module, "weight_scale", (n, k // 32), "uint8")
            spec, ends = _spec("mxfp4", "group", 32, "float8_e8m0fnu"), ()
        else:
            self.check(module, "weight_scale", (n, k // 16), "float8_e4m3fn")
            spec, ends = _spec("nvfp4", "group", 16, "float8_e4m3fn"), ("weight_global_scale",)
        return spec, (n, k), ("weight_packed", "weight_scale", *ends)

    def _shape(self, module: str) -> tuple[int, int]:
        name = f"{module}.weight_shape"
        self.info(module, "weight_shape")
        shape = self.directory.read(name)
        if shape.shape != (2,) or shape.dtype.kind not in "iu" or (shape < 1).any():
            raise self.shape_problem(module, f"weight_shape {shape.tolist()} is no shape")
        return int(shape[0]), int(shape[1])

    def _group_size(self, module: str, weights: Section, k: int) -> int:
        if weights.one_of("strategy", ("tensor", "channel", "group", "block")) != "group":
            return k
        size = weights.whole("group_size")
        if size < 1 or k % size:
            raise self.shape_problem(module, f"groups of {size} rows do not divide {k}")
        return size

    def read(self, linear: Linear) -> StoredWeight:
        """Turned from `[out, in]` to `[in, out]`."""
        (n, k), spec = linear.shape, linear.spec
        if spec.format in ("mxfp4", "mxfp8", "nvfp4"):
            return self._read_small_float(linear)
        scale = self.scale_of(linear, "weight_scale")
        scale = scale.reshape(1, 1) if spec.granularity == "tensor" else scale.T
        arrays = {"scale": np.ascontiguousarray(scale)}
        if "weight" in linear.ends:
            is_float = spec.format != "int8"
            codes = (self.float8_of if is_float else self.read_end)(linear, "weight")
            zero = "weight_zero_point"
            if zero in linear.ends and self.read_end(linear, zero).any():
                raise self.bad(linear, zero, "zero points that are not 0")
            return StoredWeight(spec, k, np.ascontiguousarray(codes.T), arrays)
        bits = int(spec.format.removeprefix("int"))
        words = self.read_end(linear, "weight_packed")
        if words.shape[1] == -(-k * bits // 32):
            codes = packing.along_in(words, k, bits)
        else:  # whole codes in each word
            each = 32 // bits
            wide = words.view(np.uint32)[..., None] >> np.arange(
                0, each * bits, bits, dtype=np.uint32
            )
            plain = (wide & np.uint32(2**bits - 1)).astype(np.uint8).reshape(n, -1)[:, :k]
            codes = packing.packed(np.ascontiguousarray(plain.T), bits)
        if spec.zero_point == "integer":
            columns = self.read_end(linear, "weight_zero_point").T
            zero = packing.unpacked(np.ascontiguousarray(columns), n, bits)
            arrays["zero"] = np.ascontiguousarray(zero)
        elif bits == 8:
            codes = packing.signed(codes)
        return StoredWeight(spec, k, codes, arrays)

    def _read_small_float(self, linear: Linear) -> StoredWeight:
        scale = self.read_end(linear, "weight_scale")
        arrays = {}
        if linear.spec.format == "nvfp4":
            scale = self.float8_scale_of(linear, "weight_scale")
            assert linear.whole is not None
            arrays["global_scale"] = np.full((1, 1), 1 / np.float32(linear.whole), np.float32)
        else:
            if (scale == 0xFF).any():
                raise self.bad(linear, "weight_scale", "NaN")
            scale = scale.view(ml_dtypes.float8_e8m0fnu)
        arrays["scale"] = np.ascontiguousarray(scale.T)
        end = linear.ends[0]
        codes = self.float8_of(linear, end) if end == "weight" else self.read_end(linear, end)
        return StoredWeight(linear.spec, linear.shape[1], np.ascontiguousarray(codes.T), arrays)


def _spec(format: str, granularity: Any, group: int | None, dtype: str) -> WeightSpec:
    return WeightSpec(format=format, granularity=granularity, group_size=group, scale_dtype=dtype)


def _activation(part: Section | None) -> ActivationSpec | None:
    """How inputs are quantized; CheckpointError for what fdq has no kernel for."""
    if part is None:
        return None
    kind, bits = part.one_of("type", ("int", "float")), part.whole("num_bits")
    if bits == 4 and kind == "float":
        return None  # inputs in 4 bits are a choice of the hardware's; weights are the same
    if bits != 8:
        raise part.wrong("num_bits", "8")
    if not part.flag("symmetric", True):
        raise part.wrong("symmetric", "true")
    format = "int8" if kind == "int" else "float8_e4m3"
    if part.one_of("dynamic", (True, False, "local"), False) is False:
        part.one_of("strategy", ("tensor",), "tensor")
        return ActivationSpec(format=format, granularity="tensor", dynamic=False)
    if part.content.get("strategy") == "group":
        return ActivationSpec(
            format=format, granularity="token_group", group_size=part.whole("group_size")
        )
    part.one_of("strategy", ("token", "tensor"), "token")
    return ActivationSpec(format=format)
