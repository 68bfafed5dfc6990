"""Random weights in the canonical layout, and what they mean: NumPy, from the formats' definitions.

Codes are drawn over all their values, which quantizing a weight would not reach.
"""

import dataclasses
import functools
import zlib

import ml_dtypes
import numpy as np

from pallas_kernels.weights.formats import WORD_FORMATS
from pallas_kernels.weights.kernel_weight import KernelWeight, to_kernel
from tests.formats.cases import E2M1, NF4

BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2, "nf4": 4, "mxfp4": 4, "nvfp4": 4, "cc2": 2}
FLOAT8 = {
    "float8_e4m3": ml_dtypes.float8_e4m3fn,
    "mxfp8": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A way to store a weight."""

    format: str
    granularity: str = "group"
    group_size: int | None = None
    block_size: tuple[int, int] | None = None
    zero_point: str = "none"
    scale_dtype: type = ml_dtypes.bfloat16
    double: bool = False

    def __str__(self) -> str:
        parts = [self.format, self.granularity, self.group_size, self.block_size]
        parts += [None if self.zero_point == "none" else self.zero_point]
        parts += ["double" if self.double else None]
        return "-".join(str(p) for p in parts if p is not None)

    @property
    def options(self) -> dict:
        """Arguments of `to_kernel`."""
        names = ("format", "granularity", "group_size", "block_size", "zero_point")
        return {name: getattr(self, name) for name in names}


_F32 = np.float32
_ALL = [
    Case("int8", "channel", scale_dtype=_F32),
    Case("int8", "group", 128),
    Case("int8", "tensor", zero_point="half", scale_dtype=_F32),
    Case("int8", "group", 64, zero_point="integer"),
    Case("int4", "group", 128),
    Case("int4", "channel", scale_dtype=_F32),
    Case("int4", "group", 64, zero_point="integer", scale_dtype=np.float16),
    Case("int4", "channel", zero_point="integer", scale_dtype=_F32),
    Case("int4", "group", 32, zero_point="half"),
    Case("int4", "tensor", scale_dtype=_F32),
    Case("int3", "group", 64),
    Case("int3", "channel", scale_dtype=_F32),
    Case("int2", "group", 64, zero_point="half"),
    Case("int2", "group", 128, zero_point="integer"),
    Case("cc2", "group", 64),
    Case("nf4", "group", 64),
    Case("nf4", "group", 64, double=True),
    Case("mxfp4", "group", 32, scale_dtype=ml_dtypes.float8_e8m0fnu),
    Case("nvfp4", "group", 16, scale_dtype=ml_dtypes.float8_e4m3fn),
    Case("float8_e4m3", "block", block_size=(128, 128), scale_dtype=_F32),
    Case("float8_e4m3", "block", block_size=(64, 32), scale_dtype=ml_dtypes.float8_e8m0fnu),
    Case("float8_e4m3", "channel", scale_dtype=_F32),
    Case("float8_e5m2", "channel", scale_dtype=_F32),
    Case("mxfp8", "group", 32, scale_dtype=ml_dtypes.float8_e8m0fnu),
]
CASES = [case for case in _ALL if case.format in WORD_FORMATS]


def generator(*seed) -> np.random.Generator:
    """Random numbers from a name."""
    return np.random.default_rng(zlib.crc32(repr(seed).encode()))


def random_arrays(case: Case, k: int, n: int, lead: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    """Canonical arrays of a random weight ``[*lead, K, N]``."""
    rng = generator(str(case), k, n, lead)
    arrays = {}
    if case.format in FLOAT8:
        dtype = FLOAT8[case.format]
        values = rng.normal(size=(*lead, k, n)) * 2.0 ** rng.integers(-9, 4, (*lead, k, n))
        arrays["codes"] = values.astype(dtype)
    else:
        bits = BITS[case.format]
        rows = -(-k // 8) * 3 if bits == 3 else -(-k * bits // 8)
        codes = rng.integers(0, 256, (*lead, rows, n)).astype(np.uint8)
        signed = case.format == "int8" and case.zero_point != "integer"
        arrays["codes"] = codes.view(np.int8) if signed else codes
    groups, columns = _scale_shape(case, k, n)
    shape = (*lead, groups, columns)
    arrays["scale"] = (rng.uniform(0.005, 0.02, shape)).astype(case.scale_dtype)
    if case.zero_point == "integer":
        arrays["zero"] = rng.integers(0, 2 ** BITS[case.format], shape).astype(np.uint8)
    if case.format == "nvfp4":
        arrays["scale"] = rng.integers(1, 120, shape).astype(np.uint8).view(case.scale_dtype)
        arrays["global_scale"] = np.full((*lead, 1, 1), 0.0123, np.float32)
    if case.format == "cc2":
        arrays["scale"] = rng.integers(0, 256, (*lead, -(-groups // 2), n)).astype(np.uint8)
        arrays["code_scale"] = rng.uniform(100, 124, (*lead, 1, n)).astype(np.float32)
        arrays["code_offset"] = rng.uniform(0, 1200, (*lead, 1, n)).astype(np.float32)
        arrays["super_scale"] = rng.uniform(0.001, 0.002, (*lead, 1, n)).astype(np.float32)
    if case.double:
        arrays["scale"] = rng.integers(-127, 128, shape).astype(np.int8)
        blocks = (*lead, groups, -(-n // 256))
        arrays["super_scale"] = rng.uniform(1e-4, 2e-4, blocks).astype(np.float32)
        arrays["scale_offset"] = np.full((*lead, 1, 1), 0.05, np.float32)
    return arrays


def _scale_shape(case: Case, k: int, n: int) -> tuple[int, int]:
    if case.granularity == "tensor":
        return 1, 1
    if case.granularity == "channel":
        return 1, n
    if case.block_size is not None:
        return -(-k // case.block_size[0]), -(-n // case.block_size[1])
    assert case.group_size is not None
    return k // case.group_size, n


def decode(case: Case, arrays: dict[str, np.ndarray], k: int, n: int) -> np.ndarray:
    """float64 ``[..., K, N]`` by the definition of the format."""
    values = _values(case, arrays, k)
    scale = arrays["scale"]
    if case.format == "cc2":
        scale = np.stack([scale & 15, scale >> 4], axis=-2).reshape(*scale.shape[:-2], -1, n)
        scale = scale[..., : k // 64, :].astype(np.float64) * arrays["super_scale"]
    elif case.double:
        step = np.repeat(arrays["super_scale"], 256, axis=-1)[..., :n]
        scale = scale.astype(np.float32) * step + arrays["scale_offset"]
    scale = scale.astype(np.float64)
    if "global_scale" in arrays:
        scale = scale * arrays["global_scale"]

    def spread(a):
        if case.granularity == "group":
            return np.repeat(a, case.group_size, axis=-2)
        if case.block_size is not None:
            a = np.repeat(a, case.block_size[0], axis=-2)[..., :k, :]
            return np.repeat(a, case.block_size[1], axis=-1)[..., :n]
        return a

    if "zero" in arrays:
        values = values - spread(arrays["zero"].astype(np.float64))
    return values * spread(scale)


def _values(case: Case, arrays: dict[str, np.ndarray], k: int) -> np.ndarray:
    codes = arrays["codes"]
    if case.format in FLOAT8:
        return codes.astype(np.float64)
    offset = {"none": 0.0, "half": 0.5, "integer": 0.0}[case.zero_point]
    if case.format == "int8":
        return codes.astype(np.float64) + offset
    if case.format == "cc2":
        word = codes.astype(np.float32) * arrays["code_scale"] + arrays["code_offset"]
        word = np.floor(word + np.float32(0.5)).astype(np.int64)
        rows = [((word >> shift) & 63) - 32.0 for shift in (9, 6, 3, 0)]
        return np.stack(rows, axis=-2).reshape(*codes.shape[:-2], -1, codes.shape[-1])
    bits = BITS[case.format]
    stream = np.unpackbits(codes, axis=-2, bitorder="little")
    stream = stream[..., : stream.shape[-2] // bits * bits, :]
    fields = stream.reshape(*codes.shape[:-2], -1, bits, codes.shape[-1]).astype(np.int64)
    levels = np.einsum("...bn,b->...n", fields, 1 << np.arange(bits))[..., :k, :]
    if case.format == "nf4":
        return NF4[levels]
    if case.format in ("mxfp4", "nvfp4"):
        return E2M1[levels]
    return levels + (0.0 if case.zero_point == "integer" else offset - 2.0 ** (bits - 1))


@functools.cache
def random_weight(
    case: Case, k: int, n: int, lead: tuple[int, ...] = ()
) -> tuple[KernelWeight, np.ndarray]:
    """A weight in the kernel's layout and its float64 values."""
    arrays = random_arrays(case, k, n, lead)
    return to_kernel(arrays, **case.options, k=k, n=n), decode(case, arrays, k, n)
