"""GGML's blocks of weights as integers with scales: `(code - bias) * scale + offset`, bit for bit.

Each type is a row of `READERS`: how its blocks, uint8 `[blocks, bytes]`, are `Levels`. Products of
codes and scales are exact in float32 (of at most 24 bits), so that the values are those that GGML
decodes, whichever of fdq's formats holds them.
Layouts: https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np

from fdq.schemes.scheme import WeightSpec
from fdq_checkpoints.sources import bits as packing
from fdq_checkpoints.sources.stored_weight import StoredWeight

FLOATS = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
}
_WIDTHS = (2, 3, 4, 8)
# Twice the levels of e2m1.
_TWICE_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What the codes of a type are like.

    Attributes:
      bits: of a code, before the bias is subtracted.
      bias: what is subtracted of a code.
      group: weights that share a scale.
      half: scales and offsets are float16 as they are stored.
      affine: there are offsets.
    """

    bits: int
    bias: int
    group: int
    half: bool = False
    affine: bool = False


@dataclasses.dataclass(frozen=True)
class Levels:
    """Blocks of rows: codes uint8 `[..., weights]`, scale and offset `[..., groups]`."""

    codes: np.ndarray
    scale: np.ndarray
    offset: np.ndarray | None = None


def common_spec(kinds: Sequence[Kind]) -> WeightSpec:
    """The narrowest spec that holds weights of all these kinds exactly."""
    affine = any(kind.affine for kind in kinds)
    if affine:
        bits = max(kind.bits for kind in kinds)
    else:
        reach = max(max(kind.bias, 2**kind.bits - kind.bias) for kind in kinds)
        bits = 1 + (reach - 1).bit_length()
    half = all(kind.half and kind.affine == affine for kind in kinds)
    return WeightSpec(
        format=f"int{next(width for width in _WIDTHS if width >= bits)}",
        granularity="group",
        group_size=min(kind.group for kind in kinds),
        zero_point="offset" if affine else "none",
        scale_dtype="float16" if half else "float32",
    )


MXFP4_SPEC = WeightSpec.default("mxfp4")


@dataclasses.dataclass(frozen=True)
class BlockWeight:
    """Rows of a quantized type, uint8 `[N, bytes]`; `as_spec` makes fdq's arrays `[K, N]` of it."""

    type: str
    k: int
    rows: np.ndarray

    def as_spec(self, spec: WeightSpec) -> StoredWeight:
        """The same weight as one of a common spec."""
        if spec == MXFP4_SPEC:
            return _microscaled(self)
        kind, levels = READERS[self.type].kind, self._levels
        width = int(spec.format.removeprefix("int"))
        times = kind.group // (spec.group_size or kind.group)
        codes, scale = levels.codes.T, np.repeat(levels.scale.T, times, axis=0)
        arrays = {"scale": np.ascontiguousarray(scale.astype(spec.scale_dtype))}
        if spec.zero_point == "offset":
            offset = levels.offset
            offset = levels.scale * np.float32(-kind.bias) if offset is None else offset
            offset = np.repeat(offset.T, times, axis=0)
            arrays["offset"] = np.ascontiguousarray(offset.astype(spec.scale_dtype))
        else:
            # Signed, in offset binary; modulo 256, as uint8 counts.
            codes = codes + np.uint8((2 ** (width - 1) - kind.bias) % 256)
            codes = packing.signed(codes) if width == 8 else codes
        stored = np.ascontiguousarray(codes) if width == 8 else packing.packed(codes, width)
        return StoredWeight(spec, self.k, stored, arrays)

    def floats(self) -> np.ndarray:
        """What GGML decodes: float32 `[N, K]`."""
        reader, levels = READERS[self.type], self._levels
        group = reader.kind.group
        codes = levels.codes.reshape(len(self.rows), -1, group).astype(np.float32)
        values = (codes - np.float32(reader.kind.bias)) * levels.scale[..., None]
        if levels.offset is not None:
            values += levels.offset[..., None]
        return values.reshape(len(self.rows), self.k)

    def is_finite(self) -> bool:
        """Whether all scales are, and so all values."""
        if self.type == "MXFP4":
            return bool((self.rows.reshape(-1, 17)[:, 0] != 255).all())
        offset = self._levels.offset
        scales = (self._levels.scale, *(() if offset is None else (offset,)))
        return all(bool(np.isfinite(array).all()) for array in scales)

    @functools.cached_property
    def _levels(self) -> Levels:
        reader, n = READERS[self.type], len(self.rows)
        levels = reader.read(self.rows.reshape(-1, reader.nbytes))
        offset = levels.offset
        return Levels(
            levels.codes.reshape(n, self.k),
            levels.scale.reshape(n, -1),
            None if offset is None else offset.reshape(n, -1),
        )


