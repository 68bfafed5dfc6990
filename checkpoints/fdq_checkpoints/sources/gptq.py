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

`w = (code - zero) * scale`; the first version of GPTQ's files stores zero - 1. With `desc_act`
groups are of rows that lie apart: fdq's codes have them together, and keep the order.
Sources: AutoGPTQ, GPTQModel (`checkpoint_format`), AutoAWQ (`packing_utils`).
"""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from fdq_checkpoints.readers.source_directory import SourceDirectory
from fdq_checkpoints.sources import bits as packing
from fdq_checkpoints.sources.codec import (
    Codec,
    Names,
    Section,
    codes_of_ignored,
    integer_spec,
    scale_dtype,
)
from fdq_checkpoints.sources.group_index import in_order_of_groups, order_of_rows
from fdq_checkpoints.sources.stored_weight import Linear, StoredWeight

_WORD = 32
_BITS = (2, 3, 4, 8)
# How codes were chosen, which says nothing about what they mean.
_OF_MAKING = (
    *("mse", "damp_percent", "damp_auto_increment", "static_groups", "true_sequential"),
    *("act_group_aware", "adapter", "smooth", "v2", "method", "gptaq", "foem", "fallback"),
    *("failsafe", "hessian", "hessian_chunk_size", "meta"),
)
_MOST_RULES = 4096


@dataclasses.dataclass(frozen=True)
class _Settings:
    """Of one layer: bits, rows of a group (-1: all), and what its zero points and rows may be."""

    bits: int
    group: int
    symmetric: bool
    may_permute: bool = False

    @classmethod
    def of(cls, section: Section, default: "_Settings | None" = None) -> "_Settings":
        """What a section says; where it says nothing, `default`."""
        or_else = default or cls(0, -1, True)
        group = section.whole("group_size", or_else.group)
        if group != -1 and group < 1:
            raise section.wrong("group_size", "-1 or a number of rows")
        return cls(
            section.one_of("bits", _BITS, default and default.bits),
            group,
            section.flag("sym", or_else.symmetric),
            section.flag("desc_act", or_else.may_permute),
        )


class _Grouped(Codec):
    """What both have in common."""

    codes = ("qweight",)

    def unused_biases(self, modules: Iterable[str]) -> tuple[str, ...]:
        """AutoGPTQ gives every layer a bias, of zeros where the model has none."""
        names = [f"{module}.bias" for module in modules if self.has(module, "bias")]
        return tuple(name for name in names if not self.directory.read(name).any())

    def _linear(self, module: str, settings: _Settings, k: int, n: int) -> Linear:
        bits, group = settings.bits, k if settings.group == -1 else settings.group
        if k % group:
            raise self.shape_problem(module, f"groups of {group} rows do not divide {k}")
        groups = k // group
        self.check(module, "qzeros", (groups, n * bits // _WORD), "int32")
        scales = self.check(module, "scales", (groups, n), "float16", "bfloat16", "float32")
        spec = integer_spec(
            bits,
            None if groups == 1 else group,
            zero_point="none" if settings.symmetric else "integer",
            scale_dtype=scale_dtype(scales, self.directory),
        )
        ends = ("qweight", "qzeros", "scales")
        return Linear(module=module, shape=(n, k), spec=spec, activation=None, ends=ends)


class Gptq(_Grouped):
    """Both versions of GPTQ's files; rows in the order of activations stay in it."""

    methods = ("gptq", "auto-round")

    def __init__(self, directory: SourceDirectory, section: Section):
        super().__init__(directory, section)
        self.settings = _Settings.of(section)
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
        self.rules = [*self._rules(section), *self._named(section)]
        self.ignored = Names(section.names("modules_to_not_convert"), section.where)

    def _rules(self, section: Section) -> Iterator[tuple[Names, _Settings | None]]:
        """What `dynamic` says: which layers, and their settings; None leaves them in floats."""
        rules = section.part("dynamic")
        if rules and len(rules.content) > _MOST_RULES:
            raise section.wrong("dynamic", f"at most {_MOST_RULES} rules")
        for rule in rules.content if rules else ():
            names = Names(("re:" + rule.removeprefix("+:").removeprefix("-:"),), section.where)
            if rule.startswith("-:"):
                yield names, None
                continue
            part = rules.part(rule) if rules else None
            if part is None:
                raise section.wrong("dynamic", "an object for each pattern")
            part.only("bits", "group_size", "sym", "desc_act", *_OF_MAKING)
            yield names, _Settings.of(part, self.settings)

    def _named(self, section: Section) -> Iterator[tuple[Names, _Settings | None]]:
        """What AutoRound's `extra_config` says, by the names of layers; 16 bits are floats."""
        layers = section.part("extra_config")
        for name, part in zip(layers.content, layers.parts(), strict=True) if layers else ():
            part.one_of("act_bits", (16, 32), 16)
            is_float = part.content.get("bits") in (16, 32)
            names = Names((name,), section.where)
            yield names, None if is_float else _Settings.of(part, self.settings)

    def _settings(self, module: str) -> _Settings | None:
        """By the first rule that a layer is of."""
        named = (settings for names, settings in self.rules if names.match(module))
        return next(named, self.settings)

    def linear(self, module: str) -> Linear:
        """By the shape of the codes."""
        info, settings = self.matrix(module, "qweight"), self._settings(module)
        left = module == "lm_head" and self.section.flag("lm_head", True) is False
        if settings is None or left or self.ignored.match(module):
            raise codes_of_ignored(self.directory, module)
        bits = settings.bits
        if info.shape[0] * _WORD % bits:
            raise self.shape_problem(module, f"{info.shape} is not packed {bits}-bit codes")
        k, n = info.shape[0] * _WORD // bits, info.shape[1]
        if n * bits % _WORD:
            raise self.shape_problem(module, f"{n} columns do not fill words of zero points")
        self.check(module, "qweight", info.shape, "int32")
        linear = self._linear(module, settings, k, n)
        if not self.has(module, "g_idx") and not settings.may_permute:
            return linear
        self.check(module, "g_idx", (k,), "int32", "int64")
        linear = dataclasses.replace(linear, ends=(*linear.ends, "g_idx"))
        # Of others it is looked at as they are read.
        return in_order_of_groups(self, linear, "g_idx") if settings.may_permute else linear

    def read(self, linear: Linear) -> StoredWeight:
        """The bytes of the codes turned; zero points looked at."""
        (n, k), spec, bits = linear.shape, linear.spec, int(linear.spec.format.removeprefix("int"))
        symmetric = spec.zero_point == "none"
        if "g_idx" in linear.ends and linear.order is None:
            other = in_order_of_groups(self, linear, "g_idx").order
            if other is not None:
                raise self.bad(linear, "g_idx", "another order of rows, but desc_act is false")
        zero = packing.unpacked(self.read_end(linear, "qzeros"), n, bits)
        if self.is_first:
            if not symmetric and (zero == 2**bits - 1).any():
                raise self.bad(
                    linear, "qzeros", f"the zero point {2**bits}, which readers disagree about"
                )
            zero = (zero + np.uint8(1)) & np.uint8(2**bits - 1)
        codes = packing.along_rows(self.read_end(linear, "qweight"), k, bits)
        arrays = {"scale": self.scale_of(linear, "scales", signed=symmetric)}
        if symmetric:
            if (zero != 2 ** (bits - 1)).any():
                raise self.bad(
                    linear, "qzeros", f"other zero points than {2 ** (bits - 1)} (sym is true)"
                )
        else:
            arrays["zero"] = zero
        if spec.row_order:
            arrays["row_order"] = order = order_of_rows(self, linear, "g_idx")
            codes = packing.in_order(codes, k, bits, order)
        if symmetric and bits == 8:
            codes = packing.signed(codes)
        return StoredWeight(spec, k, codes, arrays)


