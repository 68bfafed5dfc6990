"""QTensor: a quantized weight, as a JAX pytree.

Invariant: ``dequantize(q)[k, n] = (code[k, n] - zero[k // g, n]) * scale[k // g, n]``, times a
global scale where the format has one; ``fdq.formats`` says what each format adds to this.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from fdq.scheme import WeightSpec

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


@dataclasses.dataclass(frozen=True, eq=False)
class QTensor:
    """A quantized weight ``[..., K, N]``, used as ``x @ w``; leading axes are experts or layers.

    Attributes:
      codes: packed or plain codes; packing is along K (axis -2), lower index in lower bits.
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
