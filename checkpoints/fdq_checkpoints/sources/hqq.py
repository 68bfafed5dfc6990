"""HQQ: integers of 8, 4, 3 and 2 bits with a scale and a zero point in floats per group.

A layer `[out, in]` is seen as groups `[R, g]`, row by row (`axis` 1), `R = out in / g`:

=================  ==============================================================================
`W_q`              uint8 `[R bits / 8, g]`, or int32 `[ceil(R / 10), g]` of 3 bits: the first
                   part of the rows in the highest bits, the next below them
`scale`, `zero`    floats `[R, 1]`: `w = (code - zero) * scale`
`nbits`, `axis`    int32, with `group_size` and `shape` int64 `[2]`, `packing` (text as bytes) and
                   what HQQ was told
=================  ==============================================================================

The zero point is no integer, so fdq adds an offset: `-zero * scale` in float32, which is exact for
numbers of 16 bits. Source: hqq 0.2.8 (`core/bitpack.py`, `core/quantize.py`).
"""

import numpy as np

from fdq_checkpoints.errors import CheckpointError, shown
from fdq_checkpoints.sources import bits as packing
from fdq_checkpoints.sources.codec import SCALE_DTYPES, Codec, integer_spec
from fdq_checkpoints.sources.stored_weight import Linear, StoredWeight

_NAMES = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8"}
_EACH = {8: 1, 4: 2, 3: 10, 2: 4}
"""Codes in an element of `W_q`, by bits."""
_TOLD = (
    *("packing", "unpack_view_dtype", "view_as_float", "quant_scale", "quant_zero"),
    *("compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config"),
    *("channel_wise", "optimize", "round_zero"),
)
_LONGEST_TEXT = 64


class Hqq(Codec):
    """Groups along `in`; each layer describes itself."""

    methods = ("hqq",)
    codes = ("W_q",)

    def linear(self, module: str) -> Linear:
        """As its own tensors describe it."""
        bits, axis, group = (self._number(module, end) for end in ("nbits", "axis", "group_size"))
        n, k = self._shape(module)
        if bits not in _NAMES:
            raise self._wrong(module, "nbits", bits, "8, 4, 3 or 2")
        if axis != 1:
            raise CheckpointError(
                f"{self.directory.path}: {shown(module)} has its groups along out (axis {axis}), "
                "for which fdq has no format. Take a release with axis 1."
            )
        if group < 1 or k % group:
            raise self.shape_problem(module, f"groups of {group} rows do not divide {k}")
        for end in ("view_as_float", "quant_scale", "quant_zero"):
            if self.has(module, end) and (found := self._number(module, end)):
                raise self._wrong(module, end, found, "0: other layouts are not read")
        self._check_packing(module, bits)
        rows, each = n * k // group, _EACH[bits]
        if rows % each and bits != 3:
            raise self.shape_problem(module, f"{rows} groups do not fill {bits}-bit codes")
        self.check(module, "W_q", (-(-rows // each), group), "int32" if bits == 3 else "uint8")
        scales = self.check(module, "scale", (rows, 1), *SCALE_DTYPES)
        self.check(module, "zero", (rows, 1), scales.dtype.name)
        spec = integer_spec(bits, None if group == k else group, zero_point="offset")
        there = tuple(end for end in _TOLD if self.has(module, end))
        ends = ("W_q", "scale", "zero", "nbits", "axis", "group_size", "shape", *there)
        return Linear(module=module, shape=(n, k), spec=spec, activation=None, ends=ends)

    def _number(self, module: str, end: str) -> int:
        """A tensor of one whole number."""
        info = self.info(module, end)
        value = self.directory.read(info.name) if info.nbytes <= 8 else np.zeros(2)
        if value.size != 1 or value.dtype.kind not in "iub":
            raise self._wrong(module, end, f"{info.dtype} {info.shape}", "one whole number")
        return int(value.reshape(()))

    def _shape(self, module: str) -> tuple[int, int]:
        info = self.check(module, "shape", (2,), "int64", "int32")
        n, k = (int(size) for size in self.directory.read(info.name))
        if not (1 <= n <= 2**31 and 1 <= k <= 2**31):
            raise self._wrong(module, "shape", [n, k], "two sizes")
        return n, k

    def _check_packing(self, module: str, bits: int) -> None:
        info = self.info(module, "packing")
        text = "?"
        if info.dtype == np.uint8 and info.nbytes <= _LONGEST_TEXT:
            text = self.directory.read(info.name).tobytes().decode("utf-8", "replace")
        if text != _NAMES[bits]:
            raise self._wrong(module, "packing", text, repr(_NAMES[bits]))

    def _wrong(self, module: str, end: str, found: object, expected: str) -> CheckpointError:
        name = f"{module}.{end}"
        return CheckpointError(
            f"{self.directory.file_name(name)}: tensor {shown(name)} says "
            f"{shown(str(found))}, expected {expected}."
        )

    def read(self, linear: Linear) -> StoredWeight:
        """Codes of the groups, laid out as the matrix, turned and packed along K."""
        (n, k), spec = linear.shape, linear.spec
        bits, words = int(spec.format.removeprefix("int")), self.read_end(linear, "W_q")
        each, mask = _EACH[bits], words.dtype.type(2**bits - 1)
        shifts = [words.dtype.type(bits * i) for i in reversed(range(each))]
        codes = np.concatenate([((words >> s) & mask).astype(np.uint8) for s in shifts])
        codes = np.ascontiguousarray(codes[: n * k // words.shape[1]].reshape(n, k).T)
        scale, zero = (
            self.scale_of(linear, end, signed=True).astype(np.float32).reshape(n, -1).T
            for end in ("scale", "zero")
        )
        offset = -zero * scale
        if not np.isfinite(offset).all():
            raise self.bad(linear, "zero", "a zero point that is too large")
        arrays = {"scale": np.ascontiguousarray(scale), "offset": np.ascontiguousarray(offset)}
        return StoredWeight(spec, k, packing.packed(codes, bits), arrays)
