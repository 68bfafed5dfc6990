"""`fdq.recommend`: which layer gets how many bits, so that a model of a given size loses least.

What a layer costs is measured: KL(original || model) with this layer alone quantized, to the
candidate of the fewest bits. With the others it costs in proportion to the squared error of its
weights, as divergences of small changes do. Costs of layers add up, near enough to compare, and the
best choice for a size is then a knapsack problem, solved as one.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdq.analysis import chart
from fdq.analysis.planner import weight_table
from fdq.decoding.state import divergences
from fdq.formats.qtensor import QuantizedWeight, dequantize
from fdq.nn.embedding import check_vocabulary
from fdq.nn.parameters import bind, split
from fdq.quantizers.quantization import match_table, quantize
from fdq.schemes.recipe import Recipe
from fdq.text_table import aligned

CANDIDATES = ("W2A16", "W3A16", "W4A16", "W8A16")
BUCKETS = 4096
"""Into how many steps the room for codes is cut, to fill it as well as can be."""
_NUMBER = r"(?<=\.)\d+(?=\.|$)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """Tensors that get one scheme, those that `pattern` matches; one entry a candidate.

    `bytes` with scales, `kl` in nats per token with all other tensors as they were.
    """

    pattern: str
    weights: int
    bytes: tuple[int, ...]
    kl: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What quantizing each part of a model costs; `rest` is bytes of what stays as it is."""

    candidates: tuple[str, ...]
    units: tuple[Unit, ...]
    rest: int

    def chosen(self, *, bits: float | None = None, nbytes: int | None = None) -> tuple[int, ...]:
        """The candidate of each unit, by number, of the least sum of KL.

        Args:
          bits: by quantized weight, scales included, on average.
          nbytes: of all weights, in place of `bits`.

        Raises:
          ValueError: neither or both, or fewer than the smallest candidates take.
        """
        if (bits is None) == (nbytes is None):
            raise ValueError("recommend: give bits=, or nbytes= of all weights, not both.")
        if bits is not None and not math.isfinite(bits):
            raise ValueError(f"recommend: expected bits per weight, found {bits}.")
        weights = sum(unit.weights for unit in self.units)
        room = nbytes - self.rest if nbytes is not None else math.floor(bits * weights / 8)  # pyright: ignore[reportOptionalOperand]
        least = sum(min(unit.bytes) for unit in self.units)
        if room < least:
            wanted = f"{bits:g} bits per weight" if bits is not None else f"{nbytes:,} bytes"
            raise ValueError(
                f"recommend: {wanted} are too few: with {', '.join(self.candidates)} the quantized "
                f"weights take at least {8 * least / weights:.3f} bits, the model "
                f"{least + self.rest:,} bytes. Name smaller candidates."
            )
        uniform = [(c,) * len(self.units) for c in range(len(self.candidates))]
        fitting = [choice for choice in uniform if self._bytes(choice) <= room]
        # The knapsack counts in buckets, so that at its very size one scheme for all may be better.
        return min([_knapsack(self.units, room), *fitting], key=self.kl_of)

    def recipe(self, *, bits: float | None = None, nbytes: int | None = None) -> Recipe:
        """The recipe of `chosen`: most weights by default, the others by a rule each."""
        return self.recipe_of(self.chosen(bits=bits, nbytes=nbytes))

    def recipe_of(self, chosen: Sequence[int]) -> Recipe:
        """The recipe in which each unit has the candidate of that number."""
        sizes = [0] * len(self.candidates)
        for unit, at in zip(self.units, chosen, strict=True):
            sizes[at] += unit.weights
        usual = int(np.argmax(sizes))
        rules = [
            (unit.pattern, self.candidates[at])
            for unit, at in zip(self.units, chosen, strict=True)
            if at != usual
        ]
        return Recipe([*rules, ("*", self.candidates[usual])])

    def bits_of(self, chosen: Sequence[int]) -> float:
        """Bits by quantized weight, scales included."""
        return 8 * self._bytes(chosen) / sum(unit.weights for unit in self.units)

    def _bytes(self, chosen: Sequence[int]) -> int:
        return sum(u.bytes[at] for u, at in zip(self.units, chosen, strict=True))

    def kl_of(self, chosen: Sequence[int]) -> float:
        """The sum of what the units cost, nats per token: an estimate of the whole."""
        return float(sum(u.kl[at] for u, at in zip(self.units, chosen, strict=True)))

    def rows(self, chosen: Sequence[int]) -> list[tuple[str, ...]]:
        """(tensors, weights, scheme, bits/weight, KL) as text, for tables."""
        return [
            (
                unit.pattern,
                f"{unit.weights:,}",
                self.candidates[at],
                f"{8 * unit.bytes[at] / unit.weights:.3f}",
                f"{unit.kl[at]:.6f}",
            )
            for unit, at in zip(self.units, chosen, strict=True)
        ]

    def table(self, chosen: Sequence[int]) -> str:
        """`rows` with a heading and the totals."""
        heading = ("tensors", "weights", "scheme", "bits/weight", "KL alone")
        total = ("all", "", "", f"{self.bits_of(chosen):.3f}", f"{self.kl_of(chosen):.6f}")
        return aligned([heading, *self.rows(chosen), total], right={1, 3, 4})

    def plot(self, path: str | os.PathLike[str], chosen: Sequence[int]) -> None:
        """Writes a picture, SVG: what each unit costs at the fewest bits, and what it gets."""
        rows = [
            (unit.pattern, max(unit.kl) * 1000, self.candidates[at])
            for unit, at in zip(self.units, chosen, strict=True)
        ]
        label = f"KL with this alone in {self.candidates[0]}, thousandths of a nat per token"
        pathlib.Path(path).write_text(chart.bars(rows, x=label, kinds=self.candidates), "utf-8")


