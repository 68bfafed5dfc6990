"""The arguments of a product, as its implementations take them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fdq.formats import FORMATS
from fdq.formats.folded import FoldedWeight
from fdq.formats.qtensor import QuantizedWeight, materialize
from fdq.ops.rows import Gated, Normed, Rows, Sums
from fdq.schemes.scheme import ActivationSpec


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """`x @ w + bias`: see `fdq.matmul`; the bias `[N]` is added to the product in `dtype`.

    Rows of integers, truth values and 8-bit floats count as float32; None is the dtype of x.
    """

    x: Rows
    w: Any
    activation: ActivationSpec | None = None
    activation_scale: jax.Array | None = None
    bias: jax.Array | None = None
    dtype: Any = None
    path: str = "<array>"

    def __post_init__(self):
        """Checks shapes and dtypes; takes the arrays out of Variables."""
        scale, x = self.activation_scale, self.x
        if not isinstance(x, Normed | Sums | Gated):
            x = as_rows(x, self.path)
        vars(self).update(
            x=x,
            w=materialize(self.w) if self.quantized else as_weight(self.w, self.path),
            activation_scale=None if scale is None else _as_scale(scale, self.path),
            dtype=as_dtype(self.dtype, x.dtype, self.path),
        )
        self._check(tuple(self.x.shape), tuple(self.w.shape))

    def _check(self, x: tuple[int, ...], w: tuple[int, ...]) -> None:
        if len(w) != 2 or not x or x[-1] != w[0]:
            hint = "; map over leading axes with jax.vmap" if len(w) > 2 else ""
            raise ValueError(
                f"{self.path}: matmul expects x [..., K] and w [K, N], found x {x} and w {w}{hint}."
            )

    @property
    def rows(self) -> int:
        """M, the rows of x."""
        return math.prod(self.x.shape[:-1])

    @property
    def quantized(self) -> bool:
        """Whether the weight is quantized."""
        return isinstance(self.w, QuantizedWeight)


def _as_scale(scale: Any, path: str) -> jax.Array:
    """A calibrated scale, checked as far as its value is known."""
    scale = jnp.asarray(scale)
    if not isinstance(scale, Tracer) and scale.is_fully_addressable:
        found = jax.device_get(scale)
        if not (np.isfinite(found) & (found > 0)).all():
            raise ValueError(f"{path}: activation_scale={found}; expected finite numbers above 0.")
    return scale


def as_dtype(dtype: Any, default: Any, path: str) -> Any:
    """The dtype that a product is returned in, by default that of x as it counts."""
    try:
        found = jnp.dtype(default if dtype is None else dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise TypeError(f"{path}: out_dtype={dtype!r}; expected a dtype of floats.")
    return found


def _is_float(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


def as_weight(w: Any, path: str) -> jax.Array:
    """An array as a weight: floats of 16 bits and more as they are, those of 8 in float32."""
    if not hasattr(w, "dtype") or not _is_float(w):
        found = getattr(w, "dtype", type(w).__name__)
        raise TypeError(f"{path}: expected a QTensor or a float array w, found {found}.")
    if isinstance(w, FoldedWeight):
        raise TypeError(
            f"{path}: {w!r} has its axes in another order; use the QTensor w.q [..., K, N] in it, "
            "or w.dequantize()."
        )
    return w if w.dtype.itemsize > 1 else w.astype(jnp.float32)


def as_rows(x: Any, path: str) -> jax.Array:
    """An array as rows: floats of 16 bits and more as they are, what else is real in float32."""
    if not hasattr(x, "dtype"):
        raise TypeError(
            f"{path}: expected an array x [..., K], found a {type(x).__name__}; "
            "jnp.asarray makes one."
        )
    real = (jnp.integer, jnp.floating, jnp.bool_)
    if not any(jnp.issubdtype(x.dtype, kind) for kind in real):
        raise TypeError(f"{path}: expected x of real numbers, found {x.dtype}.")
    x = jnp.asarray(x) if isinstance(x, np.ndarray) else x  # float64 as this JAX has it
    if _is_float(x) and x.dtype.itemsize > 1:
        return x
    return jnp.asarray(x).astype(jnp.float32)


def takes_integers(w: QuantizedWeight, activation: ActivationSpec | None) -> bool:
    """Whether a product of quantized rows is formed in integers."""
    if activation is None or activation.granularity == "token_group":
        return False
    integers = FORMATS[w.spec.format].integer_offset(w.spec) is not None
    return activation.format == "int8" and integers


def parse_activation(activation: ActivationSpec | str | None) -> ActivationSpec | None:
    """An ActivationSpec from itself, from its name (`"int8"`, `"fp8-x128"`), or None."""
    if activation is not None and not isinstance(activation, ActivationSpec | str):
        raise TypeError(
            f"activation={activation!r}: expected an ActivationSpec, its name, such as 'int8' or "
            "'fp8-x128', or None."
        )
    return ActivationSpec.parse(activation) if isinstance(activation, str) else activation
