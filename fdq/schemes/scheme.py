"""Schemes: what weights, activations and the KV cache are stored in.

A scheme is a name: `"W4A16C8"` says int4 weights, 16-bit activations and an int8 KV cache. The
name parses to a frozen `Scheme` of three small specs, and everything finer than the name (group
size, scale dtype, zero points) is a field of a spec and a suffix of the name::

    W<type>A<type>C<type>-<suffix>-<suffix>...

    W  16 8 4 3 2 (integers)  fp8 fp8e5m2 NF4 MXFP4 MXFP8 NVFP4 CC2
       T4 T3.5 T3 T2.5 T2 T1.5 (trellis codes)
    A  16 8 fp8               needs a quantized W
    C  16 8 4 3 2 fp8
    suffixes of W  -g<rows> -channel -tensor -b<n> -b<rows>x<columns>   what shares a scale
                   -sym -half -asym -affine                             zero point
                   -f32 -bf16 -f16 -ue8m0                               dtype of the scale
                   -dq                                                  double quantization (NF4)
                   -rows                                                an order of rows (GPTQ)
    suffixes of A  -token -x<channels> -static                          what shares a scale
    suffixes of C  -kvtoken -kvchannel -kvhead -kvblock                 what shares a scale
                   -kvrotated -kvcentered                               rotated heads

Names are case-insensitive, `Int4` means `4`, a missing part means 16, and `str(scheme)` is
the canonical name: all three parts, and only those suffixes that differ from the defaults.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from fdq.schemes import grammar
from fdq.schemes.kinds import CACHE_FORMATS, WEIGHT_FORMATS

Granularity = Literal["tensor", "channel", "group", "block"]
ZeroPoint = Literal["none", "half", "integer", "offset"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightSpec:
    """How a weight `[..., K, N]` is stored: the static part of a `QTensor`.

    Attributes:
      format: name of the format, a key of `fdq.formats.FORMATS`.
      granularity: which elements share one scale: the whole `tensor`, one output `channel`
        (all of K), a `group` of `group_size` rows of K in one channel, or a `block` of
        `block_size` (rows of K, columns of N).
      group_size: rows of K that share a scale; only with granularity `group`.
      block_size: `(rows of K, columns of N)`; only with granularity `block`.
      zero_point: `none` (codes are signed), `half` (levels at odd multiples of scale / 2,
        best for 2 bits), `integer` (asymmetric; one stored code per scale) or `offset` (affine:
        one stored number per scale that is added, in its dtype).
      scale_dtype: what the scale is rounded to before codes are chosen. `float8_e8m0fnu` is a
        power of two, `uint4` the packed local scale of `cc2`.
      double_quantization: the scales are themselves stored in 8 bits (`nf4`).
      row_order: rows of the codes are in another order than those of the weight, which is stored
        (`desc_act` of GPTQ); integers in groups. Quantizers never make it.

    Raises:
      ValueError: on construction, if the fields contradict each other or the format.
    """

    format: str
    granularity: Granularity = "channel"
    group_size: int | None = None
    block_size: tuple[int, int] | None = None
    zero_point: ZeroPoint = "none"
    scale_dtype: str = "float32"
    double_quantization: bool = False
    row_order: bool = False

    def __post_init__(self):
        if isinstance(self.block_size, list):  # JSON has no tuples
            object.__setattr__(self, "block_size", tuple(self.block_size))
        problem = _weight_problem(self)
        if problem:
            raise ValueError(f"WeightSpec(format={self.format!r}): {problem}")

    @property
    def symmetric(self) -> bool:
        """True when no zero point is stored."""
        return self.zero_point in ("none", "half")

    @classmethod
    def parse(cls, name: str) -> WeightSpec | None:
        """The weight part alone: `"W4-g64"`, `"4-g64"` or a whole scheme's name."""
        fields = grammar.parse(_part_name(name, "W"))["w"]
        return None if fields is None else cls(**fields)

    @classmethod
    def default(cls, format: str, **fields) -> WeightSpec:
        """The format's default spec, with `fields` replaced (scale dtype follows the group)."""
        return cls(**WEIGHT_FORMATS[format].spec_fields(fields))

    def __str__(self) -> str:
        return "-".join(["W" + _type_name("w", self), *grammar.weight_suffixes(self)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationSpec:
    """How the input `[..., K]` of a matrix product is quantized.

    Attributes:
      format: `int8` or `float8_e4m3`.
      granularity: one scale per `token`, per token and `group_size` channels
        (`token_group`), or one for the whole `tensor` (static only).
      group_size: channels per scale; only with granularity `token_group`.
      dynamic: True computes scales from the batch at hand; False takes a calibrated scale.

    Raises:
      ValueError: on construction, if the fields contradict each other.
    """

    format: Literal["int8", "float8_e4m3"]
    granularity: Literal["token", "token_group", "tensor"] = "token"
    group_size: int | None = None
    dynamic: bool = True

    def __post_init__(self):
        problem = None
        if self.format not in grammar.formats("a"):
            problem = f"unknown format; use one of {', '.join(grammar.formats('a'))}"
        elif self.granularity not in ("token", "token_group", "tensor"):
            problem = f"unknown granularity {self.granularity!r}"
        elif (self.granularity == "token_group") != (self.group_size is not None):
            problem = "group_size goes with granularity 'token_group', and only with it"
        elif self.group_size is not None and not _is_size(self.group_size):
            problem = f"group_size={self.group_size!r} is not a positive whole number"
        elif self.dynamic == (self.granularity == "tensor"):
            problem = "granularity 'tensor' is static (dynamic=False), the others are dynamic"
        if problem:
            raise ValueError(f"ActivationSpec(format={self.format!r}): {problem}")

    @property
    def bound(self) -> float:
        """Largest magnitude of a code: a scale is the largest magnitude of values over this."""
        return {"int8": 127.0, "float8_e4m3": 448.0}[self.format]

    @classmethod
    def parse(cls, name: str) -> ActivationSpec | None:
        """The activation part alone: `"A8"`, `"fp8-x128"`, `"int8"`; None for 16 bits."""
        fields = grammar.parse(_part_name(name, "A"))["a"]
        return None if fields is None else cls(**fields)

    def __str__(self) -> str:
        return "-".join(["A" + _type_name("a", self), *grammar.activation_suffixes(self)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """How keys and values `[batch, kv_head, slot, head_dim]` are stored.

    Attributes:
      format: of `CACHE_FORMATS`: `int8`, `float8_e4m3`, `int4`, `int3`, `int2` or one of your own.
      granularity: `token_head` (one scale per token and KV head, dynamic, no calibration),
        `channel` (static, one per KV head and channel), `head` (static, one per KV head) or
        `block` (dynamic: keys have one for each channel of 32 tokens, values for 64 channels of a
        token, and the block that is not full yet is kept exact; see `fdq.cache.block_tensor`).
      dynamic: scales come from the tokens themselves (True) or from calibration (False).
      zero_point: one stored zero point per scale, in the formats that have them (`int4`).
      transform: what becomes codes: keys and values as they are (`none`), their heads turned by a
        Hadamard matrix (`rotated`), or that after the calibrated mean of the keys was taken away
        (`centered`); only with granularity `token_head`.

    Raises:
      ValueError: on construction, if the fields contradict each other.
    """

    format: str
    granularity: Literal["token_head", "channel", "head", "block"] = "token_head"
    dynamic: bool = True
    zero_point: bool = False
    transform: Literal["none", "rotated", "centered"] = "none"

    def __post_init__(self):
        if self.format not in CACHE_FORMATS:
            problem = f"unknown format; use one of {', '.join(CACHE_FORMATS)}"
        elif self.granularity not in grammar.CACHE_SUFFIXES.values():
            problem = f"unknown granularity {self.granularity!r}"
        elif self.dynamic != (self.granularity in grammar.DYNAMIC_CACHES):
            problem = (
                "granularities 'token_head' and 'block' are dynamic, 'channel' and 'head' are "
                "dynamic=False"
            )
        elif self.transform not in ("none", *grammar.TRANSFORM_SUFFIXES.values()):
            problem = f"unknown transform {self.transform!r}"
        elif self.transform != "none" and self.granularity != "token_head":
            problem = (
                f"transform {self.transform!r} with granularity {self.granularity!r}; heads are "
                "turned only where a token has a scale of its own, 'token_head'"
            )
        else:
            problem = CACHE_FORMATS[self.format].problem(self)
        if problem:
            raise ValueError(f"CacheSpec(format={self.format!r}): {problem}")

    @property
    def calibrated(self) -> bool:
        """Whether a cache needs something of a calibration: static scales, or means of keys."""
        return not self.dynamic or self.transform == "centered"

    def static_shape(self, kv_heads: int, head_dim: int) -> tuple[int, int]:
        """Of a calibrated scale: one per KV head and channel, or per KV head."""
        return kv_heads, head_dim if self.granularity == "channel" else 1

    @classmethod
    def parse(cls, name: str) -> CacheSpec | None:
        """The cache part alone: `"C8"`, `"fp8"`, `"C4-kvhead"`; None for 16 bits."""
        fields = grammar.parse(_part_name(name, "C"))["c"]
        return None if fields is None else cls(**fields)

    def __str__(self) -> str:
        return "-".join(["C" + _type_name("c", self), *grammar.cache_suffixes(self)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """What weights, activations and the KV cache are stored in; `None` means 16-bit floats.

    Raises:
      ValueError: on construction, if activations are quantized and weights are not.
    """

    weight: WeightSpec | None = None
    activation: ActivationSpec | None = None
    cache: CacheSpec | None = None

    def __post_init__(self):
        if self.activation is not None and self.weight is None:
            raise ValueError(
                f"Scheme: {self.activation} with 16-bit weights; activations are quantized only "
                f"in products with quantized weights. Use e.g. 'W8{self.activation}'."
            )

    @classmethod
    def parse(cls, name: str | Scheme, *, compat: str | None = None) -> Scheme:
        """The scheme of a name, e.g. `"W4A16C8"`, `"WNF4A8C8"`, `"W4A16-g64"`, `"wint4"`.

        FastDeploy's method names are accepted as well. Two need care: `wint2` is FastDeploy's
        convolutional code, `WCC2A16C16` (plain 2-bit integers are `W2`), and `mix_quant` is
        a mixture, so a single scheme can only be that of its routed experts, `W4A8C8`;
        `fdq.Recipe.parse("mix_quant")`, which every entry point uses, gives the whole mixture.

        Args:
          name: the name; a `Scheme` is returned as it is.
          compat: `"fastdeploy"` gives integer weights of 8 and 4 bits one scale per channel, as
            FastDeploy does, where the name leaves it open (`w4afp8` keeps groups of 128).

        Raises:
          ValueError: unknown or contradictory name; says which part and the nearest valid name.
        """
        if isinstance(name, Scheme):
            return name
        if not isinstance(name, str):
            raise TypeError(f"A scheme is a name such as 'W4A16C8', got {type(name).__name__}.")
        try:
            return _read(name, compat)
        except grammar.Unreadable as error:
            nearest = grammar.suggest(name, _canonical)
            hint = f"Did you mean {nearest!r}? " if nearest else ""
            example = "" if nearest else " Names look like 'W4A16C8', 'Wfp8Afp8', 'W4A16-g64'."
            raise ValueError(
                f"Unknown quantization scheme {name!r}. {hint}{error}{example}"
            ) from None

    def __str__(self) -> str:
        weight, activation, cache = self.weight, self.activation, self.cache
        parts = zip("wac", (weight, activation, cache), strict=True)
        head = (part.upper() + _type_name(part, spec) for part, spec in parts)
        blocks = weight.block_size if weight else None
        suffixes = (
            *(grammar.weight_suffixes(weight) if weight else ()),
            *(grammar.activation_suffixes(activation, blocks) if activation else ()),
            *(grammar.cache_suffixes(cache) if cache else ()),
        )
        return "-".join(["".join(head), *suffixes])


def _type_name(part: str, spec: WeightSpec | ActivationSpec | CacheSpec | None) -> str:
    return "16" if spec is None else grammar.formats(part)[spec.format].grammar_name


def _weight_problem(spec: WeightSpec) -> str | None:
    """What is wrong with a WeightSpec, or None."""
    if spec.format not in WEIGHT_FORMATS:
        return f"unknown format; use one of {', '.join(WEIGHT_FORMATS)}"
    format = WEIGHT_FORMATS[spec.format]
    if spec.granularity not in format.granularities:
        takes = " or ".join(format.granularities)
        return f"granularity {spec.granularity!r}; this format takes {takes}"
    if (spec.granularity == "group") != (spec.group_size is not None):
        return "group_size goes with granularity 'group', and only with it"
    if (spec.granularity == "block") != (spec.block_size is not None):
        return "block_size goes with granularity 'block', and only with it"
    groups = () if spec.group_size is None else (spec.group_size,)
    blocks = spec.block_size or ()
    if len(blocks) not in (0, 2) or not all(map(_is_size, (*groups, *blocks))):
        return (
            f"group_size={spec.group_size!r}, block_size={spec.block_size!r}: not positive whole "
            "numbers, one for groups and two for blocks"
        )
    return format.spec_problem(spec)


def _is_size(n: object) -> bool:
    return isinstance(n, int) and n > 0


def _read(name: str, compat: str | None) -> Scheme:
    fields = grammar.parse(name, compat)
    weight, activation, cache = (fields[part] for part in "wac")
    try:
        return Scheme(
            weight=None if weight is None else WeightSpec(**weight),
            activation=None if activation is None else ActivationSpec(**activation),
            cache=None if cache is None else CacheSpec(**cache),
        )
    except ValueError as error:
        raise grammar.Unreadable(str(error)) from None


def _canonical(name: str) -> str | None:
    try:
        return str(_read(name, None))
    except grammar.Unreadable:
        return None


def _part_name(name: str, part: str) -> str:
    """`"int8"`, `"8-kvhead"` and `"C8"` as the part of a scheme that they name."""
    text = name.strip()
    head = text.lower().split("-")[0]
    is_type = head in grammar.spellings(part.lower())
    return part + text if is_type or head[:1] not in ("w", "a", "c") else text
