"""`quantize_array`: one weight to one QTensor, by any quantizer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fdq.formats import FORMATS, row_order
from fdq.formats.qtensor import QTensor
from fdq.quantizers.quantizer import MOMENT_AXES, Quantizer, Statistics, pick, statistic_shape
from fdq.schemes.grammar import COMPATS
from fdq.schemes.kinds import QUANTIZERS
from fdq.schemes.scheme import WeightSpec


def quantize_array(
    w: Any,
    spec: WeightSpec,
    *,
    method: str | None = None,
    compat: str | None = None,
    importance: Any = None,
    statistics: Statistics | None = None,
    path: str = "<array>",
) -> QTensor:
    """Quantizes one weight.

    Args:
      w: `[..., K, N]` of any float dtype; leading axes are experts or layers. Also a tracer, or a
        `jax.ShapeDtypeStruct` (the result then holds those).
      spec: how the weight is stored.
      method: the name of a quantizer. `"absmax"` maps the largest magnitude of a group to the
        highest level; `"signed_max"` to the lowest, with a signed scale (integers);
        `"four_over_six"` the better of two scales (`nvfp4`); `"search"` takes the scale of least
        squared error. None: `"search"` for 4 bits and fewer, else `"absmax"`.
      compat: `"fastdeploy"` (its GPU kernel) or `"fastdeploy-cpu"` reproduces FastDeploy's WINT8
        and WINT4 bit for bit. Excludes `method` and `importance`.
      importance: `[..., K]` nonnegative weight of the squared error of each input channel, such as
        the mean square of what multiplies it (statistic `mean_square`); only with `"search"`. In a
        group where all are zero the channels count alike.
      statistics: those of the weight's input, by name; the quantizer takes what it uses.
      path: name of the parameter, used only in errors.

    Returns:
      A QTensor in the canonical layout. `jax.vmap(quantize_array)` over leading axes gives the
      same tree as one call on the stack.

    Raises:
      ValueError: the weight is not a float matrix, it or a statistic has NaN or infinity, or a
        statistic negative numbers, the weight is too large or too small for the scales of the
        spec, or its shape does not fit; the message names `path`. Values are looked at in concrete
        arrays only: traced ones (under `jax.jit`) give a matrix of NaN instead.

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
    if len(w.shape) < 2 or not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(
            f"{path}: expected a float weight [..., K, N], found {w.dtype} "
            f"{tuple(w.shape)}. Only matrices can be quantized."
        )
    if spec.format not in FORMATS:
        raise ValueError(
            f"{path}: unknown weight format {spec.format!r}; known are {', '.join(FORMATS)}."
        )
    if spec.row_order and not isinstance(w, jax.ShapeDtypeStruct):
        raise ValueError(
            f"{path}: {spec} says that rows are in an order which came with the codes. Quantizers "
            "choose none: leave out -rows."
        )
    format = FORMATS[spec.format]
    k, n = w.shape[-2:]
    format.check(spec, k, n, path)
    if compat is not None:
        quantizer = _compatible(spec, compat, w.dtype, path)
        if method is not None or importance is not None:
            raise ValueError(
                f"{path}: compat={compat!r} fixes how scales are chosen; drop method and "
                "importance."
            )
    else:
        quantizer = pick(spec, method, path, w.dtype)
    given = dict(statistics or {})
    if importance is not None:
        if "mean_square" not in quantizer.statistics:
            raise ValueError(
                f"{path}: importance weights guide a search (method='search'), found "
                f"method={quantizer.name!r}."
            )
        given["mean_square"] = importance
    given = _wanted(quantizer, given, w.shape, path)
    bounds = format.magnitudes(spec)
    on_host: np.ndarray | None = w if isinstance(w, np.ndarray) else None
    if not isinstance(w, jax.ShapeDtypeStruct | Tracer):
        with jax.ensure_compile_time_eval():  # values are known, also inside somebody's jit
            # On the host, before float32 takes tiny ones of 64 bits for zero.
            check_magnitudes(w, bounds, spec, path)
            if on_host is not None:
                w = on_device(on_host)
    arrays = quantizer(w, spec, given, path)
    if on_host is not None:
        if any(isinstance(array, Tracer) for array in arrays.values()):
            # Somebody's program keeps it as a constant, which has to be a copy.
            arrays = quantizer(jnp.asarray(on_host), spec, given, path)
        # It was read in place: now its owner may change it.
        jax.block_until_ready(arrays)
    traced = any(isinstance(value, Tracer) for value in (w, *given.values()))
    if traced and not isinstance(w, jax.ShapeDtypeStruct):
        arrays = _poisoned(arrays, jnp.asarray(w), bounds, given)
    order = row_order.abstract(tuple(w.shape), spec)
    return QTensor(**arrays, **order, spec=spec, padding=format.padding(k))


