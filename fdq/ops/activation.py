"""Quantized activations: codes and scales of x, and products formed in their arithmetic.

`x[..., k] ~= codes[..., k] * scale`, with one scale per token, per token and group of channels,
or one calibrated scale for the whole tensor. Integers are rounded to nearest even within +-127,
float8 e4m3 is saturated at 448 (a plain cast would overflow to NaN).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fdq.formats.exact_arithmetic import quotient
from fdq.formats.grouping import repeat_last
from fdq.ops.weight_view import WeightView, add_offsets, pad_rows
from fdq.schemes.scheme import ActivationSpec
from pallas_kernels.typing import Array, Float, Int, Num

# FastDeploy's floor (per_token_quant_fp8.cu): a row of zeros gets a scale that is not zero.
_SMALLEST_MAXIMUM = 1e-10


@dataclasses.dataclass(frozen=True)
class ShardedRows(ActivationSpec):
    """Of rows whose channels are cut over mesh axes: in `jax.shard_map` parts share a scale."""

    axes: tuple[str, ...] = ()

    @classmethod
    def of(cls, spec: ActivationSpec | None, axes: tuple[str, ...]) -> ActivationSpec | None:
        """A spec of rows that are cut so; one whose scales belong to one part each as it is."""
        if spec is None or spec.granularity != "token" or not axes:
            return spec
        fields = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}
        return cls(**fields, axes=axes)


def quantize_activation(
    x: Float[Array, "*m k"],
    spec: ActivationSpec,
    scale: Float[Array, "*given"] | None = None,
    *,
    path: str = "<array>",
) -> tuple[Num[Array, "*m k"], Float[Array, "*scales"]]:
    """Codes and scales of activations.

    Args:
      x: float `[..., K]`.
      spec: format, granularity and whether scales are dynamic.
      scale: the calibrated one, an array with one element; not allowed where `spec.dynamic`.
      path: name of the layer, used only in errors.

    Returns:
      `(codes, scale)`: int8 or float8_e4m3fn `[..., K]`, float32 `[..., 1]` (token, tensor)
      or `[..., ceil(K / group)]` (token_group).
    """
    bound = spec.bound
    x = x.astype(jnp.float32)
    k = x.shape[-1]
    check_activation_scale(spec, scale, path)
    if scale is not None:
        scale = scale.astype(jnp.float32).reshape((1,) * x.ndim)
        expanded = scale
    elif spec.granularity == "token_group":
        group = spec.group_size
        assert group
        groups = -(-k // group)
        padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, groups * group - k)])
        scale = _dynamic_scale(padded.reshape(*x.shape[:-1], groups, group), bound)[..., 0]
        expanded = repeat_last(scale, group, k)
    else:
        axes = (-1,) if spec.granularity == "token" else tuple(range(x.ndim))
        over = spec.axes if isinstance(spec, ShardedRows) else ()
        scale = _dynamic_scale(x, bound, axes, over)
        expanded = scale
    y = quotient(x, expanded)
    if spec.format == "int8":
        return jnp.clip(jnp.round(y), -bound, bound).astype(jnp.int8), scale
    return jnp.clip(y, -bound, bound).astype(jnp.float8_e4m3fn), scale


def check_activation_scale(spec: ActivationSpec, scale: Any, path: str) -> None:
    """Refuses a calibrated scale that is missing, too many or not wanted.

    Raises:
      ValueError: naming `path`.
    """
    if not spec.dynamic and scale is None:
        raise ValueError(
            f"{path}: static activation quantization needs activation_scale, found None; "
            "calibrate the model or use a dynamic ActivationSpec."
        )
    if not spec.dynamic and scale.size != 1:
        raise ValueError(
            f"{path}: expected one activation_scale, found shape {tuple(scale.shape)}."
        )
    if spec.dynamic and scale is not None:
        raise ValueError(
            f"{path}: activation_scale is given but the ActivationSpec is dynamic; "
            "use granularity='tensor', dynamic=False for a calibrated one."
        )
    if spec.granularity == "token_group" and not spec.group_size:
        raise ValueError(
            f"{path}: granularity 'token_group' needs group_size, found {spec.group_size}."
        )


def _dynamic_scale(
    x: jax.Array, bound: float, axes: tuple[int, ...] = (-1,), over: tuple[str, ...] = ()
) -> jax.Array:
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    if over:
        # Gathered: one number a row, in half the steps that a sum over the devices takes.
        largest = jnp.max(lax.all_gather(largest, over), axis=0)
    return quotient(jnp.maximum(largest, jnp.float32(_SMALLEST_MAXIMUM)), bound)


def activation_values(codes: jax.Array, scale: jax.Array, group: int | None, dtype: Any) -> Any:
    """`codes * scale`, `[..., K]` in `dtype`; `group` is that of `token_group`."""
    if scale.shape[-1] != 1 and group is not None:
        scale = repeat_last(scale, group, codes.shape[-1])
    return (codes.astype(jnp.float32) * scale).astype(dtype)


def padded_integer_dot(x: Int[Array, "m k"], w: Int[Array, "k n"]) -> Int[Array, "m n"]:
    """int8 `x [M, K] @ w [K, N]` -> int32, with a second row where there is one."""
    m = x.shape[0]
    if m == 1:  # XLA's CPU backend has vector instructions for two rows, ten times faster
        x = jnp.concatenate([x, jnp.zeros_like(x)], axis=0)
    return lax.dot(x, w, preferred_element_type=jnp.int32)[:m]


def integer_product(x: Int[Array, "m k"], view: WeightView) -> Float[Array, "m n"]:
    """`sum_g scale[g, n] * sum_{k in g} x[m, k] * (code[k, n] - zero[g, n])`, int32 in a group.

    Plus `sum_g offset[g, n] * sum_{k in g} x[m, k]`.
    """
    x = pad_rows(x, view)
    m, n = x.shape[0], view.columns
    groups = view.scale.shape[-2]
    codes = view.codes.reshape(view.units, view.unit_bytes, n)
    rows = view.unit_codes([codes[:, i] for i in range(view.unit_bytes)])
    shift = 0
    if view.format.bits == 8 and rows[0].dtype == jnp.uint8:
        shift = 128  # unsigned 8-bit codes do not fit int8
        rows = [(r ^ jnp.uint8(128)).astype(jnp.int8) for r in rows]
    planes = [r.astype(jnp.int8) for r in rows]
    parts = x.reshape(m, view.units, view.unit_rows)
    if groups == 1:
        acc: Any = sum(padded_integer_dot(parts[..., p], w) for p, w in enumerate(planes))
        acc = acc[None]
    else:
        units = view.units // groups
        over_units = (((2,), (1,)), ((0,), (0,)))

        def grouped_dot(x_plane, w_plane):
            left = x_plane.reshape(m, groups, units).transpose(1, 0, 2)
            right = w_plane.reshape(groups, units, n)
            return lax.dot_general(left, right, over_units, preferred_element_type=jnp.int32)

        acc = sum(grouped_dot(parts[..., p], w) for p, w in enumerate(planes))
    # The sums of codes, int32 [G, M, N], less what codes are offset by.
    twice = round(2 * (view.format.integer_offset(view.spec) or 0.0))
    multiplier = 1.0
    if twice or view.zero is not None or shift:
        # Named: under jax_enable_x64 sums of integers are int64.
        x_sum = jnp.sum(x.reshape(m, groups, -1), axis=-1, dtype=jnp.int32).T[:, :, None]
        if twice % 2:
            acc, multiplier = 2 * acc - twice * x_sum, 0.5
        elif twice:
            acc = acc - (twice // 2) * x_sum
        if view.zero is not None:
            acc = acc - (view.zero.astype(jnp.int32)[:, None, :] - shift) * x_sum
        elif shift:
            acc = acc + shift * x_sum
    scale = (view.scale * multiplier)[:, None, :]
    return add_offsets(jnp.sum(acc.astype(jnp.float32) * scale, axis=0), x, view)
