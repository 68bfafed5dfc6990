"""The tensors of a tree, before any recipe looked at them: names, shapes, and which axes are K."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from fdq.schemes import path_pattern
from fdq.schemes.fold import Fold
from fdq.schemes.scheme import WeightSpec

WEIGHT_NAMES = ("kernel", "w")
"""Names of the 2-D leaves `[in, out]` that are quantized without a rule of their own."""

UNORIENTED = "weight"
"""The name of leaves that are `[out, in]` in torch and Equinox, and often `[in, out]` elsewhere."""

_ATTENTION = {"query": (0,), "key": (0,), "value": (0,), "out": (0, 1)}
"""Modules of Linen's attention, and the axes that their kernels contract."""

DEFAULTS_OF_TREES = (
    f"By default that is every 2-D float leaf named {', '.join(WEIGHT_NAMES)}; rules can name "
    "others."
)

# Routed experts of fdq's own models, [E, K, N]: the one 3-D weight that fdq knows by its path.
_EXPERT_KERNEL = re.compile(r"(?:.*\.)?mlp\.experts\.(?:gate_up_proj|down_proj)\.kernel")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One tensor of a tree, before any recipe looked at it; shape `()` for what is no array.

    Of `kind`, `weight` is quantized by default, `on_request` only by a rule that names it and
    `fixed` never; `why` is the reason. `aliases` are other paths to the same tensor. `fold` makes
    a matrix `[..., K, N]` of it where it is known to be none; `unknown` says why that is not known
    and a rule has to say `contract=`.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    kind: Literal["weight", "on_request", "fixed"]
    why: str = ""
    aliases: tuple[str, ...] = ()
    fold: Fold | None = None
    unknown: str = ""


def is_leaf(x: Any) -> bool:
    """Stops at quantized weights and Variables, which are pytrees themselves."""
    return isinstance(x, nnx.Variable) or is_quantized(x)


def is_quantized(x: Any) -> bool:
    """Whether something is a quantized weight, in whatever layout."""
    return isinstance(getattr(x, "spec", None), WeightSpec)


def is_float(dtype: Any) -> bool:
    """Whether arrays of this dtype can be quantized: floats of 16 bits or more."""
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.dtype(dtype).itemsize >= 2


def path_string(entries: Sequence[Any]) -> str:
    """Keys of a pytree path joined by dots, without Linen's outer `params`."""
    parts = [str(key) for key in path_pattern.path_keys(entries)]
    return ".".join(parts[1:] if len(parts) > 1 and parts[0] == "params" else parts)


def leaves_of(tree: Any) -> list[Leaf]:
    """Leaves of any pytree, in the order of `jax.tree_util.tree_flatten_with_path`."""
    if isinstance(tree, nnx.Pytree):
        raise TypeError(
            "This is an NNX module: use fdq.match_table(module, recipe), which knows its layers, "
            "or pass nnx.state(module)."
        )
    flat, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: is_leaf(x) or isinstance(x, nnx.Pytree)
    )
    leaves = []
    for entries, value in flat:
        path = path_string(entries)
        if isinstance(value, nnx.Pytree):
            raise TypeError(
                f"{path}: an NNX module ({type(value).__name__}) inside a {type(tree).__name__}. "
                "Quantize the module itself, or hold modules in nnx.Dict or nnx.List."
            )
        if not entries and not hasattr(value, "shape"):
            raise TypeError(
                f"Expected an array, a pytree of arrays (of a Linen module: its params), or an NNX "
                f"module; found {value!r:.80}. Checkpoints are read by fdq.load(path, scheme)."
            )
        leaves.append(leaf_at(path, value))
    shapes = {leaf.path: leaf.shape for leaf in leaves}
    return [_with_axes(leaf, shapes) for leaf in leaves]


def _with_axes(leaf: Leaf, shapes: Mapping[str, tuple[int, ...]]) -> Leaf:
    """A leaf of a tree with what its name and its neighbours say of its axes."""
    *_, name = leaf.path.split(".")
    if leaf.kind != "on_request":
        return leaf
    if name == UNORIENTED:
        why = f"named {name}: may be [in, out], or [out, in] as in torch and Equinox"
        return dataclasses.replace(leaf, why=f"{why}; needs a rule with contract=", unknown=why)
    if len(leaf.shape) < 3 or name != "kernel":
        return leaf
    axes = _linen_axes(leaf, shapes)
    if axes is not None:
        fold = Fold.of(len(leaf.shape), *axes)
        k, n = fold.shape(leaf.shape)[-2:]
        why = f"{len(leaf.shape)}-D: needs a rule that names it, read as [{k}, {n}]"
        return dataclasses.replace(leaf, fold=fold, why=why)
    *lead, k, n = leaf.shape
    if math.prod(lead) <= k:
        return leaf
    why = f"{math.prod(lead)} matrices [{k}, {n}]?"
    return dataclasses.replace(
        leaf, unknown=why, why=f"{len(leaf.shape)}-D: needs a rule that names it, with contract="
    )


def _linen_axes(leaf: Leaf, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """Contracted axes and the number of stacked ones that a kernel's bias or module tells."""
    module, _, _ = leaf.path.rpartition(".")
    parent, _, called = module.rpartition(".")
    known = [f"{parent}.{one}.kernel" if parent else f"{one}.kernel" for one in _ATTENTION]
    if called in _ATTENTION and sum(path in shapes for path in known) >= 3:
        stacked = len(leaf.shape) - 3
        return tuple(axis + stacked for axis in _ATTENTION[called]), stacked
    bias = shapes.get(f"{module}.bias")
    stack = (*leaf.shape[:-2], leaf.shape[-1])
    if bias is None or len(leaf.shape) != 3 or bias == stack:  # [L, K, N] and [L, N]
        return None
    features = len(bias)
    fits = 0 < features < 3 and leaf.shape[3 - features :] == bias
    # A bias [N] is also that of a convolution, whose kernel is read as a stack all the same.
    return ((0,), 0) if fits and features == 2 else None


def leaf_at(path: str, value: Any) -> Leaf:
    """What a leaf is, from its name, shape and dtype."""
    if isinstance(value, nnx.Variable):
        value = value.get_value()
    if is_quantized(value):
        return Leaf(path, value.shape, value.code_dtype, "fixed", f"is quantized ({value.spec})")
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return Leaf(path, (), None, "fixed", f"{type(value).__name__}, not an array")
    shape, dtype, ndim = tuple(value.shape), value.dtype, len(value.shape)
    name = path.rsplit(".", 1)[-1]
    kind, why = "fixed", ""
    if not is_float(dtype):
        why = f"dtype {dtype}"
    elif ndim < 2:
        why = "vector" if ndim else "scalar"
    elif name == "bias":  # that of attention heads is [heads, head_dim]
        why = "bias"
    elif ndim > 2 and not (ndim == 3 and _EXPERT_KERNEL.fullmatch(path)):
        kind, why = "on_request", f"{ndim}-D: needs a rule that names it, read as [..., K, N]"
    elif ndim == 2 and name not in WEIGHT_NAMES:
        kind = "on_request"
        why = f"not named {', '.join(WEIGHT_NAMES)}: needs a rule that names it"
    else:
        kind = "weight"
    return Leaf(path, shape, dtype, kind, why)