def _compatible(spec: WeightSpec, compat: str, dtype: Any, path: str) -> Quantizer:
    """FastDeploy's quantizer of this name; ValueError where it has no such format."""
    if compat not in COMPATS:
        raise ValueError(f"{path}: unknown compat {compat!r}; use one of {', '.join(COMPATS)}.")
    reason = QUANTIZERS[compat].unsupported(spec, dtype)
    if reason is not None:
        raise ValueError(f"{path}: compat={compat!r} {reason}. Drop compat for this tensor.")
    return QUANTIZERS[compat]


def _wanted(
    quantizer: Quantizer, given: dict[str, Any], shape: tuple[int, ...], path: str
) -> dict[str, Any]:
    """The statistics that a quantizer uses, float32 `[..., K]`, or `[..., K, K]` and so on."""
    wanted = {}
    for name in quantizer.statistics:
        one = statistic_shape(name, shape)
        expected = (*shape[:-2], *one)
        if given.get(name) is None:
            if name in quantizer.required:
                moments = {
                    "input_moment": ", moments=True",
                    "output_moment": ", output_moments=True",
                }
                raise ValueError(
                    f"{path}: quantizer {quantizer.name!r} needs the {name} of the layer. Pass "
                    f"calibration=fdq.calibrate(model, tokens{moments.get(name, '')})."
                )
            continue
        value = _numbers(given[name], name, path)
        found = tuple(value.shape)
        if found not in (expected, one):
            options = " or ".join(str(option) for option in dict.fromkeys((expected, one)))
            raise ValueError(f"{path}: expected {_word(name)} of shape {options}, found {found}.")
        if not isinstance(value, jax.ShapeDtypeStruct | Tracer):
            _check_statistic(np.asarray(value), name, path)
        if isinstance(value, jax.ShapeDtypeStruct):
            wanted[name] = jax.ShapeDtypeStruct(expected, jnp.float32)
        else:
            wanted[name] = jnp.broadcast_to(jnp.asarray(value).astype(jnp.float32), expected)
    return wanted


def check_finite(w: jax.Array | np.ndarray, path: str = "<array>") -> None:
    """Raises ValueError with count and first position if a concrete array has NaN or infinity."""
    if bool(np.isfinite(_largest(w)).all()):
        return
    bad = ~np.isfinite(np.asarray(w).astype(np.float32))
    first = tuple(int(i) for i in np.argwhere(bad)[0])
    raise ValueError(
        f"{path}: {int(bad.sum())} of {bad.size} values are NaN or infinite in float32, the first "
        f"at {list(first)}. Expected finite weights; check the checkpoint that they come from."
    )


def check_magnitudes(
    w: jax.Array | np.ndarray, bounds: tuple[float, float], spec: WeightSpec, path: str = "<array>"
) -> None:
    """`check_finite`, and that the largest magnitude of each matrix is within `bounds`, or zero."""
    if w.dtype == np.float64:
        largest = np.abs(np.asarray(w)).max(axis=(-2, -1), initial=0)
    elif isinstance(w, np.ndarray) and w.dtype.itemsize in _BITS:
        largest = _largest_on_host(w).astype(np.float64)
    else:
        largest = np.asarray(_largest(w)).astype(np.float64)
    if not np.isfinite(largest).all():
        check_finite(w, path)
    wrong = (largest > bounds[1]) | ((largest > 0) & (largest < bounds[0]))
    if not wrong.any():
        return
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    where = f"[{', '.join(map(str, at))}]" if at else ""
    dtype = (
        ", or a wider dtype of its scales (-bf16, -f32)" if spec.scale_dtype == "float16" else ""
    )
    raise ValueError(
        f"{path}{where}: the largest magnitude is {largest[at]:.4g}; {spec} holds weights whose "
        f"largest is between {bounds[0]:.2g} and {bounds[1]:.2g} (or all are zero). Rescale the "
        f"weight, or leave it as it is by a rule{dtype}."
    )


_BITS: dict[int, Any] = {2: np.uint16, 4: np.uint32}
_CHUNK = 1 << 17  # numbers at a time, in a core's cache