class Awq(_Grouped):
    """4-bit integers in AutoAWQ's `gemm` layout."""

    methods = ("awq",)
    _ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
    """Which nibble of a word holds each of 8 columns."""

    def __init__(self, directory: SourceDirectory, section: Section):
        super().__init__(directory, section)
        said = dict(section.content)
        for key, old in (("bits", "w_bit"), ("group_size", "q_group_size")):
            said.setdefault(key, said.get(old))
        section = Section(said, section.where)
        section.one_of("bits", (4,))
        self.settings = dataclasses.replace(_Settings.of(section), symmetric=False)
        version = section.content.get("version", section.content.get("format", "gemm"))
        if str(version).lower() != "gemm":
            raise section.wrong("version", "gemm: other layouts are not read")
        if not section.flag("zero_point", True):
            raise section.wrong("zero_point", "true")
        self.ignored = Names(section.names("modules_to_not_convert"), section.where)

    def leaves(self, module: str) -> bool:
        """What the config names, as AutoAWQ matches it."""
        return any(name in module for name in self.ignored.patterns)

    def linear(self, module: str) -> Linear:
        """By the shape of the codes."""
        info = self.matrix(module, "qweight")
        if self.leaves(module):
            raise codes_of_ignored(self.directory, module)
        k, n = info.shape[0], info.shape[1] * 8
        self.check(module, "qweight", info.shape, "int32")
        return self._linear(module, self.settings, k, n)

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
