"""QTensor: a quantized weight, as a JAX pytree.

Invariant: ``dequantize(q)[k, n] = (code[k, n] - zero[k // g, n]) * scale[k // g, n]``, times a
global scale where the format has one; ``fdq.formats`` says what each format adds to this.
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

# The order is the order of the pytree's children: appending is safe, reordering is not.
ARRAY_FIELDS = (
    "codes",
    "scale",
    "zero",
    "global_scale",
    "code_scale",
    "code_offset",
    "super_scale",
    "scale_offset",
)
STATIC_FIELDS = ("spec", "padding", "layout")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QTensor:
    """A quantized weight ``[..., K, N]``, used as ``x @ w``; leading axes are experts or layers.

    Attributes:
      codes: packed or plain codes; packing is along K (axis -2), lower index in lower bits. In a
        layout of ``fdq.prepare`` it may be a pytree that holds the scales as well.
      scale: ``[..., G, N]``; ``G`` groups along K (1 per channel), ``[..., 1, 1]`` per tensor,
        ``[..., ceil(K / bk), ceil(N / bn)]`` per block.
      zero: zero points, same shape as ``scale``, uint8; formats with ``zero_point="integer"``.
      global_scale: ``[..., 1, 1]`` float32 that multiplies (``nvfp4``).
      code_scale, code_offset, super_scale: ``[..., 1, N]`` float32 (``cc2``); ``super_scale`` is
        also the second scale of a double-quantized ``nf4``, ``scale_offset`` its mean.
      spec: how to read the arrays.
      padding: unused rows of K in the last packed unit.
      layout: ``"canonical"`` (what checkpoints hold) or a name given by ``fdq.prepare``.
    """

    codes: Any
    scale: Any = None
    zero: Any = None
    global_scale: Any = None
    code_scale: Any = None
    code_offset: Any = None
    super_scale: Any = None
    scale_offset: Any = None
    spec: WeightSpec = dataclasses.field(kw_only=True)
    padding: int = dataclasses.field(default=0, kw_only=True)
    layout: str = dataclasses.field(default="canonical", kw_only=True)

    def arrays(self) -> dict[str, Any]:
        """The arrays that this format has, by field name, in pytree order."""
        pairs = ((name, getattr(self, name)) for name in ARRAY_FIELDS)
        return {name: value for name, value in pairs if value is not None}

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
    return dataclasses.replace(q, **changes) if changes else q


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
    children = tuple((jax.tree_util.GetAttrKey(n), getattr(q, n)) for n in ARRAY_FIELDS)
    return children, tuple(getattr(q, n) for n in STATIC_FIELDS)


def _flatten(q: QTensor):
    return tuple(getattr(q, n) for n in ARRAY_FIELDS), tuple(getattr(q, n) for n in STATIC_FIELDS)


def _unflatten(static, children) -> QTensor:
    # Skips __init__: tree transformations fill the leaves with None, objects and abstract values.
    q = object.__new__(QTensor)
    for name, value in zip(ARRAY_FIELDS, children, strict=True):
        object.__setattr__(q, name, value)
    for name, value in zip(STATIC_FIELDS, static, strict=True):
        object.__setattr__(q, name, value)
    return q


jax.tree_util.register_pytree_with_keys(QTensor, _flatten_with_keys, _unflatten, _flatten)
nnx.register_data_type(QTensor)
