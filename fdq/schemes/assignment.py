"""Which tensor gets what: leaves of a tree, matched with a recipe, as a table."""

import dataclasses
import difflib
import functools
import logging
import math
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from fdq.schemes import path_pattern
from fdq.schemes.fold import PLAIN, Fold
from fdq.schemes.kinds import WEIGHT_FORMATS
from fdq.schemes.leaves import DEFAULTS_OF_TREES as DEFAULTS_OF_TREES
from fdq.schemes.leaves import Leaf as Leaf
from fdq.schemes.leaves import is_float as is_float
from fdq.schemes.leaves import is_leaf as is_leaf
from fdq.schemes.leaves import is_quantized as is_quantized
from fdq.schemes.leaves import leaf_at as leaf_at
from fdq.schemes.leaves import leaves_of as leaves_of
from fdq.schemes.leaves import path_string as path_string
from fdq.schemes.scheme import Scheme, WeightSpec
from fdq.text_table import aligned, folded, size

_LOGGER = logging.getLogger("fdq")


@dataclasses.dataclass(frozen=True)
class Row:
    """What a recipe does with one tensor; `scheme` is None where it is left as it is.

    `reason` says which rule, default or protection decided, or why it cannot be quantized; `rule`
    is the pattern of the rule that decided, and `quantizer` the one that it or the recipe names.
    The shape is that of the matrix that `fold`, if there is one, makes of the tensor.
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
    fold: Fold | None = None


@dataclasses.dataclass(frozen=True)
class MatchTable:
    """The rows of all tensors, in the order of the tree; `print` shows them aligned.

    `note` says what of the recipe has no place in the tree; `idle` are the rules of a mixture, such
    as mix_quant's for routed experts, that found nothing.
    """

    rows: tuple[Row, ...]
    note: str = ""
    idle: tuple[Any, ...] = ()

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

    @property
    def remarks(self) -> tuple[str, ...]:
        """A line for each idle rule: what it was for, and what is done without it."""
        done = ", ".join(sorted({str(row.scheme) for row in self.quantized}))
        return tuple(
            f"No tensor here is for the rule {rule.pattern!r} ({rule.scheme}): all that is "
            f"quantized is {done}."
            for rule in self.idle
        )

    def report(self, *, verbose: bool) -> None:
        """Prints the summary, or warns of idle rules and of what has no place in the tree."""
        if verbose:
            print(self.summary())
            return
        for line in filter(None, (*self.remarks, self.note)):
            _LOGGER.warning("%s", line)

    def summary(self) -> str:
        """What was quantized in one line, and each tensor that was left with the reason."""
        before = sum(row.nbytes for row in self.quantized)
        after = sum(row.nbytes_after for row in self.quantized)
        weights = sum(math.prod(row.shape) for row in self.quantized)
        bits = f", {8 * after / weights:.2f} bits per weight" if weights else ""
        head = (
            f"Quantized {len(self.quantized)} of {len(self.rows)} tensors "
            f"({size(before)} -> {size(after)}{bits})."
        )
        head = f"{head} {self.note}" if self.note else head
        head = "\n".join([*self.remarks, head])
        if not self.left:
            return head
        left = aligned(_folded(self.left, schemes=False), indent="  ")
        return f"{head} Left as they are:\n{left}"

    def __str__(self) -> str:
        head = ("path", "shape", "dtype", "scheme", "why")
        table = aligned([head, *_folded(self.rows)], indent="  ")
        return f"{table}\n{self.note}" if self.note else table


def assign(
    recipe: Any, leaves: Sequence[Leaf], *, hint: str = DEFAULTS_OF_TREES, note: str = ""
) -> MatchTable:
    """Matches the leaves of a whole tree with a `Recipe`.

    ValueError where a required rule quantizes nothing (lists the nearest paths), nothing at all
    would be quantized (says by `hint` what is by default), or a shape does not fit its scheme.
    """
    matches = [_match(recipe, leaf) for leaf in leaves]
    rows = [_row(leaf, match) for leaf, match in zip(leaves, matches, strict=True)]
    _refuse_quantized(leaves, matches, rows)
    idle = []
    for rule in recipe.rules:
        used = any(
            match.rule == rule and (rule.scheme is None or row.scheme is not None)
            for row, match in zip(rows, matches, strict=True)
        )
        if rule.required and not used:
            raise ValueError(_unused(rule, leaves, rows, matches))
        if not used:
            idle.append(rule)
    table = MatchTable(tuple(rows), note, tuple(idle))
    if recipe.default is not None and not recipe.rules and not table.quantized:
        left = aligned(_folded(table.left, schemes=False), indent="  ") or "  (no tensors)"
        raise ValueError(f"Nothing to quantize to {recipe.default}. {hint} Found only:\n{left}")
    return table


def _refuse_quantized(leaves: Sequence[Leaf], matches: list[Any], rows: list[Row]) -> None:
    """Raises ValueError where all that a recipe is for is quantized already."""
    before = [
        leaf
        for leaf, match in zip(leaves, matches, strict=True)
        if leaf.why.startswith("is quantized") and match.scheme is not None
    ]
    if before and all(row.scheme is None for row in rows):
        more = f" and {len(before) - 1} others" if len(before) > 1 else ""
        raise ValueError(
            f"This is quantized already: {before[0].path} {before[0].why}{more}. Quantize the "
            "floats that it was made from: codes of codes would have both errors."
        )


def _match(recipe: Any, leaf: Leaf) -> Any:
    """The match of a tensor with several paths: a rule for any of them, then a protection."""
    found = [recipe.match(path) for path in (leaf.path, *leaf.aliases)]
    by_rule = [match for match in found if match.rule is not None]
    kept = [match for match in found if match.scheme is None]
    return (by_rule or kept or found)[0]


def _row(leaf: Leaf, match: Any) -> Row:
    """What becomes of a tensor; ValueError where its shape does not fit its scheme."""
    scheme, reason = match.scheme, match.reason
    paths = (leaf.path, *leaf.aliases)
    asked = match.rule is not None and (
        match.rule.contract is not None
        or any(path_pattern.names(match.rule.pattern, path) for path in paths)
    )
    if leaf.kind == "fixed" or (leaf.kind == "on_request" and not asked):
        # Prefer the reason that the user can do something about.
        protected = leaf.kind == "on_request" and match.rule is None and scheme is None
        by_rule = asked and scheme is None
        scheme, reason = None, reason if by_rule or protected else leaf.why
    shape, fold = leaf.shape, None
    before = after = math.prod(leaf.shape) * (jnp.dtype(leaf.dtype).itemsize if leaf.dtype else 0)
    if scheme is not None:
        fold = _fold(leaf, match.rule if asked else None)
        shape = shape if fold is None else fold.shape(shape)
        k, n = shape[-2:]
        try:
            WEIGHT_FORMATS[scheme.weight.format].check(scheme.weight, k, n, leaf.path)
        except ValueError as error:
            raise ValueError(
                f"{error} To leave this tensor as it is, add the rule ({leaf.path!r}, None)."
            ) from None
        after = _quantized_bytes(scheme.weight, shape)
    pattern = None if match.rule is None else match.rule.pattern
    quantizer = None if scheme is None else match.quantizer
    if quantizer is not None:
        reason = f"{reason}, by {quantizer}"
    fields = (scheme, reason, pattern, before, after, quantizer, fold)
    return Row(leaf.path, shape, leaf.dtype, *fields)


def _fold(leaf: Leaf, rule: Any) -> Fold | None:
    """How a leaf becomes `[..., K, N]`, None where it is; ValueError where nobody says."""
    if rule is not None and rule.contract is not None:
        try:
            fold = Fold.of(len(leaf.shape), rule.contract, rule.stacked)
        except ValueError as error:
            raise ValueError(f"Rule {rule.pattern!r}, {leaf.path} {leaf.shape}: {error}") from None
        return None if fold == PLAIN else fold
    if leaf.unknown:
        raise ValueError(
            f"{leaf.path} {list(leaf.shape)}: {leaf.unknown}. Say in its rule which axes a product "
            f"contracts: ({leaf.path!r}, scheme, dict(contract=1)) for [out, in], contract=0 for "
            "[in, out] and [D, H, d], contract=(0, 1) for [H, d, D]; with stacked=1 after an axis "
            "of layers or experts."
        )
    return leaf.fold


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
    """Cells of the rows, equal layers in one."""
    cells = []
    for row in rows:
        dtype = "" if row.dtype is None else str(jnp.dtype(row.dtype))
        scheme = (str(row.scheme or "as it is"),) if schemes else ()
        cells.append((row.path, str(list(row.shape)), dtype, *scheme, row.reason))
    return [one for _, one in folded(cells)]
