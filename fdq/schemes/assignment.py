"""Which tensor gets what: leaves of a tree, matched with a recipe, as a table."""

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from fdq.schemes import path_pattern
from fdq.schemes.kinds import WEIGHT_FORMATS
from fdq.schemes.scheme import Scheme, WeightSpec
from fdq.text_table import aligned

WEIGHT_NAMES = ("kernel", "weight", "w")
"""Names of the 2-D leaves that are quantized without a rule of their own."""

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
    `fixed` never; `why` is the reason. `aliases` are other paths to the same tensor.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    kind: Literal["weight", "on_request", "fixed"]
    why: str = ""
    aliases: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Row:
    """What a recipe does with one tensor; `scheme` is None where it is left as it is.

    `reason` says which rule, default or protection decided, or why it cannot be quantized; `rule`
    is the pattern of the rule that decided, and `quantizer` the one that it or the recipe names.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    scheme: Scheme | None
    reason: str
    rule: str | None
    nbytes: int
    nbytes_after: int
    quantizer: str | None = None


@dataclasses.dataclass(frozen=True)
class MatchTable:
    """The rows of all tensors, in the order of the tree; `print` shows them aligned."""

    rows: tuple[Row, ...]

    @property
    def quantized(self) -> tuple[Row, ...]:
        """Rows of the tensors that are quantized."""
        return tuple(row for row in self.rows if row.scheme is not None)

    @property
    def left(self) -> tuple[Row, ...]:
        """Rows of the tensors that are left as they are."""
        return tuple(row for row in self.rows if row.scheme is None)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors before."""
        return sum(row.nbytes for row in self.rows)

    @property
    def nbytes_after(self) -> int:
        """Bytes of all tensors after."""
        return sum(row.nbytes_after for row in self.rows)

    def summary(self) -> str:
        """What was quantized in one line, and each tensor that was left with the reason."""
        before = sum(row.nbytes for row in self.quantized)
        after = sum(row.nbytes_after for row in self.quantized)
        weights = sum(math.prod(row.shape) for row in self.quantized)
        bits = f", {8 * after / weights:.2f} bits per weight" if weights else ""
        head = (
            f"Quantized {len(self.quantized)} of {len(self.rows)} tensors "
            f"({_bytes(before)} -> {_bytes(after)}{bits})."
        )
        if not self.left:
            return head
        left = aligned(_folded(self.left, schemes=False), indent="  ")
        return f"{head} Left as they are:\n{left}"

    def __str__(self) -> str:
        head = ("path", "shape", "dtype", "scheme", "why")
        return aligned([head, *_folded(self.rows)], indent="  ")


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
    return leaves


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


def assign(recipe: Any, leaves: Sequence[Leaf], *, hint: str = DEFAULTS_OF_TREES) -> MatchTable:
    """Matches the leaves of a whole tree with a `Recipe`.

    ValueError where a required rule quantizes nothing (lists the nearest paths), nothing at all
    would be quantized (says by `hint` what is by default), or a shape does not fit its scheme.
    """
    matches = [_match(recipe, leaf) for leaf in leaves]
    rows = [_row(leaf, match) for leaf, match in zip(leaves, matches, strict=True)]
    for rule in recipe.rules:
        used = any(
            match.rule == rule and (rule.scheme is None or row.scheme is not None)
            for row, match in zip(rows, matches, strict=True)
        )
        if rule.required and not used:
            raise ValueError(_unused(rule, leaves, rows, matches))
    table = MatchTable(tuple(rows))
    if recipe.default is not None and not recipe.rules and not table.quantized:
        left = aligned(_folded(table.left, schemes=False), indent="  ") or "  (no tensors)"
        raise ValueError(f"Nothing to quantize to {recipe.default}. {hint} Found only:\n{left}")
    return table


def _match(recipe: Any, leaf: Leaf) -> Any:
    """The match of a tensor with several paths: a rule for any of them, then a protection."""
    found = [recipe.match(path) for path in (leaf.path, *leaf.aliases)]
    by_rule = [match for match in found if match.rule is not None]
    kept = [match for match in found if match.scheme is None]
    return (by_rule or kept or found)[0]


