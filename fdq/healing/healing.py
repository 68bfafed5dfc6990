"""`fdq.heal`: minutes of tuning that make a quantized model say again what its original says.

The loss is KL(original || model) of the next token, on calibration text: no labels, no other data
(distillation). Codes stay; scales, norms, routers and biases move, about a hundredth of the
numbers. With `codes="free"` codes are chosen anew at each step (quantization-aware training,
straight-through estimator, arXiv 1308.3432), which takes the memory of three float32 models.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import time
from collections.abc import Callable, Collection
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdq.decoding.state import divergences
from fdq.formats.qtensor import QuantizedWeight, boxed
from fdq.healing import knobs, state_file
from fdq.healing.knobs import Knobs
from fdq.models.decoder import Decoder
from fdq.nn.embedding import check_vocabulary
from fdq.nn.parameters import bind, split
from fdq.ops.preparation import unprepare

HELD_OUT = 16
"""One row in so many is held out, where none are given."""

MOST_HELD_OUT = 64
WARM_UP = 0.05  # of all steps
RATE = 4e-3
Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """Of the held-out rows after `step` steps: mean KL in nats per token."""

    step: int
    kl: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Healed:
    """What `heal` made.

    Attributes:
      model: a new model, in the layout of checkpoints.
      held_out: KL to the original on rows that were not trained on, first and last step included.
      losses: KL of each step's batch, before the step.
      numbers: how many were tuned.
      seconds: that this took, without what an earlier run did.
    """

    model: Any
    held_out: tuple[Point, ...]
    losses: tuple[float, ...]
    numbers: int
    seconds: float

    @property
    def before(self) -> float:
        """KL on held-out rows before the first step."""
        return self.held_out[0].kl

    @property
    def after(self) -> float:
        """The least one, that of `model`."""
        return min(point.kl for point in self.held_out)

    def to_dict(self) -> dict[str, Any]:
        """All but the model, for JSON."""
        points = [dataclasses.asdict(point) for point in self.held_out]
        whole = {"before": self.before, "after": self.after, "held_out": points}
        return whole | {
            "losses": list(self.losses),
            "numbers": self.numbers,
            "seconds": self.seconds,
        }

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Writes a picture of the curve, SVG."""
        from fdq.analysis import chart

        steps = list(range(len(self.losses)))
        svg = chart.lines(
            {
                "batches": list(zip(steps, self.losses, strict=True)),
                "held out": [(point.step, point.kl) for point in self.held_out],
            },
            x="step",
            y="KL to the original, nats per token",
        )
        pathlib.Path(path).write_text(svg, "utf-8")


