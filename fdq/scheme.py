"""Schemes: what weights, activations and the KV cache are stored in.

A scheme is a name: ``"W4A16C8"`` says int4 weights, 16-bit activations and an int8 KV cache. The
name parses to a frozen ``Scheme`` of three small specs, and everything finer than the name (group
size, scale dtype, zero points) is a field of a spec.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

WeightFormat = Literal[
    "int8",
    "int4",
    "int3",
    "int2",
    "float8_e4m3",
    "float8_e5m2",
    "nf4",
    "mxfp4",
    "mxfp8",
    "nvfp4",
    "cc2",
]
Granularity = Literal["tensor", "channel", "group", "block"]
ZeroPoint = Literal["none", "half", "integer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightSpec:
    """How a weight ``[..., K, N]`` is stored: the static part of a ``QTensor``.

    Attributes:
      format: name of the format, a key of ``fdq.formats.FORMATS``.
      granularity: which elements share one scale: the whole ``tensor``, one output ``channel``
        (all of K), a ``group`` of ``group_size`` rows of K in one channel, or a ``block`` of
        ``block_size`` (rows of K, columns of N).
      group_size: rows of K that share a scale; only with granularity ``group``.
      block_size: ``(rows of K, columns of N)``; only with granularity ``block``.
      zero_point: ``none`` (codes are signed), ``half`` (levels at odd multiples of scale / 2,
        best for 2 bits), or ``integer`` (asymmetric; one stored code per scale).
      scale_dtype: what the scale is rounded to before codes are chosen. ``float8_e8m0fnu`` is a
        power of two, ``uint4`` the packed local scale of ``cc2``.
      double_quantization: ``nf4`` only: the scales are themselves stored in 8 bits.
    """

    format: WeightFormat
    granularity: Granularity = "channel"
    group_size: int | None = None
    block_size: tuple[int, int] | None = None
    zero_point: ZeroPoint = "none"
    scale_dtype: str = "float32"
    double_quantization: bool = False

    @property
    def symmetric(self) -> bool:
        """True when no zero point is stored."""
        return self.zero_point != "integer"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationSpec:
    """How the input ``[..., K]`` of a matrix product is quantized.

    Attributes:
      format: ``int8`` or ``float8_e4m3``.
      granularity: one scale per ``token``, per token and ``group_size`` channels
        (``token_group``), or one for the whole ``tensor`` (static only).
      group_size: channels per scale; only with granularity ``token_group``.
      dynamic: True computes scales from the batch at hand; False takes a calibrated scale.
    """

    format: Literal["int8", "float8_e4m3"]
    granularity: Literal["token", "token_group", "tensor"] = "token"
    group_size: int | None = None
    dynamic: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """How keys and values ``[batch, kv_head, slot, head_dim]`` are stored.

    Attributes:
      format: ``int8``, ``float8_e4m3`` or ``int4``.
      granularity: ``token_head`` (one scale per token and KV head, dynamic, no calibration),
        ``channel`` (static, one per KV head and channel) or ``head`` (static, one per KV head).
      dynamic: scales come from the token itself (True) or from calibration (False).
      zero_point: one stored zero point per scale (``int4`` needs it).
    """

    format: Literal["int8", "float8_e4m3", "int4"]
    granularity: Literal["token_head", "channel", "head"] = "token_head"
    dynamic: bool = True
    zero_point: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """What weights, activations and the KV cache are stored in; ``None`` means 16-bit floats."""

    weight: WeightSpec | None = None
    activation: ActivationSpec | None = None
    cache: CacheSpec | None = None