def _row(leaf: Leaf, match: Any) -> Row:
    """What becomes of a tensor; ValueError where its shape does not fit its scheme."""
    scheme, reason = match.scheme, match.reason
    asked = match.rule is not None and any(
        path_pattern.names(match.rule.pattern, path) for path in (leaf.path, *leaf.aliases)
    )
    if leaf.kind == "fixed" or (leaf.kind == "on_request" and not asked):
        # Prefer the reason that the user can do something about.
        protected = leaf.kind == "on_request" and match.rule is None and scheme is None
        by_rule = asked and scheme is None
        scheme, reason = None, reason if by_rule or protected else leaf.why
    size = after = math.prod(leaf.shape) * (jnp.dtype(leaf.dtype).itemsize if leaf.dtype else 0)
    if scheme is not None:
        k, n = leaf.shape[-2:]
        try:
            WEIGHT_FORMATS[scheme.weight.format].check(scheme.weight, k, n, leaf.path)
        except ValueError as error:
            raise ValueError(
                f"{error} To leave this tensor as it is, add the rule ({leaf.path!r}, None)."
            ) from None
        after = _quantized_bytes(scheme.weight, leaf.shape)
    pattern = None if match.rule is None else match.rule.pattern
    quantizer = None if scheme is None else match.quantizer
    if quantizer is not None:
        reason = f"{reason}, by {quantizer}"
    return Row(leaf.path, leaf.shape, leaf.dtype, scheme, reason, pattern, size, after, quantizer)


def _unused(rule: Any, leaves: Sequence[Leaf], rows: list[Row], matches: list[Any]) -> str:
    """Why a rule quantizes nothing."""
    head = f"Rule {rule.pattern!r} -> {rule.scheme} matches nothing"
    reached = [
        (row, match)
        for leaf, row, match in zip(leaves, rows, matches, strict=True)
        if any(path_pattern.reach(rule.pattern, path) for path in (leaf.path, *leaf.aliases))
    ]
    if not reached:
        paths = [path for leaf in leaves for path in (leaf.path, *leaf.aliases)]
        near = ", ".join(nearest(rule.pattern, paths))
        return f"{head}. Nearest paths: {near or '(the tree has no leaves)'}."
    reached.sort(key=lambda pair: (pair[1].rule == rule, -len(pair[0].shape)))
    row, match = reached[0]
    if match.rule is not None and match.rule != rule:
        return (
            f"{head} that an earlier rule has not taken: {row.path} goes to "
            f"{match.rule.pattern!r}. The first match wins, so put the narrower rule first."
        )
    return f"{head} that can be quantized: {row.path} is left ({row.reason})."


def nearest(pattern: str, paths: list[str]) -> list[str]:
    """At most three paths like a pattern; leaves and modules, layer numbers told apart once."""
    known = {}
    for path in paths:
        for candidate in (path, path.rpartition(".")[0]):
            known.setdefault(re.sub(r"\d+", "0", candidate), candidate)
    wanted = re.sub(r"\{[^}]*\}|\d+", "0", pattern).replace("*", "")
    close = difflib.get_close_matches(wanted, [key for key in known if key], n=3, cutoff=0.3)
    return [repr(known[key]) for key in close] or [repr(path) for path in paths[:3]]


@functools.lru_cache(maxsize=4096)
def _quantized_bytes(spec: WeightSpec, shape: tuple[int, ...]) -> int:
    *lead, k, n = shape
    arrays = WEIGHT_FORMATS[spec.format].abstract((k, n), spec)
    return math.prod(lead) * sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays.values())


def _folded(rows: Sequence[Row], *, schemes: bool = True) -> list[tuple[str, ...]]:
    """Cells of the rows; those that differ in one number of the path only become one row."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        number = re.search(r"(?:^|(?<=[._]))\d+(?=\.|$)", row.path)
        template, layer = row.path, ""
        if number:
            template = row.path[: number.start()] + "{}" + row.path[number.end() :]
            layer = number.group()
        dtype = "" if row.dtype is None else str(jnp.dtype(row.dtype))
        scheme = (str(row.scheme or "as it is"),) if schemes else ()
        key = (template, str(list(row.shape)), dtype, *scheme, row.reason)
        groups.setdefault(key, []).append(layer)
    return [
        (template.replace("{}", _ranges(layers)), *cells)
        for (template, *cells), layers in groups.items()
    ]


def _ranges(layers: list[str]) -> str:
    """`["0", "1", "2", "5"]` -> `"{0..2,5}"`."""
    if len(layers) == 1:
        return layers[0]
    runs: list[list[int]] = []
    for number in sorted(int(layer) for layer in layers if layer):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs) + "}"


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
