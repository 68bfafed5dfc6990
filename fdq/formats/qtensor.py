"""QTensor: a quantized weight, as a JAX pytree.

Invariant: `dequantize(q)[k, n] = (code[k, n] - zero[k // g, n]) * scale[k // g, n]`, to which an
`offset[k // g, n]` is added where there is one; each module of `fdq.formats` says what its formats
add to this. With a `row_order` the left side is its row `row_order[k]`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from fdq.formats import FORMATS, row_order
from fdq.schemes.scheme import WeightSpec


class QuantizedWeight:
    """What stands for a weight `[..., K, N]`, used as `x @ w`; leading axes are experts or layers.

    A `QTensor` is one, and so is what `fdq.prepare` makes of it for a device. `padding` counts
    unused rows of K in the last packed unit; the layout `"canonical"` is that of checkpoints.

    It acts like the array where that is cheap: `x @ q` is `fdq.matmul`, `q[i]` picks from leading
    axes, `len` and iteration go over them; `astype` decodes it.
    """

    spec: WeightSpec
    padding: int
    layout: str = "canonical"

    __array_ufunc__ = None  # NumPy leaves `x @ q` to `__rmatmul__`
    # Set by the op: formats know none.
    _matmul: ClassVar[Any]

    def arrays(self) -> dict[str, Any]:
        """The arrays (or pytrees of them) by name, in pytree order."""
        raise NotImplementedError

    def replace(self, **changes: Any) -> Any:
        """A copy with other arrays or static fields."""
        raise NotImplementedError

    def canonical(self) -> QTensor:
        """The same weight as checkpoints hold it, with plain arrays."""
        raise NotImplementedError

    def without_order(self) -> tuple[Any, Any]:
        """The weight with its rows as the codes have them; their order or None (`row_order`)."""
        return self, None

    @property
    def shape(self) -> tuple[int, ...]:
        """`(..., K, N)` of the weight, derived from the arrays (right inside vmap and scan)."""
        raise NotImplementedError

    @property
    def code_dtype(self) -> Any:
        """Dtype of the codes as checkpoints hold them."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """Rank of the weight."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> Any:
        """float32, in which values are formed; codes have the `code_dtype`."""
        return jnp.dtype(jnp.float32)

    def astype(self, dtype: Any) -> Any:
        """The decoded weight, as `dequantize` gives it."""
        return dequantize(self, dtype)

    def get_value(self) -> QuantizedWeight:
        """Itself: modules ask the Variable that it takes the place of for its value."""
        return self

    @property
    def value(self) -> QuantizedWeight:
        """Itself, as `get_value`."""
        return self

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        """Refused: NumPy would make an array of one object."""
        raise TypeError(
            f"{self!r} is no array of numbers: decode it, np.asarray(fdq.dequantize(q))."
        )

    def __rmatmul__(self, x: Any) -> Any:
        """`x [..., K] @ q`, an `fdq.matmul`; leading axes of q are those of x, or all take x.

        Raises:
          ValueError: the shapes do not match.
        """
        if not hasattr(x, "shape"):
            x = jnp.asarray(x)
        lead = self.shape[:-2]
        own = tuple(x.shape[:-2])
        if own and lead and own != lead:
            raise ValueError(
                f"x @ q: expected x [K], [M, K] or [{', '.join(map(str, lead))}, M, K] for "
                f"{self!r}, found {list(x.shape)}."
            )
        product = self._matmul
        for _ in lead:
            product = jax.vmap(product, in_axes=(0 if own else None, 0))
        return product(x, self)

    def __matmul__(self, other: Any) -> Any:
        """Refused: a quantized weight is the right operand."""
        raise TypeError(
            f"{self!r} @ {type(other).__name__}: a quantized weight [K, N] is the right operand, "
            "x @ q. To multiply from the left, decode it: fdq.dequantize(q) @ x."
        )

    @property
    def T(self) -> Any:
        """Refused: codes are packed along K."""
        raise TypeError(
            f"{self!r} has no transpose: its codes are packed along K. Use "
            'fdq.einsum("...n,kn->...k", x, q) for x @ q.T, or fdq.dequantize(q).T.'
        )

    mT = T

    def __getitem__(self, index: Any) -> Any:
        """The weights at an index of the leading axes: experts or layers.

        Raises:
          IndexError: out of range, or an index of the rows and columns of a matrix.
        """
        lead = self.shape[:-2]
        indices = index if isinstance(index, tuple) else (index,)
        if indices and indices[-1] is Ellipsis:
            indices = indices[:-1]
        if len(indices) > len(lead) or any(i is None or i is Ellipsis for i in indices):
            raise IndexError(
                f"{self!r} is indexed along its {len(lead)} leading axes only, found "
                f"[{', '.join(map(str, indices))}]. Rows of K are decoded by fdq.take(q, ids), "
                "everything by fdq.dequantize(q)."
            )
        for i, size in zip(indices, lead, strict=False):
            _check_index(self, i, size)
        q = materialize(self)
        return jax.tree.map(lambda a: a[indices], q) if indices else q

    def __len__(self) -> int:
        """Of the first leading axis.

        Raises:
          TypeError: one matrix.
        """
        if self.ndim < 3:
            raise TypeError(f"{self!r} is one matrix: it has no length, and rows are packed.")
        return self.shape[0]

    def __bool__(self) -> bool:
        """True, as objects are; `len` does not count."""
        return True

    def __iter__(self) -> Iterator[Any]:
        """Over the first leading axis."""
        return (self[i] for i in range(len(self)))

    @property
    def nbytes(self) -> int:
        """Bytes that the arrays take, packed as they are."""
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, scales included, by weight; of no weights 0."""
        return 8 * self.nbytes / self.size if self.size else 0.0

    @property
    def is_abstract(self) -> bool:
        """Whether it holds `jax.ShapeDtypeStruct`s instead of arrays."""
        return isinstance(jax.tree.leaves(self)[0], jax.ShapeDtypeStruct)

    def __repr__(self) -> str:
        """One line without the arrays; also of what tree transformations put in their place."""
        parts = [self.spec.format]
        if self.spec.granularity == "group":
            parts.append(f"groups of {self.spec.group_size}")
        elif self.spec.granularity == "block":
            parts.append("blocks of {}x{}".format(*self.spec.block_size or ()))
        else:
            parts.append(f"per {self.spec.granularity}")
        if all(hasattr(array, "shape") for array in self.arrays().values()):
            parts.insert(0, "[" + ", ".join(map(str, self.shape)) + "]")
            parts.append(f"{self.bits_per_weight:.4g} bits per weight")
        if self.spec.row_order:
            parts.append("rows in another order")
        if self.layout != "canonical":
            parts.append(f"layout {self.layout!r}")
        return f"{type(self).__name__}({', '.join(parts)})"


def _check_index(q: QuantizedWeight, index: Any, size: int) -> None:
    """An index of a leading axis: a slice, or integers within it, as far as they are known.

    Raises:
      IndexError: it is something else, or out of range.
    """
    if isinstance(index, slice | Tracer):
        return
    found = np.asarray(jax.device_get(index))
    if found.dtype == bool and found.shape == (size,):
        return  # a mask
    if not np.issubdtype(found.dtype, np.integer):
        raise IndexError(f"{q!r}: expected an index of integers or a slice, found {index!r:.80}.")
    if found.size and (found.min() < -size or found.max() >= size):
        raise IndexError(f"{q!r}: index {index!s:.80} is out of range for an axis of {size}.")


class QTensor(QuantizedWeight):
    """A quantized weight as checkpoints hold it.

    It has the arrays of its format, each an attribute and a child of the pytree: `codes` (packed or
    plain; packing is along K, axis -2, the lower index in the lower bits), `scale` (`[..., G, N]`
    with `G` groups along K, 1 per channel; `[..., 1, 1]` per tensor; `[..., ceil(K / bk),
    ceil(N / bn)]` per block), `zero` (of the shape of `scale`) or `offset` (of its shape and dtype)
    where the spec has zero points, and what the format says besides.
    """

    def __init__(self, *, spec: WeightSpec, padding: int = 0, **arrays: Any):
        """Keywords beside the static fields are the arrays, by name and in any order.

        Raises:
          ValueError: these are not the arrays of a weight stored as `spec` says.
        """
        names = FORMATS[spec.format].array_names(spec)
        if set(names) != set(arrays):
            raise ValueError(
                f"QTensor: {spec} has the arrays {', '.join(names)}, found {', '.join(arrays)}."
            )
        held = {name: arrays[name] for name in names if name in arrays}
        vars(self).update(spec=spec, padding=padding, _arrays=held)

    def __getattr__(self, name: str) -> Any:
        """An array by its name; only asked where there is no other attribute."""
        held = vars(self).get("_arrays", {})
        if name in held:
            return held[name]
        raise AttributeError(f"QTensor has no attribute {name!r}; its arrays are {', '.join(held)}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses: a QTensor is immutable."""
        raise AttributeError(f"A QTensor is immutable; use q.replace({name}=...).")

    def arrays(self) -> dict[str, Any]:
        """The arrays by name, in pytree order."""
        return dict(self._arrays)

    def replace(self, **changes: Any) -> QTensor:
        """A copy with other arrays or static fields."""
        fields = {"spec": self.spec, "padding": self.padding}
        return QTensor(**(fields | self._arrays | changes))

    @property
    def shape(self) -> tuple[int, ...]:
        """`(..., K, N)`, derived from the codes."""
        return FORMATS[self.spec.format].shape_from_codes(tuple(self.codes.shape), self.padding)

    @property
    def code_dtype(self) -> Any:
        """Dtype of the codes as checkpoints hold them."""
        return materialize(self).codes.dtype

    def canonical(self) -> QTensor:
        """With plain arrays."""
        return materialize(self)

    def without_order(self) -> tuple[QTensor, Any]:
        """The weight of the codes' rows, and their order."""
        if not self.spec.row_order:
            return self, None
        arrays = self.arrays()
        order = arrays.pop(row_order.NAME)
        spec = dataclasses.replace(self.spec, row_order=False)
        return QTensor(spec=spec, padding=self.padding, **arrays), order