def _microscaled(weight: BlockWeight) -> StoredWeight:
    """MXFP4's own codes and exponents; low nibbles are the first half of a block."""
    n, blocks = len(weight.rows), weight.rows.reshape(-1, 17)
    codes = _nibbles(blocks[:, 1:]).reshape(n, weight.k)
    exponents = np.ascontiguousarray(blocks[:, 0].reshape(n, -1).T)
    arrays = {"scale": exponents.view(ml_dtypes.float8_e8m0fnu)}
    return StoredWeight(MXFP4_SPEC, weight.k, packing.packed(codes.T, 4), arrays)


def _half(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 at a byte, as float32 `[blocks, 1]`."""
    part = np.ascontiguousarray(blocks[:, start : start + 2])
    return part.view("<f2").astype(np.float32)


def _nibbles(part: np.ndarray) -> np.ndarray:
    """Bytes `[..., n]` -> all low nibbles, then all high ones `[..., 2 n]`."""
    return np.concatenate([part & np.uint8(15), part >> np.uint8(4)], axis=-1)


def _bits(part: np.ndarray, shifts: Sequence[int], mask: int) -> np.ndarray:
    """Bytes `[blocks, ..., n]` shifted by each of `shifts` in turn: `[blocks, ..., shifts, n]`."""
    by = np.array(shifts, np.uint8)[:, None]
    return (part[..., None, :] >> by) & np.uint8(mask)


def _fifth_bits(blocks: np.ndarray, start: int) -> np.ndarray:
    """32 bits `[blocks, 32]`, moved to where the fifth bit of a code is."""
    part = np.ascontiguousarray(blocks[:, start : start + 4])
    return np.unpackbits(part, axis=1, bitorder="little") << np.uint8(4)


def _q4_0(blocks: np.ndarray) -> Levels:
    return Levels(_nibbles(blocks[:, 2:]), _half(blocks, 0))


def _q4_1(blocks: np.ndarray) -> Levels:
    return Levels(_nibbles(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: np.ndarray) -> Levels:
    return Levels(_nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2), _half(blocks, 0))


def _q5_1(blocks: np.ndarray) -> Levels:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return Levels(codes, _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: np.ndarray) -> Levels:
    return Levels(blocks[:, 2:] ^ np.uint8(0x80), _half(blocks, 0))


def _q2_k(blocks: np.ndarray) -> Levels:
    """16 groups: a scale in the low nibble of a byte, a minimum in the high one."""
    small = blocks[:, :16]
    codes = _bits(blocks[:, 16:80].reshape(-1, 2, 32), (0, 2, 4, 6), 3)
    scale = _half(blocks, 80) * (small & np.uint8(15)).astype(np.float32)
    return Levels(codes, scale, -(_half(blocks, 82) * (small >> np.uint8(4)).astype(np.float32)))


def _q3_k(blocks: np.ndarray) -> Levels:
    """Codes of 2 bits and a mask of third ones; 16 scales of 6 bits, of which 32 is 0."""
    high = _bits(blocks[:, None, :32], range(8), 1).reshape(-1, 2, 4, 32)
    codes = _bits(blocks[:, 32:96].reshape(-1, 2, 32), (0, 2, 4, 6), 3) | (high << np.uint8(2))
    low = _nibbles(blocks[:, 96:104])
    upper = _bits(blocks[:, 104:108], (0, 2, 4, 6), 3).reshape(-1, 16)
    small = (low | (upper << np.uint8(4))).astype(np.float32) - np.float32(32)
    return Levels(codes, _half(blocks, 108) * small)


def _small_scales(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """12 bytes -> 8 scales and 8 minima of 6 bits, float32."""
    a, b, c = part[:, :4], part[:, 4:8], part[:, 8:12]
    low, high, four = np.uint8(63), np.uint8(6), np.uint8(4)
    scales = np.concatenate([a & low, (c & np.uint8(15)) | ((a >> high) << four)], axis=1)
    minima = np.concatenate([b & low, (c >> four) | ((b >> high) << four)], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _q4_k(blocks: np.ndarray) -> Levels:
    scales, minima = _small_scales(blocks[:, 4:16])
    codes = _bits(blocks[:, 16:].reshape(-1, 4, 32), (0, 4), 15)
    return Levels(codes, _half(blocks, 0) * scales, -(_half(blocks, 2) * minima))


def _q5_k(blocks: np.ndarray) -> Levels:
    scales, minima = _small_scales(blocks[:, 4:16])
    high = _bits(blocks[:, None, 16:48], range(8), 1).reshape(-1, 4, 2, 32)
    codes = _bits(blocks[:, 48:].reshape(-1, 4, 32), (0, 4), 15) | (high << np.uint8(4))
    return Levels(codes, _half(blocks, 0) * scales, -(_half(blocks, 2) * minima))


def _q6_k(blocks: np.ndarray) -> Levels:
    low = _bits(blocks[:, :128].reshape(-1, 2, 64), (0, 4), 15).reshape(-1, 2, 4, 32)
    high = _bits(blocks[:, 128:192].reshape(-1, 2, 32), (0, 2, 4, 6), 3)
    small = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return Levels(low | (high << np.uint8(4)), _half(blocks, 208) * small)


def _mxfp4(blocks: np.ndarray) -> Levels:
    """As integers: twice the level, with half of the scale."""
    codes = (_TWICE_E2M1[_nibbles(blocks[:, 1:])] + np.int8(12)).view(np.uint8)
    return Levels(codes, np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128))


@dataclasses.dataclass(frozen=True)
class Reader:
    """A type: bytes of a block, what its codes are like, and how they are read."""

    nbytes: int
    kind: Kind
    read: Callable[[np.ndarray], Levels]


READERS: dict[str, Reader] = {
    "Q4_0": Reader(18, Kind(4, 8, 32, half=True), _q4_0),
    "Q4_1": Reader(20, Kind(4, 0, 32, half=True, affine=True), _q4_1),
    "Q5_0": Reader(22, Kind(5, 16, 32, half=True), _q5_0),
    "Q5_1": Reader(24, Kind(5, 0, 32, half=True, affine=True), _q5_1),
    "Q8_0": Reader(34, Kind(8, 128, 32, half=True), _q8_0),
    "Q2_K": Reader(84, Kind(2, 0, 16, affine=True), _q2_k),
    "Q3_K": Reader(110, Kind(3, 4, 16), _q3_k),
    "Q4_K": Reader(144, Kind(4, 0, 32, affine=True), _q4_k),
    "Q5_K": Reader(176, Kind(5, 0, 32, affine=True), _q5_k),
    "Q6_K": Reader(210, Kind(6, 32, 16), _q6_k),
    "MXFP4": Reader(17, Kind(5, 12, 32), _mxfp4),
}
"""The types whose codes fdq has a format for; those of others are refused by name."""


def spec_of(types: Sequence[str]) -> WeightSpec:
    """How fdq holds a layer of parts of these types: exactly."""
    if set(types) == {"MXFP4"}:
        return MXFP4_SPEC
    return common_spec([READERS[name].kind for name in types])
