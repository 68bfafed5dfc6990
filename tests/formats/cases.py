"""The shared table of formats, and what their arrays mean, in NumPy from the definitions."""

import dataclasses
import functools
import pathlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from fdq.formats import trellis
from fdq.formats.qtensor import QTensor
from fdq.quantizers import quantize_array
from fdq.schemes.scheme import WeightSpec

NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0],
    np.float32,
)  # fmt: skip
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@dataclasses.dataclass(frozen=True)
class Case:
    """A format as the tests use it: small, but divisible over 8 devices along K and N.

    `product` says whether the tests of products take it as well.
    """

    name: str
    spec: WeightSpec
    method: str | None = None
    k: int = 1024
    n: int = 16
    product: bool = True

    @property
    def weight(self) -> np.ndarray:
        return weight(self.name, self.k, self.n)

    @property
    def family(self) -> str:
        """The format; of trellises, which are alike, all of them."""
        return "trellis" if self.spec.format.startswith("trellis") else self.spec.format

    @functools.cached_property
    def quantized(self) -> QTensor:
        return quantize_array(self.weight, self.spec, method=self.method)

    def __str__(self) -> str:
        return self.name


@functools.cache
def weight(name: str, k: int, n: int) -> np.ndarray:
    """Normal numbers of a usual size; columns differ in scale."""
    rng = np.random.default_rng([k, n, len(name)])
    w = 0.05 * rng.standard_normal((k, n)) * np.exp2(rng.uniform(-2, 2, (1, n)))
    return w.astype(np.float32)


def spec(format, group=None, dtype=None, **fields) -> WeightSpec:
    if group is not None:
        fields |= {"granularity": "group", "group_size": group, "scale_dtype": dtype or "bfloat16"}
    elif dtype is not None:
        fields |= {"scale_dtype": dtype}
    return WeightSpec(format=format, **fields)


# Values of a step, by bits per weight.
TRELLISES = {"1.5": 2, "2": 2, "2.5": 2, "3": 1, "3.5": 2, "4": 1}
BLOCK = {"granularity": "block", "block_size": (128, 128)}

CASES = (
    Case("int8", spec("int8")),
    Case("int8-tensor", spec("int8", granularity="tensor")),
    Case("int8-g32-asym", spec("int8", 32, zero_point="integer")),
    Case("int4-g128", spec("int4", 128), product=False),
    Case("int4-g64", spec("int4", 64), "signed_max"),
    Case("int4-g32-asym", spec("int4", 32, zero_point="integer"), "absmax"),
    Case("int4-g64-affine", spec("int4", 64, zero_point="offset"), "absmax"),
    Case("int8-g16-affine", spec("int8", 16, "float16", zero_point="offset"), "absmax"),
    Case("int3-channel-affine", spec("int3", zero_point="offset"), "absmax"),
    Case("int4-channel", spec("int4"), "absmax"),
    Case("int3-g64", spec("int3", 64), "absmax"),
    Case("int3-channel-asym", spec("int3", zero_point="integer"), "absmax", product=False),
    Case("int2-g32-half", spec("int2", 32, zero_point="half")),
    Case("int2-g128", spec("int2", 128, "float16"), "absmax", product=False),
    Case("fp8", spec("float8_e4m3")),
    Case("fp8-tensor", spec("float8_e4m3", granularity="tensor"), product=False),
    Case("fp8-e5m2", spec("float8_e5m2")),
    Case("fp8-block", spec("float8_e4m3", **BLOCK), n=1024),
    Case(
        "fp8-block-ue8m0",
        spec("float8_e4m3", None, "float8_e8m0fnu", **BLOCK),
        n=1024,
        product=False,
    ),
    Case("nf4-g64", spec("nf4", 64)),
    Case("nf4-g64-dq", spec("nf4", 64, double_quantization=True), "absmax", k=512, n=2048),
    Case("mxfp4", spec("mxfp4", 32, "float8_e8m0fnu"), "absmax"),
    Case("mxfp8", spec("mxfp8", 32, "float8_e8m0fnu")),
    Case("nvfp4", spec("nvfp4", 16, "float8_e4m3fn")),
    Case("cc2", spec("cc2", 64, "uint4")),
    *(
        Case(f"trellis{bits}", spec(f"trellis{bits}_v1", None, "bfloat16"), None, 8, 1024, False)
        for bits in sorted(TRELLISES, key="2".__ne__)
    ),
)
VARIED = ("int4-g64", "fp8", "nf4-g64", "nvfp4", "cc2")
"""An integer, a float, a codebook, a small float and the trellis, as few as show what is alike."""
PRODUCTS = {case.name: case.spec for case in CASES if case.product}


@functools.cache
def quantized(name: str, k: int = 256, n: int = 512) -> QTensor:
    """A weight `[k, n]` of `PRODUCTS`, of closed-form scales; the same one in every test."""
    w = np.random.default_rng(k * 1000 + n).standard_normal((k, n)).astype(np.float32)
    return quantize_array(w, PRODUCTS[name], method=None if name == "cc2" else "absmax")


