"""GPTQ and AutoRound: integers of 2, 3, 4 and 8 bits, packed along K; and AWQ's, along N.

Tensors of a linear layer `[out, in]` (little-endian, lowest code first):

=========  =========================  ============================================
name       GPTQ                       AWQ (gemm)
=========  =========================  ============================================
`qweight`  int32 `[in bits / 32, out]`  int32 `[in, out / 8]`, columns 0 2 4 6 1 3 5 7
`qzeros`   int32 `[G, out bits / 32]`   int32 `[G, out / 8]`, the same order
`scales`   `[G, out]`                   `[G, out]`
`g_idx`    int32 `[in]`, the group        -
=========  =========================  ============================================

`w = (code - zero) * scale`; the first version of GPTQ's files stores zero - 1.
Sources: AutoGPTQ, GPTQModel (`checkpoint_format`), AutoAWQ (`packing_utils`).
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.readers.source_directory import SourceDirectory
from fdq_checkpoints.sources import bits as packing
from fdq_checkpoints.sources.codec import Codec, Section, integer_spec, scale_dtype
from fdq_checkpoints.sources.stored_weight import Linear, StoredWeight

_WORD = 32


class _Grouped(Codec):
    """What both have in common."""

    codes = ("qweight",)

    def unused_biases(self, modules: Iterable[str]) -> tuple[str, ...]:
        """AutoGPTQ gives every layer a bias, of zeros where the model has none."""
        names = [f"{module}.bias" for module in modules if self.has(module, "bias")]
        return tuple(name for name in names if not self.directory.read(name).any())

    def __init__(self, directory: SourceDirectory, section: Section):
        super().__init__(directory, section)
        self.group = section.whole("group_size", -1)
        if self.group != -1 and self.group < 1:
            raise section.wrong("group_size", "-1 or a number of rows")
        self.ends: tuple[str, ...] = ("qweight", "qzeros", "scales")

    def _linear(self, module: str, bits: int, k: int, n: int, symmetric: bool) -> Linear:
        group = k if self.group == -1 else self.group
        if k % group:
            raise self.shape_problem(module, f"groups of {group} rows do not divide {k}")
        groups = k // group
        self.check(module, "qzeros", (groups, n * bits // _WORD), "int32")
        scales = self.check(module, "scales", (groups, n), "float16", "bfloat16", "float32")
        spec = integer_spec(
            bits,
            None if groups == 1 else group,
            zero_point="none" if symmetric else "integer",
            scale_dtype=scale_dtype(scales, self.directory),
        )
        return Linear(module=module, shape=(n, k), spec=spec, activation=None, ends=self.ends)


class Gptq(_Grouped):
    """Both versions of GPTQ's files, without a permutation of the rows."""

    methods = ("gptq", "auto-round")

    def __init__(self, directory: SourceDirectory, section: Section):
        super().__init__(directory, section)
        self.bits = section.one_of("bits", (2, 3, 4, 8))
        self.symmetric = section.flag("sym", True)
        self.may_permute = section.flag("desc_act", False)
        version = section.content.get("checkpoint_format") or section.content.get("format")
        known = ("gptq", "gptq_v2", "auto_gptq")
        if version is not None and version not in known:
            key = "checkpoint_format" if "checkpoint_format" in section.content else "format"
            raise section.wrong(key, "gptq or gptq_v2: other layouts are not read")
        self.is_first = version != "gptq_v2"
        if section.content.get("quant_method") == "auto-round":
            section.one_of("packing_format", ("auto_round:auto_gptq",))
        section.absent("is_marlin_format", because="Marlin's layout is not read")
        section.one_of("pack_dtype", ("int32",), "int32")
        rules = section.part("dynamic")
        for rule in rules.content if rules else ():
            if not rule.startswith("-:"):
                raise CheckpointError(
                    f"{section.where}: dynamic {rule!r:.80} gives some layers other bits or "
                    "groups, which is not read. Load the float original."
                )

    def linear(self, module: str) -> Linear:
        """By the shape of the codes."""
        info = self.matrix(module, "qweight")
        if info.shape[0] * _WORD % self.bits:
            raise self.shape_problem(module, f"{info.shape} is not packed {self.bits}-bit codes")
        k, n = info.shape[0] * _WORD // self.bits, info.shape[1]
        if n * self.bits % _WORD:
            raise self.shape_problem(module, f"{n} columns do not fill words of zero points")
        self.check(module, "qweight", info.shape, "int32")
        linear = self._linear(module, self.bits, k, n, self.symmetric)
        if not self.has(module, "g_idx"):
            return linear
        self.check(module, "g_idx", (k,), "int32", "int64")
        linear = dataclasses.replace(linear, ends=(*linear.ends, "g_idx"))
        if self.may_permute:
            self._check_order(linear)
        return linear

    def _check_order(self, linear: Linear) -> None:
        """CheckpointError where rows are in another order than that of the groups."""
        order, (_, k) = self.read_end(linear, "g_idx"), linear.shape
        if not np.array_equal(order, np.arange(k) // (linear.spec.group_size or k)):
            raise CheckpointError(
                f"{self.directory.file_name(f'{linear.module}.g_idx')}: {linear.module} has its "
                "rows in the order of activations (desc_act), which is not read. Load the float "
                "original, or a release with desc_act false."
            )

    def read(self, linear: Linear) -> StoredWeight:
        """The bytes of the codes turned; zero points looked at."""
        (n, k), bits, spec = linear.shape, self.bits, linear.spec
        if "g_idx" in linear.ends:
            self._check_order(linear)
        zero = packing.unpacked(self.read_end(linear, "qzeros"), n, bits)
        if self.is_first:
            if not self.symmetric and (zero == 2**bits - 1).any():
                raise self.bad(
                    linear, "qzeros", f"the zero point {2**bits}, which readers disagree about"
                )
            zero = (zero + np.uint8(1)) & np.uint8(2**bits - 1)
        codes = packing.along_rows(self.read_end(linear, "qweight"), k, bits)
        arrays = {"scale": self.scale_of(linear, "scales")}
        if self.symmetric:
            if (zero != 2 ** (bits - 1)).any():
                raise self.bad(
                    linear, "qzeros", f"other zero points than {2 ** (bits - 1)} (sym is true)"
                )
            codes = packing.signed(codes) if bits == 8 else codes
        else:
            arrays["zero"] = zero
        return StoredWeight(spec, k, codes, arrays)


class Awq(_Grouped):
    """4-bit integers in AutoAWQ's `gemm` layout."""

    methods = ("awq",)
    _ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
    """Which nibble of a word holds each of 8 columns."""

    def __init__(self, directory: SourceDirectory, section: Section):
        super().__init__(directory, section)
        section.one_of("bits", (4,), section.content.get("w_bit"))
        version = section.content.get("version", section.content.get("format", "gemm"))
        if str(version).lower() != "gemm":
            raise section.wrong("version", "gemm: other layouts are not read")
        if not section.flag("zero_point", True):
            raise section.wrong("zero_point", "true")

    def linear(self, module: str) -> Linear:
        """By the shape of the codes."""
        info = self.matrix(module, "qweight")
        k, n = info.shape[0], info.shape[1] * 8
        self.check(module, "qweight", info.shape, "int32")
        return self._linear(module, 4, k, n, symmetric=False)

    def read(self, linear: Linear) -> StoredWeight:
        """Codes unpacked along N and packed along K."""
        (n, k) = linear.shape
        zero = self._columns(self.read_end(linear, "qzeros"), n)
        codes = packing.packed(self._columns(self.read_end(linear, "qweight"), n), 4)
        arrays = {"scale": self.scale_of(linear, "scales"), "zero": zero}
        return StoredWeight(linear.spec, k, codes, arrays)

    def _columns(self, words: np.ndarray, n: int) -> np.ndarray:
        codes = packing.unpacked(words, n, 4).reshape(len(words), -1, 8)
        return codes[..., self._ORDER].reshape(len(words), n)