class QCodes(nnx.Variable):
    """The codes of a `QTensor` that a module holds."""


class QScale(nnx.Variable):
    """A scale, zero point or other small array of a `QTensor` that a module holds."""


def boxed[W: QuantizedWeight](q: W) -> W:
    """`q` with each array in a Variable of its own, as modules hold it."""
    bare = {n: a for n, a in q.arrays().items() if not isinstance(a, nnx.Variable)}
    kinds = {name: QCodes if name in ("codes", "data") else QScale for name in bare}
    return q.replace(**{name: kinds[name](array) for name, array in bare.items()})


def materialize[W: QuantizedWeight](q: W) -> W:
    """A weight whose fields are `nnx.Variable`s -> the same with the arrays they hold."""
    changes = {n: a.get_value() for n, a in q.arrays().items() if isinstance(a, nnx.Variable)}
    return q.replace(**changes) if changes else q


def dequantize(q: QuantizedWeight, dtype: Any = jnp.float32) -> Any:
    """The weight that `q` stands for.

    Args:
      q: arrays, tracers, `nnx.Variable`s or `jax.ShapeDtypeStruct`s, in any layout and with
        any leading axes.
      dtype: of the result; values are formed in float32 and then cast.

    Returns:
      `[..., K, N]`; a `ShapeDtypeStruct` if `q` holds those.

    Raises:
      TypeError: no quantized weight, a dtype that is no float, or a derivative by codes or scales
        that are 8-bit floats is asked for.
    """
    if not isinstance(q, QuantizedWeight):
        hint = ": q.dequantize()" if hasattr(q, "dequantize") else ""
        raise TypeError(f"dequantize: expected a QTensor, found a {type(q).__name__}{hint}.")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dequantize: expected a dtype of floats, found {jnp.dtype(dtype)}.")
    q = materialize(q)
    if q.is_abstract:
        return jax.eval_shape(lambda q: dequantize(q, dtype), q)
    q, order = differentiable(q.canonical()).without_order()
    w = FORMATS[q.spec.format].decode(q.arrays(), q.spec, padding=q.padding, dtype=dtype)
    return w if order is None else row_order.of_weight(w, order)