def heal(
    model: nnx.Module,
    teacher: nnx.Module,
    tokens: Any,
    *,
    held_out: Any = None,
    steps: int = 150,
    batch_size: int = 8,
    learning_rate: float = RATE,
    tuned: Collection[str] = knobs.DEFAULT,
    codes: Literal["fixed", "free"] = "fixed",
    every: int = 25,
    seed: int = 0,
    state: str | os.PathLike[str] | None = None,
    save_seconds: float = 60.0,
    progress: Progress | None = None,
) -> Healed:
    """Tunes what is beside a quantized model's codes until it says again what its original says.

    Works for every format. Needs `optax` (`pip install 'fdq-jax[train]'`). Activations that the
    scheme quantizes are quantized here too; derivatives go straight through. Models run in float32.

    Args:
      model: a model of `fdq.models`, or an NNX module from tokens `[B, L]` to logits `[B, L, V]`,
        quantized; it is not changed.
      teacher: the original.
      tokens: `[N, L]` rows of calibration text, not those that anything is evaluated on.
      held_out: `[M, L]` rows that are not trained on and tell which step was best; by default one
        row in 16 of `tokens`, the last ones.
      steps: of Adam, with a learning rate that falls to 0 as a cosine does.
      batch_size: rows a step.
      learning_rate: the most that a step moves a number, as a share of its size; free codes by
        five times as much of the step between levels.
      tuned: of `"scales"`, `"norms"`, `"routers"`, `"biases"`, `"embeddings"` and `"head"`; the
        last two only if they are floats.
      codes: `"fixed"`, or `"free"` to choose codes anew too: slower, for 3 bits and fewer better.
        Not for trellis codes and WINT2, whose codes are not chosen one by one.
      every: steps between looks at the held-out rows.
      seed: of the order of rows.
      state: a file to keep what was reached in. Where it is there, this goes on from it, to the
        same result; `Healed` has the whole curve. It is left there.
      save_seconds: between two writes of it.
      progress: called with (steps done, steps, KL of the last batches in words).

    Raises:
      ModuleNotFoundError: no optax.
      ValueError: too few rows, tokens outside of the vocabulary, models of different vocabularies,
        nothing to tune, codes that cannot be free, a loss that is NaN, a state of another run.

    Examples:
      >>> healed = fdq.heal(q, original, tokens, state="healing.npz")  # doctest: +SKIP
      >>> fdq.save(healed.model, "ernie-w2-healed")  # doctest: +SKIP
    """
    optax = optimizers()
    start = time.perf_counter()
    rows, kept = _rows(tokens, held_out, batch_size, model)
    if steps < 1 or every < 1:
        raise ValueError(f"heal: expected positive steps and every, found {steps} and {every}.")
    if not 0 < learning_rate < np.inf:
        raise ValueError(f"heal: expected a positive learning_rate, found {learning_rate}.")
    if codes not in ("fixed", "free"):
        raise ValueError(f"heal: codes={codes!r}; expected 'fixed' or 'free'.")
    for one in (model, teacher):
        if getattr(one, "placement", None) is not None:
            raise ValueError("heal: a model is on a mesh; fdq.unshard it first.")
    taken = Knobs.of(unprepare(model), tuned, free=codes == "free")
    warm = max(1, round(WARM_UP * steps))
    schedule = optax.warmup_cosine_decay_schedule(
        learning_rate / 10, learning_rate, warm, max(warm + 1, steps)
    )
    rule = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))
    settings = {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "tuned": sorted(tuned),
        "codes": codes,
        "every": every,
        "seed": seed,
    }
    teacher = unprepare(teacher)
    if state is not None:
        settings |= {"rows": _digest((rows, kept)), "model": _digest(taken.leaves)}
        settings["teacher"] = _digest(split(teacher)[1])
    step, measured = _programs(taken, teacher, rule)
    offsets = taken.zeros()
    reached = _Reached(offsets, rule.init(offsets), offsets, [], [])
    if state is not None and pathlib.Path(state).exists():
        reached = _Reached.read(state, settings, reached)

    def check(what: str, at: int, kl: float) -> None:
        if not np.isfinite(kl):
            raise ValueError(
                f"heal: the {what} of step {at} is {kl}. Lower learning_rate "
                f"(={learning_rate:g}), or check the models: fdq.evaluate(model, text, "
                "reference=teacher)."
            )

    def looked(reached: _Reached) -> _Reached:
        at = len(reached.losses)
        if (at % every and at != steps) or any(p.step == at for p in reached.held_out):
            return reached
        point = Point(step=at, kl=_mean(measured, reached.offsets, kept, batch_size))
        check("KL on held-out rows", at, point.kl)
        is_best = all(point.kl < earlier.kl for earlier in reached.held_out)
        best = reached.offsets if is_best else reached.best
        return dataclasses.replace(reached, best=best, held_out=[*reached.held_out, point])

    saved = time.perf_counter()
    try:
        reached = looked(reached)
        for at in range(len(reached.losses), steps):
            batch = jnp.asarray(rows[_picked(len(rows), batch_size, at, seed)])
            loss, offsets, optimizer = step(reached.offsets, reached.optimizer, batch)
            loss = float(loss)
            check("loss", at, loss)
            # All at once: an interrupt finds the one step or the other.
            reached = looked(
                dataclasses.replace(
                    reached, offsets=offsets, optimizer=optimizer, losses=[*reached.losses, loss]
                )
            )
            if progress is not None:
                progress(at + 1, steps, f"KL {np.mean(reached.losses[-10:]):.4f}")
            if state is not None and time.perf_counter() - saved > save_seconds:
                reached.write(state, settings)
                saved = time.perf_counter()
    finally:
        if state is not None and reached.losses:
            reached.write(state, settings)
    return Healed(
        model=_finished(taken, reached.best),
        held_out=tuple(reached.held_out),
        losses=tuple(reached.losses),
        numbers=knobs.size(reached.best),
        seconds=time.perf_counter() - start,
    )


@dataclasses.dataclass
class _Reached:
    """Where a run is: offsets now and at best, the optimizer's state, and the curve."""

    offsets: dict[str, jax.Array]
    optimizer: Any
    best: dict[str, jax.Array]
    losses: list[float]
    held_out: list[Point]

    def write(self, path: str | os.PathLike[str], settings: dict[str, Any]) -> None:
        """All of it, to a file; nothing where steps led to no numbers."""
        if not all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves(self.offsets)):
            return
        arrays = jax.tree.leaves((self.offsets, self.optimizer, self.best))
        points = [dataclasses.asdict(point) for point in self.held_out]
        header = {"settings": settings, "losses": self.losses, "held_out": points}
        state_file.write(path, header, arrays)

    @classmethod
    def read(
        cls, path: str | os.PathLike[str], settings: dict[str, Any], like: _Reached
    ) -> _Reached:
        """What `write` wrote; ValueError where that was another run."""
        wanted, structure = jax.tree.flatten((like.offsets, like.optimizer, like.best))
        header, arrays = state_file.read(path, wanted, settings)
        offsets, optimizer, best = jax.tree.unflatten(structure, list(map(jnp.asarray, arrays)))
        try:
            points = [Point(step=int(p["step"]), kl=float(p["kl"])) for p in header["held_out"]]
            losses = [float(loss) for loss in header["losses"]]
        except (KeyError, TypeError, ValueError) as error:
            raise state_file.damaged(path, error) from error
        return cls(offsets, optimizer, best, losses, points)