def _largest_on_host(w: np.ndarray) -> np.ndarray:
    """`_largest` of floats of 16 or 32 bits, a tenth of what it takes XLA on a CPU."""
    largest = np.zeros(w.shape[:-2], np.float32)
    for index in np.ndindex(w.shape[:-2]):
        matrix = w[index]
        largest[index] = largest_magnitude(matrix.T if matrix.flags.f_contiguous else matrix)
    return largest


def largest_magnitude(array: np.ndarray) -> float:
    """Of floats of 16 or 32 bits on the host, by their bits; NaN where there is one."""
    whole = _BITS[array.dtype.itemsize]
    magnitude, buffer = whole(np.iinfo(whole).max >> 1), np.empty(_CHUNK, whole)
    flat, largest = np.ascontiguousarray(array).reshape(-1).view(whole), whole(0)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        found = np.bitwise_and(part, magnitude, out=buffer[: part.size]).max()
        largest = max(found, largest)
    return float(np.asarray(largest).view(array.dtype)[()])


def on_device(w: np.ndarray) -> jax.Array:
    """A host array on the default device; one that is stored `[N, K]` is turned there.

    On a CPU without the copy that `jnp.asarray` makes: `w` must not change before it was used.
    """
    if w.ndim == 2 and w.flags.f_contiguous and not w.flags.c_contiguous:
        return _turned(jax.device_put(w.T))
    return jax.device_put(w)


@jax.jit
def _turned(w: jax.Array) -> jax.Array:
    return w.T


@jax.jit
def _largest(w: jax.Array | np.ndarray) -> jax.Array:
    """The largest magnitude of each matrix, float32 `[...]`; NaN where there is one.

    By bits, whose order is that of magnitudes: comparing floats would take tiny ones for zero.
    """
    bits = jax.lax.bitcast_convert_type(w.astype(jnp.float32), jnp.int32) & jnp.int32(0x7FFFFFFF)
    largest = jnp.max(bits, axis=(-2, -1), initial=0)
    return jax.lax.bitcast_convert_type(largest, jnp.float32)


def _poisoned(
    arrays: dict[str, Any], w: jax.Array, bounds: tuple[float, float], statistics: Statistics
) -> dict[str, Any]:
    """Traced arrays that decode to NaN where a check of values would have raised.

    Values are not known while tracing; codes have no NaN, and would pass for weights.
    """
    bits = jax.lax.bitcast_convert_type(_largest(jax.lax.stop_gradient(w)), jnp.int32)
    low, high = (jax.lax.bitcast_convert_type(jnp.float32(b), jnp.int32) for b in bounds)
    wrong = (bits > high) | ((bits > 0) & (bits < low))
    for name, value in statistics.items():
        fine = jnp.isfinite(value).all(axis=-1)
        if name in MOMENT_AXES:
            fine, value = fine.all(axis=-1), jnp.diagonal(value, axis1=-2, axis2=-1)
        wrong = wrong | ~fine | (value < 0).any(axis=-1)
    wrong = wrong[..., None, None]

    def poison(name: str, a: jax.Array) -> jax.Array:
        if name == "codes" or not jnp.issubdtype(a.dtype, jnp.floating):
            return a
        return jnp.where(wrong, jnp.asarray(jnp.nan, a.dtype), a)

    return {name: poison(name, a) for name, a in arrays.items()}


def _word(statistic: str) -> str:
    return "importance" if statistic == "mean_square" else statistic


def _numbers(value: Any, name: str, path: str) -> Any:
    """A statistic as an array, lists too; TypeError for what are no real numbers."""
    if not hasattr(value, "dtype"):
        value = np.asarray(value)
    real = jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
    if not real and value.dtype != bool:
        raise TypeError(f"{path}: expected {_word(name)} of numbers, found {value.dtype}.")
    return value


def _check_statistic(value: np.ndarray, name: str, path: str) -> None:
    """Refuses what no mean or maximum of magnitudes can be, as float32 holds it."""
    moment = name in MOMENT_AXES
    low = value
    if moment:
        diagonal = np.diagonal(value, axis1=-2, axis2=-1)
        if value.dtype == np.float32 and np.isfinite(value).all() and (diagonal >= 0).all():
            return  # without copies as large
        low = value * np.eye(value.shape[-1], dtype=value.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        wrong = ~np.isfinite(value.astype(np.float32)) | (low.astype(np.float64) < 0)
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        whose = " on its diagonal" if moment else ""
        raise ValueError(
            f"{path}: expected {_word(name)} of finite numbers >= 0{whose}, found {value[at]} at "
            f"{list(at)} ({int(wrong.sum())} such in all)."
        )