def differentiable(q: QTensor) -> QTensor:
    """The same, but differentiating by arrays of it that are 8-bit floats raises."""
    return q.replace(**{name: _without_derivative(a, name) for name, a in q.arrays().items()})


def _without_derivative(array: Any, name: str) -> Any:
    """An array of 8-bit floats such that differentiating by it raises; others as they are.

    Their cotangents would be 8-bit floats too: mostly NaN, or rounded to nothing.
    """
    is_float8 = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize == 1
    return _constant(array, name) if is_float8 and isinstance(array, Tracer) else array


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _constant(array: jax.Array, name: str) -> jax.Array:
    return array


@functools.partial(_constant.defjvp, symbolic_zeros=True)
def _constant_tangent(name, primals, tangents):
    if not isinstance(tangents[0], jax.custom_derivatives.SymbolicZero):
        raise TypeError(
            f"The {name} of this QTensor, {primals[0].dtype}, has no usable derivative: it would "
            "be of the same dtype. Differentiate by arrays of wider floats only, as in "
            "lambda scale: fdq.matmul(x, q.replace(scale=scale)), or by the decoded weight."
        )
    return primals[0], tangents[0]


def _flatten_with_keys(q: QTensor):
    arrays, static = _flatten(q)
    keys = (jax.tree_util.GetAttrKey(name) for name in static[0])
    return tuple(zip(keys, arrays, strict=True)), static


def _flatten(q: QTensor):
    held = q._arrays
    return tuple(held.values()), (tuple(held), q.spec, q.padding)


def _unflatten(static, children) -> QTensor:
    # Skips __init__: tree transformations fill the leaves with None, objects and abstract values.
    names, spec, padding = static
    q = object.__new__(QTensor)
    vars(q).update(spec=spec, padding=padding, _arrays=dict(zip(names, children, strict=True)))
    return q


jax.tree_util.register_pytree_with_keys(QTensor, _flatten_with_keys, _unflatten, _flatten)
nnx.register_data_type(QTensor)
