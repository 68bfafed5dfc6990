"""compressed-tensors: what llm-compressor and much of vLLM's hub write.

=========================  ==========================================================  ==========
`format`                   codes of a layer `[out, in]`                                scales
=========================  ==========================================================  ==========
`pack-quantized`           `weight_packed` int32 `[out, in bits / 32]`, offset binary  `[out, G]`
                           (2 to 8 bits; `weight_g_idx` int32 `[in]` with `actorder`)
`int-quantized`            `weight` int8                                               `[out, G]`
`float-quantized`,         `weight` e4m3                                               `[out, 1]`,
`naive-quantized`                                                                      `[1]`, blocks
`nvfp4-pack-quantized`     `weight_packed` uint8, low nibble first                     e4m3, float32
`mxfp4-pack-quantized`     the same                                                    e8m0 as uint8
`mxfp8-quantized`          `weight` e4m3                                               e8m0 as uint8
=========================  ==========================================================  ==========

Source: compressed-tensors 0.20. Words of 3, 5, 6 and 7 bits were not dense before (ten codes of 3
bits in 32). fdq holds codes of 5, 6 and 7 bits as int8.
"""

import dataclasses
import logging
from typing import Any

import numpy as np

from fdq.schemes.scheme import ActivationSpec, CacheSpec, WeightSpec
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
from fdq_checkpoints.sources.group_index import in_order_of_groups, order_of_rows
from fdq_checkpoints.sources.stored_cache import StoredCache, plain_scales
from fdq_checkpoints.sources.stored_weight import Linear, StoredWeight

