"""torchao: integers, float8, MXFP4, MXFP8 and NVFP4 as its tensor subclasses are saved.

A weight `<module>.weight` is some tensors `<module>._weight_<part>`, and the metadata of their file
has JSON under its name: `_type`, and in `_data` the `block_size` (of out and in) and more.

==========================  ================================  ======================================
`_type`                     `qdata` of a layer `[out, in]`    beside it
==========================  ================================  ======================================
`Int8Tensor`                int8                              `scale`, `zero_point` int8
`IntxUnpackedToInt8Tensor`  int8, of fewer bits               the same, `(code - zero) * scale`
`Float8Tensor`              e4m3                              `scale`
`MXTensor`                  uint8 (low nibble first) or e4m3  `scale` e8m0
`NVFP4Tensor`               uint8, low nibble first           `scale` e4m3, `per_tensor_scale`
==========================  ================================  ======================================

Scales of the last two may lie in tiles of 128 x 4 (`is_swizzled_scales`). Source: torchao 0.18
(`prototype/safetensors`, `prototype/mx_formats/utils.py`).
"""

import logging
from typing import Any

import numpy as np

from fdq.schemes.scheme import ActivationSpec, WeightSpec
from fdq_checkpoints.errors import CheckpointError, shown
from fdq_checkpoints.readers import strict_json
from fdq_checkpoints.readers.source_directory import SourceDirectory
from fdq_checkpoints.sources import bits as packing
from fdq_checkpoints.sources.codec import SCALE_DTYPES, Codec, Section, scale_dtype
from fdq_checkpoints.sources.stored_weight import Linear, StoredWeight

_QDATA, _SCALE, _ZERO = "_weight_qdata", "_weight_scale", "_weight_zero_point"
_WHOLE = "_weight_per_tensor_scale"
_INTEGERS = ("Int8Tensor", "IntxUnpackedToInt8Tensor")
_TYPES = (*_INTEGERS, "Float8Tensor", "MXTensor", "NVFP4Tensor")
_TILE = (128, 4)
_LONGEST_DESCRIPTION = 100_000
_LOGGER = logging.getLogger("fdq")