def _programs(taken: Knobs, teacher: nnx.Module, rule: Any) -> tuple[Any, Any]:
    """`step(offsets, optimizer, batch)` and `measured(offsets, batch, mask)`, compiled."""
    original, weights = split(teacher)
    arrays = taken.arrays()

    def divergence(offsets, arrays, weights, batch) -> jax.Array:
        ours = _logits(taken.model(offsets, arrays), batch)
        theirs = jax.lax.stop_gradient(_logits(bind(original, weights), batch))
        if ours.shape != theirs.shape:
            raise ValueError(
                f"heal: the model's logits are {list(ours.shape)} and the teacher's "
                f"{list(theirs.shape)}; a teacher is the model that this one was made from."
            )
        log_p, log_q = (jax.nn.log_softmax(a.astype(jnp.float32)) for a in (theirs, ours))
        return jnp.mean(divergences(log_p, log_q), axis=-1)

    @jax.jit
    def step(offsets, optimizer, arrays, weights, batch):
        def loss(offsets):
            return jnp.mean(divergence(offsets, arrays, weights, batch))

        found, gradient = jax.value_and_grad(loss)(offsets)
        with jax.numpy_dtype_promotion("standard"):  # which optax relies on
            changes, optimizer = rule.update(gradient, optimizer, offsets)
        return found, jax.tree.map(jnp.add, offsets, changes), optimizer

    @jax.jit
    def measured(offsets, arrays, weights, batch):
        return divergence(offsets, arrays, weights, batch)

    return (
        lambda offsets, optimizer, batch: step(offsets, optimizer, arrays, weights, batch),
        lambda offsets, batch: measured(offsets, arrays, weights, batch),
    )


def _logits(module: Any, batch: jax.Array) -> jax.Array:
    """In float32, which small steps need."""
    if isinstance(module, Decoder):
        module.config = module.config.replace(dtype="float32")
    return module(batch)


def _mean(measured: Any, offsets: Any, rows: np.ndarray, batch_size: int) -> float:
    """KL over all rows; the last batch is filled up."""
    found: list[float] = []
    for first in range(0, len(rows), batch_size):
        part = rows[first : first + batch_size]
        filled = np.resize(part, (batch_size, part.shape[1]))
        found += np.asarray(measured(offsets, jnp.asarray(filled)))[: len(part)].tolist()
    return float(np.mean(found))


def _picked(count: int, size: int, step: int, seed: int) -> np.ndarray:
    """Rows of a step: each pass over the text has an order of its own."""
    at = np.arange(step * size, (step + 1) * size)
    orders = {e: np.random.default_rng([seed, int(e)]).permutation(count) for e in set(at // count)}
    return np.asarray([orders[e][i] for e, i in zip(at // count, at % count, strict=True)])


def _rows(tokens: Any, held_out: Any, batch_size: int, model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows to look at."""
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    found = []
    for name, given in (("tokens", tokens), ("held_out", held_out)):
        if given is None:
            continue
        rows = np.asarray(given)
        if rows.ndim != 2 or not np.issubdtype(rows.dtype, np.integer) or rows.shape[1] < 2:
            raise ValueError(
                f"heal: expected {name} [N, L] of integers, found {rows.dtype} {list(rows.shape)}."
            )
        if vocabulary is not None:
            check_vocabulary(f"heal: {name}", rows, vocabulary)
        found.append(rows.astype(np.int32))
    if len(found) == 1:
        count = min(MOST_HELD_OUT, max(1, len(found[0]) // HELD_OUT))
        found = [found[0][:-count], found[0][-count:]]
    if batch_size < 1 or len(found[0]) < batch_size or not len(found[1]):
        raise ValueError(
            f"heal: {len(found[0])} rows to train on and {len(found[1])} held out are too few for "
            f"batch_size={batch_size}. Give more text; 100,000 tokens are a good start."
        )
    return found[0], found[1]


def _finished(taken: Knobs, offsets: Any) -> Any:
    """The new model with its arrays in Variables, as modules hold them."""
    new = taken.model(offsets, taken.arrays(), train=False)
    for _, module in nnx.iter_modules(new):
        for name, attribute in list(vars(module).items()):
            if isinstance(attribute, QuantizedWeight):
                setattr(module, name, boxed(attribute))
    return new


def _digest(tree: Any) -> str:
    """Of all arrays of a tree."""
    found = hashlib.sha256()
    for array in jax.tree.leaves(tree):
        is_key = isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
        held = np.asarray(jax.random.key_data(array) if is_key else array)
        found.update(f"{held.dtype} {held.shape} ".encode())
        found.update(held.tobytes())
    return found.hexdigest()


def optimizers() -> Any:
    """The module optax; ModuleNotFoundError that says how to get it."""
    try:
        import optax
    except ImportError as error:
        said = "fdq.heal needs optax: pip install 'fdq-jax[train]'"
        raise ModuleNotFoundError(said, name="optax") from error
    return optax
