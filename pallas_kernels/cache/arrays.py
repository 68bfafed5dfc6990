"""Keys or values as kernels take them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CacheArrays:
    """Keys or values of one layer, `[B, KH, S, D]`; `value = (code - zero) * scale`.

    Codes are bf16, f16, f32, int8, or uint8 bits of float8_e4m3; int4: uint8 `[B, KH, S, D / 2]`,
    the even channel in the low nibble. The format is a name of `CACHE_WORDS`, None for floats.
    """

    codes: Any
    scale: Any = None  # float32, [B, KH, S] per token, [KH, D] or [KH, 1] static; None for floats
    zero: Any = None  # uint8, of the shape of `scale`; int4 only
    format: str | None = dataclasses.field(default=None, metadata={"static": True})