class TorchAo(Codec):
    """What its safetensors hold; weights that only GPUs lay out (`Int4Tensor` ...) are refused."""

    methods = ("torchao",)
    codes = (_QDATA,)
    unused = ("_weight_act_per_tensor_scale",)

    def __init__(self, directory: SourceDirectory, section: Section):
        super().__init__(directory, section)
        self.has_zeros = _mentions(section.content.get("quant_type"), "ASYMMETRIC")
        self._told = False

    def linears(self) -> dict[str, Linear]:
        """Also checks that no part of a weight is left without its codes."""
        found = super().linears()
        for name in self.directory.tensors:
            module, _, end = name.rpartition(".")
            if end in (_SCALE, _ZERO, _WHOLE) and module not in found:
                raise CheckpointError(
                    f"{self.directory.file_name(name)}: tensor {shown(name)} is without codes. "
                    "Download the model again."
                )
        return found

    def linear(self, module: str) -> Linear:
        """As the metadata describes it."""
        kind, data = self._described(module)
        codes = self.matrix(module, _QDATA)
        n, k = codes.shape
        if kind in _INTEGERS:
            self.check(module, _QDATA, (n, k), "int8")
            return self._integers(module, kind, data, n, k)
        if kind == "Float8Tensor":
            self.check(module, _QDATA, (n, k), "float8_e4m3fn")
            scaling = self._scaling(module, data, n, k)
            spec = WeightSpec(format="float8_e4m3", **scaling)
            return self._linear(module, n, k, spec, self._activation(data))
        if kind == "NVFP4Tensor" or codes.dtype == np.uint8:
            self.check(module, _QDATA, (n, k), "uint8")
            k *= 2
        else:
            self.check(module, _QDATA, (n, k), "float8_e4m3fn")
        return self._small_float(module, kind, data, n, k, codes.dtype == np.uint8)

    def _integers(self, module: str, kind: str, data: Section, n: int, k: int) -> Linear:
        bits = 8
        if kind == "IntxUnpackedToInt8Tensor":
            target = data.part("target_dtype")
            name = None if target is None else target.content.get("_data")
            if name not in ("int2", "int3", "int4", "int8"):
                raise data.wrong("target_dtype", "int8, int4, int3 or int2")
            bits = int(name.removeprefix("int"))
        scaling = self._scaling(module, data, n, k)
        if scaling["granularity"] == "block":
            raise data.wrong("block_size", "a row, a part of one, or the whole matrix")
        # Int8Tensor has zero points for its inputs' sake; those of weights are 0.
        zero = "integer" if kind != "Int8Tensor" and self.has_zeros else "none"
        ends: tuple[str, ...] = ()
        if zero == "integer" or self.has(module, _ZERO):
            self.check(module, _ZERO, self.info(module, _SCALE).shape, "int8")
            ends = (_ZERO,)
        spec = WeightSpec(format=f"int{bits}", zero_point=zero, **scaling)
        return self._linear(module, n, k, spec, self._activation(data), *ends)

    def _small_float(
        self, module: str, kind: str, data: Section, n: int, k: int, packed: bool
    ) -> Linear:
        format = {"NVFP4Tensor": "nvfp4"}.get(kind, "mxfp4" if packed else "mxfp8")
        group = 16 if format == "nvfp4" else 32
        dtype = "float8_e4m3fn" if format == "nvfp4" else "float8_e8m0fnu"
        if data.whole("block_size") != group:
            raise data.wrong("block_size", str(group))
        if k % group:
            raise self.shape_problem(module, f"groups of {group} rows do not divide {k}")
        shape = (n, k // group)
        if data.flag("is_swizzled_scales", False):
            (rows, columns), (high, wide) = shape, _TILE
            shape = (-(-rows // high) * 32, -(-columns // wide) * 16)
        self.check(module, _SCALE, shape, dtype)
        whole, ends = None, ()
        if format == "nvfp4":
            whole = self.whole_scale(module, _WHOLE) if self.has(module, _WHOLE) else 1.0
            ends = (_WHOLE,) if self.has(module, _WHOLE) else ()
        spec = WeightSpec(format=format, granularity="group", group_size=group, scale_dtype=dtype)
        return self._linear(module, n, k, spec, self._activation(data), *ends, whole=whole)

    def _linear(
        self,
        module: str,
        n: int,
        k: int,
        spec: WeightSpec,
        activation: ActivationSpec | None,
        *ends: str,
        whole: float | None = None,
    ) -> Linear:
        return Linear(
            module=module,
            shape=(n, k),
            spec=spec,
            activation=activation,
            ends=(_QDATA, _SCALE, *ends),
            whole=whole,
        )

    def _described(self, module: str) -> tuple[str, Section]:
        """The type and the data of a weight; CheckpointError where the file does not say."""
        name = f"{module}.{_QDATA}"
        key = f"{module}.weight"
        text = self.directory.metadata_of(name).get(key)
        where = f"{self.directory.file_name(name)}: __metadata__ of {shown(key)}"
        if text is None:
            raise CheckpointError(f"{where}: missing, which describes the codes.")
        if len(text) > _LONGEST_DESCRIPTION:
            raise CheckpointError(f"{where}: {len(text)} characters, which describe no weight.")
        content = strict_json.parse(text.encode(), where=where)
        section = Section(content if isinstance(content, dict) else {}, where)
        kind = section.one_of("_type", _TYPES)
        data = section.part("_data")
        if data is None:
            raise section.wrong("_data", "an object")
        return kind, data

    def _scaling(self, module: str, data: Section, n: int, k: int) -> dict[str, Any]:
        """Fields of a spec: what a block is, checked against the shape of the scales."""
        out, rows = data.pair("block_size")
        scales = self.info(module, _SCALE)
        dtype = scale_dtype(scales, self.directory)
        fields: dict[str, Any] = {"granularity": "block", "block_size": (rows, out)}
        if (out, rows) == (n, k) and n > 1:
            fields = {"granularity": "tensor"}
        elif (out, rows) == (1, k):
            fields = {"granularity": "channel"}
        elif out == 1:
            fields = {"granularity": "group", "group_size": rows}
            if k % rows:
                raise self.shape_problem(module, f"groups of {rows} rows do not divide {k}")
        self.check(module, _SCALE, (-(-n // out), -(-k // rows)), *SCALE_DTYPES)
        return {**fields, "scale_dtype": dtype}

    def _activation(self, data: Section) -> ActivationSpec | None:
        """How inputs are quantized; None, and one line, where fdq has no such way."""
        intx, kwargs = data.content.get("activation_quantization"), data.part("act_quant_kwargs")
        if intx is None and kwargs is None:
            return None
        if intx == "int8_sym_per_token":
            return ActivationSpec(format="int8")
        inner = None if kwargs is None else kwargs.part("_data")
        if kwargs is not None and inner is not None and not _mentions(inner.content, "ASYMMETRIC"):
            known = {
                "QuantizeTensorToInt8Kwargs": "int8",
                "QuantizeTensorToFloat8Kwargs": "float8_e4m3",
            }
            format = known.get(str(kwargs.content.get("_type")))
            granularity = inner.part("granularity")
            name = None if granularity is None else granularity.content.get("_type")
            if format is not None and name in ("PerRow", "PerToken", "PerTensor"):
                return ActivationSpec(format=format)  # pyright: ignore[reportArgumentType]
        if not self._told:
            self._told = True
            _LOGGER.warning(
                "%s: inputs are quantized in a way that fdq has not (%.80s); they stay in 16 bits.",
                data.where,
                intx or kwargs.content.get("_type") if kwargs else intx,
            )
        return None

    def read(self, linear: Linear) -> StoredWeight:
        """Turned from `[out, in]` to `[in, out]`."""
        (n, k), spec = linear.shape, linear.spec
        if spec.format.startswith("int"):
            return self._read_integers(linear)
        is_float8 = spec.format in ("float8_e4m3", "mxfp8")
        codes = (self.float8_of if is_float8 else self.read_end)(linear, _QDATA)
        arrays = {}
        if spec.format == "float8_e4m3":
            scale = self.scale_of(linear, _SCALE)
        elif spec.format == "nvfp4":
            scale = self.float8_scale_of(linear, _SCALE)
            arrays["global_scale"] = np.full((1, 1), linear.whole, np.float32)
        else:
            scale = self.power_of(linear, _SCALE)
        group = spec.group_size
        if group is not None and scale.shape != (n, k // group):
            scale = _unswizzled(scale, n, k // group)
        arrays["scale"] = np.ascontiguousarray(scale.T)
        return StoredWeight(spec, k, np.ascontiguousarray(codes.T), arrays)

    def _read_integers(self, linear: Linear) -> StoredWeight:
        k, spec = linear.shape[1], linear.spec
        bits = int(spec.format.removeprefix("int"))
        half = 2 ** (bits - 1)
        codes = self.read_end(linear, _QDATA)
        if (codes < -half).any() or (codes >= half).any():
            raise self.bad(linear, _QDATA, f"codes that are no {bits}-bit integers")
        arrays = {"scale": np.ascontiguousarray(self.scale_of(linear, _SCALE).T)}
        zero = self.read_end(linear, _ZERO) if _ZERO in linear.ends else np.zeros((), np.int8)
        if spec.zero_point == "none":
            if zero.any():
                raise self.bad(linear, _ZERO, "zero points, though config.json says SYMMETRIC")
            if bits == 8:
                return StoredWeight(spec, k, np.ascontiguousarray(codes.T), arrays)
        else:
            if (zero < -half).any() or (zero >= half).any():
                raise self.bad(linear, _ZERO, f"zero points that are no {bits}-bit integers")
            moved = (zero.astype(np.int16) + half).astype(np.uint8)
            arrays["zero"] = np.ascontiguousarray(moved.T)
        moved = (codes.view(np.uint8) + np.uint8(half)) & np.uint8(2**bits - 1)
        return StoredWeight(spec, k, packing.packed(np.ascontiguousarray(moved.T), bits), arrays)


def _unswizzled(scale: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Tiles of 128 x 4 scales, each `[32, 4, 4]` with four rows 32 apart beside each other."""
    high, wide = -(-rows // _TILE[0]), -(-columns // _TILE[1])
    tiles = scale.reshape(high, wide, 32, 4, 4).transpose(0, 3, 2, 1, 4)
    return np.ascontiguousarray(tiles.reshape(high * 128, wide * 4)[:rows, :columns])


def _mentions(content: Any, value: str) -> bool:
    """Whether a value is anywhere in JSON."""
    if isinstance(content, dict):
        return any(_mentions(one, value) for one in content.values())
    if isinstance(content, list):
        return any(_mentions(one, value) for one in content)
    return content == value