_FLOATS = ("float-quantized", "naive-quantized")
_FORMATS = (
    *("pack-quantized", "int-quantized", *_FLOATS),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"),
)
_LINEAR = "Linear"
_G_IDX, _ZERO = "weight_g_idx", "weight_zero_point"
_BITS = (2, 3, 4, 5, 6, 7, 8)
_INTEGERS = ("int2", "int3", "int4", "int8")
# Both have two names; `weight` and `static` leave groups of rows that lie together.
_BY_GROUP = ("group", "dynamic", True)
_ACTORDER = (*_BY_GROUP, "weight", "static", False)
_CACHES: dict[Any, str] = {("float", 8): "Cfp8-kvhead", ("int", 8): "C8-kvhead"}
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
        group = self._group_of(module)
        if "pack" in group.format:
            make = self._packed if group.format == "pack-quantized" else self._float4
        else:
            make = self._plain
        spec, shape, ends = make(module, group)
        if self.has(module, "weight_shape"):
            ends = (*ends, "weight_shape")
        if self.has(module, _G_IDX):
            ends = (*ends, _G_IDX)
        activation, scale = group.activation, None
        if activation is not None and not activation.dynamic:
            scale = self.static_input(module, "input_scale")
        linear = Linear(
            module=module,
            shape=shape,
            spec=spec,
            activation=activation,
            ends=ends,
            input_scale=scale,
            whole=self.whole_scale(module, ends[2]) if spec.format == "nvfp4" else None,
        )
        return self._ordered(linear, group.weights)

    def _group_of(self, module: str) -> _Group:
        """The first group that a module is of."""
        group = next((one for one in self.groups if one.targets.match(module)), None)
        group = group or next((one for one in self.groups if one.all_linear), None)
        if group is None:
            raise CheckpointError(
                f"{self.directory.path}: {module} has codes, but no config group of "
                f"{self.section.where} is about it."
            )
        return group

    def _ordered(self, linear: Linear, weights: Section) -> Linear:
        """The layer with an order of its rows, where its groups are of rows that lie apart."""
        order = weights.one_of("actorder", _ACTORDER, False)
        if not self.has(linear.module, _G_IDX):
            if order in _BY_GROUP and linear.spec.granularity == "group":
                self.info(linear.module, _G_IDX)  # is missing
            return linear
        self.check(linear.module, _G_IDX, linear.shape[1:], "int32", "int64")
        if (self.read_end(linear, _G_IDX) == -1).all():  # as it was before calibration
            return linear
        if linear.spec.granularity == "group" and linear.spec.format not in _INTEGERS:
            raise self.shape_problem(linear.module, f"{linear.spec} takes no {_G_IDX}")
        return in_order_of_groups(self, linear, _G_IDX)

    def cache(self, config: Any) -> StoredCache | None:
        """By `kv_cache_scheme`: static scales of a tensor, or of each head."""
        part = self.section.part("kv_cache_scheme")
        if part is None:
            return None
        kind = _CACHES.get((part.content.get("type"), part.content.get("num_bits")))
        dynamic = part.content.get("dynamic")
        if kind is None or dynamic or not part.flag("symmetric", True):
            _LOGGER.warning(
                "%s: kv_cache_scheme is none of fdq's static ones and left out; choose the cache, "
                "such as cache='C8'.",
                self.section.where,
            )
            return None
        prefix, spec = "model.layers.{i}.self_attn.", CacheSpec.parse(kind)
        assert spec is not None
        names = (f"{prefix}k_scale", f"{prefix}v_scale")
        return plain_scales(self.directory, config, spec, *names, self.section.where)

    def leaves(self, module: str) -> bool:
        """What is to be ignored, or no group is about."""
        named = any(one.all_linear or one.targets.match(module) for one in self.groups)
        return self.ignored.match(module) or not named

    def _packed(self, module: str, group: _Group) -> tuple[WeightSpec, tuple[int, int], Any]:
        weights = group.weights
        bits = weights.one_of("num_bits", _BITS)
        weights.one_of("type", ("int",), "int")
        words = self.check(module, "weight_packed", self.info(module, "weight_packed").shape,
                           "int32")  # fmt: skip
        n, k = self._shape(module)
        if len(words.shape) != 2 or words.shape not in [(n, w) for w in packing.words_of(k, bits)]:
            raise self.shape_problem(module, f"{words.shape} are no {bits}-bit codes of [{n}, {k}]")
        size = self._group_size(module, weights, k)
        groups = k // size
        symmetric = weights.flag("symmetric", True)
        whole = symmetric and weights.content.get("strategy") == "tensor"
        expected = (1,) if whole else (n, groups)
        scales = self.check(module, "weight_scale", expected, "float32", "bfloat16", "float16")
        ends = ("weight_packed", "weight_scale")
        if not symmetric:
            found, (dense, padded) = self.info(module, _ZERO).shape, packing.words_of(n, bits)
            zero = (padded if found == (padded, groups) else dense, groups)
            self.check(module, _ZERO, zero, "int32")
            ends = (*ends, _ZERO)
        spec = integer_spec(
            8 if bits > 4 else bits,
            None if groups == 1 else size,
            zero_point="none" if symmetric else "integer",
            scale_dtype=scale_dtype(scales, self.directory),
        )
        return spec, (n, k), ends

    def _plain(self, module: str, group: _Group) -> tuple[WeightSpec, tuple[int, int], Any]:
        info = self.matrix(module, "weight")
        n, k = info.shape
        group.weights.one_of("num_bits", (8,))
        types = {"int-quantized": ("int",), "naive-quantized": ("int", "float")}
        is_int = group.weights.one_of("type", types.get(group.format, ("float",))) == "int"
        kind = "int8" if is_int else "float8_e4m3fn"
        self.check(module, "weight", (n, k), kind)
        scales, ends = self.info(module, "weight_scale"), ("weight", "weight_scale")
        if group.format == "mxfp8-quantized":
            self.check(module, "weight_scale", (n, k // 32), "uint8")
            return _spec("mxfp8", "group", 32, "float8_e8m0fnu"), (n, k), ends
        if not group.weights.flag("symmetric", True) or self.has(module, _ZERO):
            self.info(module, _ZERO)
            ends = (*ends, _ZERO)
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
        group.weights.one_of("num_bits", (4,))
        group.weights.one_of("type", ("float",))
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
        lopsided = spec.format.startswith("int") and spec.zero_point == "none"
        scale = self.scale_of(linear, "weight_scale", signed=lopsided)
        scale = scale.reshape(1, 1) if spec.granularity == "tensor" else scale.T
        if scale.ndim == 1:  # of a tensor, beside packed codes
            scale = np.repeat(scale[None], n, axis=1)
        arrays = {"scale": np.ascontiguousarray(scale)}
        if "weight" in linear.ends:
            is_float = spec.format != "int8"
            codes = (self.float8_of if is_float else self.read_end)(linear, "weight")
            if _ZERO in linear.ends and self.read_end(linear, _ZERO).any():
                raise self.bad(linear, _ZERO, "zero points that are not 0")
            codes = np.ascontiguousarray(codes.T)
            if spec.row_order:
                arrays["row_order"] = order = order_of_rows(self, linear, _G_IDX)
                codes = codes[order]
            return StoredWeight(spec, k, codes, arrays)
        bits = self._group_of(linear.module).weights.whole("num_bits")
        words, held = self.read_end(linear, "weight_packed"), int(spec.format.removeprefix("int"))
        if held == bits and words.shape[1] == packing.words_of(k, bits)[0]:
            codes = packing.along_in(words, k, bits)
        else:
            plain = np.ascontiguousarray(packing.words_unpacked(words, k, bits).T)
            codes = packing.packed(plain, held)
        if spec.zero_point == "integer":
            columns = np.ascontiguousarray(self.read_end(linear, _ZERO).T)
            zero = packing.words_unpacked(columns, n, bits)
            arrays["zero"] = np.ascontiguousarray(zero)
        if spec.row_order:
            arrays["row_order"] = order = order_of_rows(self, linear, _G_IDX)
            codes = packing.in_order(codes, k, held, order)
        if spec.zero_point == "none" and held == 8:
            codes = (codes - np.uint8(2 ** (bits - 1))).view(np.int8)
        return StoredWeight(spec, k, codes, arrays)

    def _read_small_float(self, linear: Linear) -> StoredWeight:
        arrays = {}
        if linear.spec.format == "nvfp4":
            scale = self.float8_scale_of(linear, "weight_scale")
            assert linear.whole is not None
            arrays["global_scale"] = np.full((1, 1), 1 / np.float32(linear.whole), np.float32)
        else:
            scale = self.power_of(linear, "weight_scale")
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
        _LOGGER.warning(
            "%s: inputs with zero points of their own, which fdq has not; they stay in 16 bits.",
            part.where,
        )
        return None
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
