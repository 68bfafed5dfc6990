"""``quantize_array``: one weight to one QTensor, by any data-free method."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fdq.formats import FORMATS, Arrays
from fdq.formats.qtensor import QTensor
from fdq.quantizers import clip_search, fastdeploy_rounding
from fdq.quantizers.round_to_nearest import round_to_nearest
from fdq.schemes.scheme import WeightSpec

METHODS = ("absmax", "signed_max", "four_over_six", "search")
"""Ways to choose scales; which of them a format has is in its ``methods``."""

SLAB_WEIGHTS = 1 << 18
"""Weights searched at a time: a few copies in float32 fit a CPU's cache (twice as fast)."""


def quantize_array(
    w: Any,
    spec: WeightSpec,
    *,
    method: str | None = None,
    compat: str | None = None,
    importance: Any = None,
    path: str = "<array>",
) -> QTensor:
    """Quantizes one weight.

    Args:
      w: ``[..., K, N]`` of any float dtype; leading axes are experts or layers. Also a tracer, or
        a ``jax.ShapeDtypeStruct`` (the result then holds those).
      spec: how the weight is stored.
      method: how scales are chosen. ``"absmax"`` maps the largest magnitude of a group to the
        highest level; ``"signed_max"`` to the lowest, with a signed scale (integers);
        ``"four_over_six"`` the better of two scales (``nvfp4``); ``"search"`` takes the scale of
        least squared error. None: ``"search"`` for 4 bits and fewer, else ``"absmax"``.
      compat: ``"fastdeploy"`` (its GPU kernel) or ``"fastdeploy-cpu"`` reproduces FastDeploy's
        WINT8 and WINT4 bit for bit. Excludes ``method`` and ``importance``.
      importance: ``[..., K]`` nonnegative weight of the squared error of each input channel,
        such as the mean square of what multiplies it; only with ``"search"``.
      path: name of the parameter, used only in errors.

    Returns:
      A QTensor in the canonical layout. ``jax.vmap(quantize_array)`` over leading axes gives the
      same tree as one call on the stack.

    Raises:
      ValueError: the weight is not a float matrix, has NaN or infinity (only looked for in
        concrete arrays), or does not fit the spec; the message names ``path``.

    Examples:
      >>> w = jnp.linspace(-1.0, 1.0, 256).reshape(128, 2)
      >>> q = quantize_array(w, WeightSpec(format="int8"))
      >>> q.shape, q.codes.dtype, q.scale.shape
      ((128, 2), dtype('int8'), (1, 2))
      >>> g = WeightSpec(format="int4", granularity="group", group_size=64,
      ...                scale_dtype="bfloat16")
      >>> quantize_array(w, g).bits_per_weight
      4.25
    """
    if not hasattr(w, "shape") or not hasattr(w, "dtype"):
        w = np.asarray(w)
    abstract = isinstance(w, jax.ShapeDtypeStruct)
    if len(w.shape) < 2 or not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(
            f"{path}: expected a float weight [..., K, N], found {w.dtype} "
            f"{tuple(w.shape)}. Only matrices can be quantized."
        )
    if spec.format not in FORMATS:
        raise ValueError(
            f"{path}: unknown weight format {spec.format!r}; known are {', '.join(FORMATS)}."
        )
    format = FORMATS[spec.format]
    k, n = w.shape[-2:]
    format.check(spec, k, n, path)
    if compat is not None:
        fastdeploy_rounding.check(spec, compat, w.dtype, method, importance is not None, path)
    else:
        method = format.pick_method(spec, method, path)
    if importance is not None:
        importance = _check_importance(importance, w.shape, method, path)
    if not abstract and not isinstance(w, Tracer):
        if isinstance(w, np.ndarray):
            w = jnp.asarray(w)
        check_finite(w, path)
    run = functools.partial(_quantize, spec=spec, method=method, compat=compat)
    if abstract:
        arrays = jax.eval_shape(run, w, importance)
    else:
        arrays = run(w, importance, sequential=_on_one_device(w))
    return QTensor(**arrays, spec=spec, padding=format.padding(k))