def unpack(packed: np.ndarray, bits: int, k: int) -> np.ndarray:
    """Packed bytes [P, N] -> codes [k, N]: column by column one little-endian bit stream."""
    stream = np.unpackbits(packed, axis=0, bitorder="little")[: k * bits]
    places = (1 << np.arange(bits))[None, :, None]
    return (stream.reshape(k, bits, -1) * places).sum(axis=1)


def spread(scale: np.ndarray, s: WeightSpec, k: int, n: int) -> np.ndarray:
    """The scale of every weight, by looking each one up."""
    row, column = np.arange(k), np.arange(n)
    if s.granularity == "tensor":
        row, column = 0 * row, 0 * column
    elif s.granularity == "channel":
        row = 0 * row
    elif s.granularity == "group":
        row = row // s.group_size
    else:
        row, column = row // s.block_size[0], column // s.block_size[1]
    return scale[row[:, None], column[None, :]]


def levels_of(s: WeightSpec) -> np.ndarray:
    """Every level of the format, before a zero is subtracted or an offset added."""
    if s.format.startswith("int"):
        bits = int(s.format[3:])
        shift = {"none": -(2 ** (bits - 1)), "half": -(2 ** (bits - 1)) + 0.5}
        return np.arange(2**bits) + float(shift.get(s.zero_point, 0))
    if s.format == "nf4":
        return NF4.astype(np.float64)
    if s.format in ("mxfp4", "nvfp4"):
        return E2M1.astype(np.float64)
    dtype = ml_dtypes.float8_e5m2 if s.format == "float8_e5m2" else ml_dtypes.float8_e4m3fn
    values = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)
    return values[np.isfinite(values)]


def host(q: QTensor) -> dict[str, np.ndarray]:
    return {name: np.asarray(a) for name, a in q.arrays().items()}


def scale_of(q: QTensor, k: int, n: int) -> np.ndarray:
    """float32 [k, n]: what multiplies the level of every weight."""
    a, s = host(q), q.spec
    scale = a["scale"].astype(np.float32)
    if s.double_quantization:
        steps = a["super_scale"][:, np.arange(n) // 256]
        scale = scale * steps + a["scale_offset"]
    if s.format == "nvfp4":
        scale = scale * a["global_scale"]
    return spread(scale, s, k, n)


def defined_value(q: QTensor, k: int, n: int) -> np.ndarray:
    """float32 [k, n]: what the arrays of ``q`` mean."""
    a, s = host(q), q.spec
    if s.format == "cc2":
        return defined_cc2(a, k, n)
    if s.format.startswith("trellis"):
        return defined_trellis(a, s.format)
    scale = scale_of(q, k, n)
    if s.format.startswith("float8") or s.format == "mxfp8":
        return a["codes"].astype(np.float32) * scale
    if s.format == "int8":
        codes = a["codes"].astype(np.float32)
    else:
        bits = 4 if s.format in ("nf4", "mxfp4", "nvfp4") else int(s.format[3:])
        codes = unpack(a["codes"], bits, k)
        codes = levels_of(s)[codes].astype(np.float32)
    if s.zero_point == "integer":
        codes = codes - spread(a["zero"].astype(np.float32), s, k, n)
    if s.zero_point == "offset":
        return codes * scale + spread(a["offset"].astype(np.float32), s, k, n)
    return codes * scale


def defined_cc2(a: dict[str, np.ndarray], k: int, n: int) -> np.ndarray:
    """float32 [k, n], weight by weight as in the module's docstring."""
    out = np.empty((k, n), np.float32)
    for row in range(k):
        code = a["codes"][row // 4].astype(np.float32)
        word = code * a["code_scale"][0] + a["code_offset"][0] + np.float32(0.5)
        value = ((np.floor(word).astype(np.int64) >> (9, 6, 3, 0)[row % 4]) & 63) - 32
        local = (a["scale"][row // 128] >> (4 * (row // 64 % 2))) & 15
        out[row] = (value * local).astype(np.float32) * a["super_scale"][0]
    return out


def defined_trellis(a: dict[str, np.ndarray], name: str) -> np.ndarray:
    """float32 [k, n]: every window bit by bit, looked up in the file of tables."""
    bits, version = name.removeprefix("trellis").split("_")
    with np.load(pathlib.Path(trellis.__file__).with_name(f"trellis_tables_{version}.npz")) as file:
        table = (file[bits].astype(np.uint32) << 16).view(np.float32)
    values = TRELLISES[bits]
    step = round(float(bits) * values)
    stream = np.unpackbits(a["codes"], axis=1, bitorder="little").astype(np.int64)
    tile, out = 128 // values * step, []
    for start in range(0, stream.shape[1], tile):
        part = stream[:, start : start + tile]
        for at in range(0, part.shape[1], step):
            places = (at + np.arange(12)) % part.shape[1]
            out.append(table[part[:, places] @ (1 << np.arange(12))])
    return np.concatenate(out, axis=1) * a["scale"].astype(np.float32)


def stack(case: Case, count: int = 2) -> jnp.ndarray:
    """[count, K, N] weights of different sizes."""
    return jnp.stack([jnp.asarray(case.weight) * float(i + 1) for i in range(count)])