def recommend(
    model: nnx.Module,
    tokens: Any,
    *,
    bits: float | None = None,
    nbytes: int | None = None,
    candidates: Sequence[str] = CANDIDATES,
    by: Literal["layer", "kind"] = "layer",
    method: str | None = None,
    calibration: Any = None,
    exact: bool = False,
    plot: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Recipe:
    """A recipe of a given size that loses little: more bits for layers that quantizing hurts.

    Args:
      model: a float model of `fdq.models`, or an NNX module from tokens `[B, L]` to logits.
      tokens: `[N, L]` rows of calibration text; 8 rows of 256 are enough to rank layers. Not those
        that anything is evaluated on.
      bits: by quantized weight on average, scales included; 3.0 where neither size is given.
      nbytes: of all weights in their place, those that stay floats included: a device's memory less
        what caches and activations take (`fdq.plan` says).
      candidates: schemes to choose from, of weights with the same activations.
      by: `"layer"` gives each tensor a scheme, `"kind"` each kind of tensor the same in all layers.
      method: the quantizer, as in `fdq.quantize`.
      calibration: as in `fdq.quantize`.
      exact: measures each candidate of each unit, instead of the smallest alone.
      plot: a file for a picture of costs and choices, SVG.
      progress: called with (passes done, passes in all, what is measured).

    Raises:
      ValueError: a size that no choice meets, no rows, tokens outside of the vocabulary, fewer than
        two candidates, nothing to quantize.
      TypeError: no NNX module.

    Examples:
      >>> recipe = fdq.recommend(model, tokens, bits=3.0, plot="bits.svg")  # doctest: +SKIP
      >>> model = fdq.quantize(model, recipe)  # doctest: +SKIP
    """
    found = measure(
        model,
        tokens,
        candidates=candidates,
        by=by,
        method=method,
        calibration=calibration,
        exact=exact,
        progress=progress,
    )
    chosen = found.chosen(bits=3.0 if bits is None and nbytes is None else bits, nbytes=nbytes)
    if plot is not None:
        found.plot(plot, chosen)
    return found.recipe_of(chosen)


def measure(
    model: nnx.Module,
    tokens: Any,
    *,
    candidates: Sequence[str] = CANDIDATES,
    by: Literal["layer", "kind"] = "layer",
    method: str | None = None,
    calibration: Any = None,
    exact: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Sensitivity:
    """What `recommend` goes by, for several sizes; arguments and errors are those."""
    if not isinstance(model, nnx.Module):
        raise TypeError(f"recommend: expected an NNX module, found a {type(model).__name__}.")
    batch = _batch(tokens, model)
    if len(set(candidates)) < 2 or by not in ("layer", "kind"):
        raise ValueError(
            f"recommend: expected two candidates or more and by='layer' or 'kind', found "
            f"{list(candidates)} and {by!r}."
        )
    template, params = split(model)
    made: dict[str, dict[str, QuantizedWeight]] = {}
    for name in candidates:
        quantized = quantize(model, name, method=method, calibration=calibration)
        made[name] = {p: w for p, w in _flat(split(quantized)[1]).items() if _is_weight(w)}
    paths = sorted(set.intersection(*(set(one) for one in made.values())))
    uneven = sorted(set.union(*(set(one) for one in made.values())) - set(paths))
    if uneven or not paths:
        raise ValueError(
            f"recommend: {uneven[0] if uneven else 'no tensor'} can be quantized to some of "
            f"{', '.join(candidates)} only. Name other candidates."
        )
    # The fewest bits first.
    totals = {name: sum(w.nbytes for w in one.values()) for name, one in made.items()}
    names = tuple(sorted(dict.fromkeys(candidates), key=totals.__getitem__))
    order = [row.path for row in match_table(model, names[0]).quantized]
    # No asterisk, which spans dots.
    every = f"{{0..{max([0, *(int(n) for path in paths for n in re.findall(_NUMBER, path))])}}}"
    groups: dict[str, list[str]] = {}
    for path in sorted(paths, key=lambda p: order.index(p) if p in order else len(order)):
        pattern = path.removesuffix(".kernel")
        if any(other.startswith(f"{pattern}.") for other in paths if other != path):
            pattern = path  # a pattern covers what is below
        pattern = re.sub(_NUMBER, every, pattern) if by == "kind" else pattern
        groups.setdefault(pattern, []).append(path)

    @jax.jit
    def logits(params: Any, batch: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(bind(template, params)(batch).astype(jnp.float32))

    @jax.jit
    def divergence(params: Any, batch: jax.Array, log_p: jax.Array) -> jax.Array:
        log_q = jax.nn.log_softmax(bind(template, params)(batch).astype(jnp.float32))
        return jnp.mean(divergences(log_p, log_q))

    original, leaves = logits(params, batch), _flat(params)
    passes, done, units = len(groups) * (len(names) if exact else 1), 0, []
    for pattern, members in groups.items():
        kl: list[float] = []
        errors = [_error(leaves, made[name], members) for name in names]
        for name, error in zip(names, errors, strict=True):
            if not exact and kl:
                kl.append(kl[0] * error / errors[0] if errors[0] else 0.0)
                continue
            changed = {p: dequantize(made[name][p], leaves[p].dtype) for p in members}
            # Never below 0, which sums of rounded numbers can be; in this order NaN stays NaN.
            kl.append(max(float(divergence(_with(params, changed), batch, original)), 0.0))
            done += 1
            if progress is not None:
                progress(done, passes, pattern)
        if not np.isfinite(kl).all():
            raise ValueError(f"recommend: KL with {pattern} quantized is {kl}; check the model.")
        sizes = tuple(sum(made[name][p].nbytes for p in members) for name in names)
        count = sum(leaves[p].size for p in members)
        units.append(Unit(pattern=pattern, weights=count, bytes=sizes, kl=tuple(kl)))
    quantized = sum(leaves[p].size * leaves[p].dtype.itemsize for p in paths)
    rest = weight_table(model).bytes - quantized
    return Sensitivity(candidates=names, units=tuple(units), rest=rest)


def _knapsack(units: Sequence[Unit], room: int) -> tuple[int, ...]:
    """The candidate of each unit, of the least sum of KL, in at most `room` bytes."""
    least = [min(unit.bytes) for unit in units]
    free = room - sum(least)
    bucket = max(1, -(-free // BUCKETS))
    count = free // bucket + 1
    best = np.zeros(count)
    picks = np.zeros((len(units), count), np.int32)
    for i, unit in enumerate(units):
        options = np.full((len(unit.kl), count), np.inf)
        for c, (size, kl) in enumerate(zip(unit.bytes, unit.kl, strict=True)):
            steps = -(-(size - least[i]) // bucket)
            if steps < count:
                options[c, steps:] = best[: count - steps] + kl
        picks[i] = options.argmin(axis=0)
        best = options.min(axis=0)
    at, chosen = count - 1, [0] * len(units)
    for i in reversed(range(len(units))):
        chosen[i] = int(picks[i, at])
        at -= -(-(units[i].bytes[chosen[i]] - least[i]) // bucket)
    left = room - sum(unit.bytes[c] for unit, c in zip(units, chosen, strict=True))
    # What rounding up to buckets left over.
    while True:
        gains = [
            (unit.kl[chosen[i]] - kl, i, c, size - unit.bytes[chosen[i]])
            for i, unit in enumerate(units)
            for c, (size, kl) in enumerate(zip(unit.bytes, unit.kl, strict=True))
            if size - unit.bytes[chosen[i]] <= left and kl < unit.kl[chosen[i]]
        ]
        if not gains:
            return tuple(chosen)
        _, i, c, more = max(gains)
        chosen[i], left = c, left - more


def _error(leaves: Any, made: Any, paths: Sequence[str]) -> float:
    """Squared error of the weights of a unit."""
    return sum(float(_squared(leaves[path], made[path])) for path in paths)


@jax.jit
def _squared(w: jax.Array, q: QuantizedWeight) -> jax.Array:
    return jnp.sum(jnp.square(w.astype(jnp.float32) - dequantize(q)))


def _batch(tokens: Any, model: Any) -> jax.Array:
    rows = np.asarray(tokens)
    if rows.ndim != 2 or not np.issubdtype(rows.dtype, np.integer) or not rows.size:
        raise ValueError(
            f"recommend: expected tokens [N, L] of integers, found {rows.dtype} {list(rows.shape)}."
        )
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocabulary is not None:
        check_vocabulary("recommend: tokens", rows, vocabulary)
    return jnp.asarray(rows.astype(np.int32))


def _is_weight(x: Any) -> bool:
    return isinstance(x, QuantizedWeight)


def _flat(params: Any) -> dict[str, Any]:
    found = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_weight)[0]
    return {".".join(str(entry.key) for entry in keys): leaf for keys, leaf in found}


def _with(params: Any, changed: dict[str, Any]) -> Any:
    """The tree with other leaves at some paths."""

    def pick(keys: Any, leaf: Any) -> Any:
        return changed.get(".".join(str(entry.key) for entry in keys), leaf)

    return jax.tree_util.tree_map_with_path(pick, params)