@functools.partial(jax.jit, static_argnames=("spec", "method", "compat", "sequential"))
def _quantize(
    w: jax.Array,
    importance: jax.Array | None,
    *,
    spec: WeightSpec,
    method: str | None,
    compat: str | None,
    sequential: bool = False,
) -> Arrays:
    """``[..., K, N]`` -> arrays; ``sequential`` takes one matrix of a stack at a time."""

    def one(w: jax.Array, importance: jax.Array | None) -> Arrays:
        if compat is not None:
            return fastdeploy_rounding.quantize(w, spec, compat)
        if method == "search":
            slabs = _column_slabs(w.shape, spec) if sequential else 1
            return _search(w, spec, importance, slabs)
        assert method is not None
        return round_to_nearest(w.astype(jnp.float32), spec, method)

    if w.ndim == 2:
        return one(w, importance)
    if method != "search" or not sequential:
        over_stack = one
        for _ in range(w.ndim - 2):
            over_stack = jax.vmap(over_stack)
        return over_stack(w, importance)
    # A search holds several float32 copies of what it works on: one matrix at a time.
    lead = w.shape[:-2]
    flat = w.reshape(-1, *w.shape[-2:])
    if importance is None:
        out = jax.lax.map(lambda w: one(w, None), flat)
    else:
        out = jax.lax.map(lambda pair: one(*pair), (flat, importance.reshape(len(flat), -1)))
    return {name: a.reshape(*lead, *a.shape[1:]) for name, a in out.items()}


def _search(w: jax.Array, spec: WeightSpec, importance: jax.Array | None, slabs: int) -> Arrays:
    """Searches a matrix, about ``slabs`` parts of its columns one after the other."""
    if slabs == 1:
        return clip_search.clip_search(w.astype(jnp.float32), spec, importance=importance)
    n = w.shape[1]
    columns = -(-n // slabs)
    slabs = -(-n // columns)

    def search_slab(i: jax.Array) -> Arrays:
        # Where the last slab would be narrower, it starts earlier and does some columns again.
        start = jnp.minimum(i * columns, n - columns)
        slab = jax.lax.dynamic_slice_in_dim(w, start, columns, axis=1)
        return clip_search.clip_search(slab.astype(jnp.float32), spec, importance=importance)

    parts = jax.lax.map(search_slab, jnp.arange(slabs))
    again = slabs * columns - n

    def joined(a: jax.Array) -> jax.Array:
        if not again:
            return jnp.moveaxis(a, 0, 1).reshape(a.shape[1], n)
        first = jnp.moveaxis(a[:-1], 0, 1).reshape(a.shape[1], (slabs - 1) * columns)
        return jnp.concatenate([first, a[-1, :, again:]], axis=1)

    return {name: joined(a) for name, a in parts.items()}


def _column_slabs(shape: tuple[int, ...], spec: WeightSpec) -> int:
    """How many parts the columns are searched in: the search holds float32 copies of a part."""
    k, n = shape
    shared = spec.granularity in ("tensor", "block") or spec.double_quantization
    if shared or spec.format in ("nvfp4", "cc2"):  # one scale of the matrix; slabs of its own
        return 1
    return min(n, -(-k * n // SLAB_WEIGHTS))


def check_finite(w: jax.Array, path: str = "<array>") -> None:
    """Raises ValueError with count and first position if a concrete array has NaN or infinity."""
    if bool(_all_finite(w)):
        return
    bad = ~np.isfinite(np.asarray(w).astype(np.float32))
    first = tuple(int(i) for i in np.argwhere(bad)[0])
    raise ValueError(
        f"{path}: {int(bad.sum())} of {bad.size} values are NaN or infinite, the first at "
        f"{list(first)}. Expected finite weights; check the checkpoint that they come from."
    )


@jax.jit
def _all_finite(w: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(w))


def _on_one_device(w: Any) -> bool:
    if isinstance(w, Tracer):
        return False
    return len(w.sharding.device_set) == 1


def _check_importance(importance: Any, shape: tuple[int, ...], method: Any, path: str) -> Any:
    if method != "search":
        raise ValueError(
            f"{path}: importance weights only guide method='search', found method={method!r}."
        )
    found = tuple(importance.shape)
    expected = (*shape[:-2], shape[-2])
    if found not in (expected, (shape[-2],)):
        options = " or ".join(str(option) for option in dict.fromkeys((expected, (shape[-2],))))
        raise ValueError(f"{path}: expected importance of shape {options}, found {found}.")
    if isinstance(importance, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(expected, jnp.float32)
    return jnp.broadcast_to(jnp.asarray(importance).astype(jnp.float32), expected)
