"""QTensor: a quantized weight, as a JAX pytree.

Invariant: `dequantize(q)[k, n] = (code[k, n] - zero[k // g, n]) * scale[k // g, n]`; each module of
`fdq.formats` says what its formats add to this.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fdq.formats import FORMATS
from fdq.schemes.scheme import WeightSpec


class QTensor:
    """A quantized weight `[..., K, N]`, used as `x @ w`; leading axes are experts or layers.

    It has the arrays of its format, each an attribute and a child of the pytree: `codes` (packed or
    plain; packing is along K, axis -2, the lower index in the lower bits), `scale` (`[..., G, N]`
    with `G` groups along K, 1 per channel; `[..., 1, 1]` per tensor; `[..., ceil(K / bk),
    ceil(N / bn)]` per block), `zero` (of the shape of `scale`) where the spec has zero points, and
    what the format says besides. In a layout of `fdq.prepare` `codes` may be a pytree that holds
    all of them.

    Attributes:
      spec: how to read the arrays.
      padding: unused rows of K in the last packed unit.
      layout: `"canonical"` (what checkpoints hold) or a name given by `fdq.prepare`.
    """

    spec: WeightSpec
    padding: int
    layout: str

    def __init__(
        self, *, spec: WeightSpec, padding: int = 0, layout: str = "canonical", **arrays: Any
    ):
        """Keywords beside the static fields are the arrays, by name and in any order.

        Raises:
          ValueError: these are not the arrays of a weight stored as `spec` says.
        """
        names = FORMATS[spec.format].array_names(spec)
        missing = layout == "canonical" and set(names) - set(arrays)
        if missing or set(arrays) - set(names):
            raise ValueError(
                f"QTensor: {spec} has the arrays {', '.join(names)}, found {', '.join(arrays)}."
            )
        held = {name: arrays[name] for name in names if name in arrays}
        vars(self).update(spec=spec, padding=padding, layout=layout, _arrays=held)

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
        fields = {"spec": self.spec, "padding": self.padding, "layout": self.layout}
        return QTensor(**(fields | self._arrays | changes))

    @property
    def shape(self) -> tuple[int, ...]:
        """``(..., K, N)`` of the weight, derived from the codes (right inside vmap and scan)."""
        return layout_of(self).shape(self)

    @property
    def ndim(self) -> int:
        """Rank of the weight."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the arrays take, packed as they are."""
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, scales included, by weight."""
        return 8 * self.nbytes / self.size

    @property
    def code_dtype(self) -> Any:
        """Dtype of the codes as checkpoints hold them."""
        codes = materialize(self).codes
        return codes.dtype if hasattr(codes, "dtype") else jnp.dtype(codes.layout.code_dtype)

    @property
    def is_abstract(self) -> bool:
        """Whether it holds ``jax.ShapeDtypeStruct`` s instead of arrays."""
        return isinstance(jax.tree.leaves(self.codes)[0], jax.ShapeDtypeStruct)

    def __repr__(self) -> str:
        """One line without the arrays; also of what tree transformations put in their place."""
        parts = [self.spec.format]
        if self.spec.granularity == "group":
            parts.append(f"groups of {self.spec.group_size}")
        elif self.spec.granularity == "block":
            parts.append("blocks of {}x{}".format(*self.spec.block_size or ()))
        else:
            parts.append(f"per {self.spec.granularity}")
        if hasattr(self.codes, "shape"):
            parts.insert(0, "[" + ", ".join(map(str, self.shape)) + "]")
            parts.append(f"{self.bits_per_weight:.4g} bits per weight")
        if self.layout != "canonical":
            parts.append(f"layout {self.layout!r}")
        return f"QTensor({', '.join(parts)})"


@dataclasses.dataclass(frozen=True)
class Layout:
    """A way to lay the arrays of a QTensor out; ``LAYOUTS`` holds them by name.

    Attributes:
      shape: QTensor in this layout -> ``(..., K, N)``; must work on abstract arrays.
      to_canonical: QTensor in this layout -> the same weight in the layout of checkpoints.
      from_canonical: its inverse.
    """

    shape: Callable[[QTensor], tuple[int, ...]]
    to_canonical: Callable[[QTensor], QTensor]
    from_canonical: Callable[[QTensor], QTensor]


def _canonical_shape(q: QTensor) -> tuple[int, ...]:
    return FORMATS[q.spec.format].shape_from_codes(tuple(q.codes.shape), q.padding)


LAYOUTS: dict[str, Layout] = {
    "canonical": Layout(
        shape=_canonical_shape, to_canonical=lambda q: q, from_canonical=lambda q: q
    )
}
"""Layouts by name. ``fdq.ops`` adds those that its kernels want."""


def layout_of(q: QTensor) -> Layout:
    """The layout of ``q``; ValueError if nobody registered it."""
    if q.layout not in LAYOUTS:
        raise ValueError(
            f"Unknown QTensor layout {q.layout!r}; known are {', '.join(LAYOUTS)}. "
            "Layouts of fdq.prepare are registered by `import fdq`."
        )
    return LAYOUTS[q.layout]


def materialize(q: QTensor) -> QTensor:
    """A QTensor whose fields are ``nnx.Variable`` s -> the same with the arrays they hold."""
    changes = {
        name: value.get_value()
        for name, value in q.arrays().items()
        if isinstance(value, nnx.Variable)
    }
    return q.replace(**changes) if changes else q


def canonical(q: QTensor) -> QTensor:
    """``q`` in the layout of checkpoints, with plain arrays."""
    return layout_of(q).to_canonical(materialize(q))


def dequantize(q: QTensor, dtype: Any = jnp.float32) -> Any:
    """The weight that ``q`` stands for.

    Args:
      q: arrays, tracers, ``nnx.Variable`` s or ``jax.ShapeDtypeStruct`` s, in any layout and with
        any leading axes.
      dtype: of the result; values are formed in float32 and then cast.

    Returns:
      ``[..., K, N]``; a ``ShapeDtypeStruct`` if ``q`` holds those.
    """
    q = materialize(q)
    if q.is_abstract:
        return jax.eval_shape(lambda q: dequantize(q, dtype), q)
    q = layout_of(q).to_canonical(q)
    return FORMATS[q.spec.format].decode(q.arrays(), q.spec, padding=q.padding, dtype=dtype)


def _flatten_with_keys(q: QTensor):
    arrays, static = _flatten(q)
    keys = (jax.tree_util.GetAttrKey(name) for name in static[0])
    return tuple(zip(keys, arrays, strict=True)), static


def _flatten(q: QTensor):
    held = q._arrays
    return tuple(held.values()), (tuple(held), q.spec, q.padding, q.layout)


def _unflatten(static, children) -> QTensor:
    # Skips __init__: tree transformations fill the leaves with None, objects and abstract values.
    names, spec, padding, layout = static
    q = object.__new__(QTensor)
    held = dict(zip(names, children, strict=True))
    vars(q).update(spec=spec, padding=padding, layout=layout, _arrays=held)
    return q


jax.tree_util.register_pytree_with_keys(QTensor, _flatten_with_keys, _unflatten, _flatten)
nnx.register_data_type(QTensor)
