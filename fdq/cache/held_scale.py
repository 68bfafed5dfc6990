"""What a cache holds of a calibration: static scales, zero points, means of keys."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fdq.schemes.scheme import CacheSpec


def what_is_calibrated(spec: CacheSpec) -> str:
    """The words for what a cache of that spec takes from a calibration."""
    return "means of keys" if spec.dynamic else f"static scales per {spec.granularity}"


def held_scale(
    array: Any, name: str, shape: tuple[int, int, int, int], dtype: Any, *, whole: bool = False
) -> jax.Array:
    """A scale `[heads, D]` or, unless `whole`, `[heads, 1]` of a static spec, or a mean, checked.

    A copy: the cache is donated, and the caller's scales must survive that.
    """
    found = None if array is None else jnp.shape(array)
    heads, d = shape[1], shape[3]
    if found != (heads, d) and (whole or found != (heads, 1)):
        other = "" if whole else f" or {(heads, 1)}"
        raise ValueError(
            f"static KV scales {name}: got shape {found}, expected {(heads, d)}{other}"
        )
    return jnp.array(array, dtype, copy=True)
