"""What stands in a model's clone while it is calibrated, and notes what goes by."""

from __future__ import annotations

import contextvars
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdq.calibration.moments import expert_grams, gram, shrunk, tapped
from fdq.calibration.statistics import RANGE_FIELDS, KeyValueRange
from fdq.nn.parameters import value

REAL: contextvars.ContextVar[jax.Array | None] = contextvars.ContextVar("real", default=None)
"""Of the batch that runs which positions `[B, L]` are no padding; None: all of them."""

# Where nothing was seen: no infinity, which jax_debug_infs would stop at.
_LARGEST = np.finfo(np.float32).max


class Observed(nnx.Variable):
    """A running statistic; float32."""


class Tap(nnx.Variable):
    """Zeros, the derivative by which is a statistic; float32."""


def _real_rows(x: jax.Array, leading: int) -> jax.Array | None:
    """Which of the first `leading` axes of x, as one, are of real positions: bool `[rows]`."""
    real = REAL.get()
    if real is None:
        return None
    rows = math.prod(x.shape[:leading])
    if rows % real.size:
        raise ValueError(
            f"calibrate: a layer is fed {list(x.shape)}, which has no rows for each position of "
            f"{list(real.shape)} tokens, so lengths= cannot leave padding out. Leave out lengths, "
            "or pass batches without padding."
        )
    # Rows of a position follow each other: picks of experts, heads.
    return jnp.repeat(real.reshape(-1), rows // real.size)


@dataclasses.dataclass(frozen=True)
class LayerSizes:
    """Sizes of a linear layer: `lead` axes of scans, and with experts how many."""

    lead: tuple[int, ...]
    k: int
    n: int
    experts: int | None = None
    contracted: int = 1  # the last axes of the input that make K
    made: int = 1  # the last axes of the output that make N

    @property
    def matrices(self) -> tuple[int, ...]:
        """One second moment each."""
        return self.lead if self.experts is None else (*self.lead, self.experts)


class InputObserver(nnx.Module):
    """Largest magnitude and mean square of each input channel, and second moments if asked for.

    Called with the input, of experts also with the picked ones, and what multiplies their outputs;
    `output` with the result.
    """

    def __init__(self, layer: LayerSizes, inputs: bool, outputs: bool):
        def zeros(*shape: int) -> jax.Array:
            return jnp.zeros(shape, jnp.float32)

        lead, each, self.contracted, self.made = (
            layer.lead, layer.matrices, layer.contracted, layer.made,
        )  # fmt: skip
        self.experts = layer.experts
        self.absmax = Observed(zeros(*lead, layer.k))
        self.total = Observed(zeros(*lead, layer.k))
        self.count = Observed(zeros(*lead))
        self.counts = Observed(zeros(*each))
        moment = Observed(zeros(*each, layer.k, layer.k)) if inputs else None
        self.moment: Any = nnx.data(moment)
        self.tap: Any = nnx.data(Tap(zeros(*each, layer.n, layer.n)) if outputs else None)

    def __call__(
        self, x: jax.Array, index: jax.Array | None = None, gates: jax.Array | None = None
    ) -> None:
        """Notes one call's input."""
        rows = x.reshape(-1, int(np.prod(x.shape[x.ndim - self.contracted :])))
        rows = jax.lax.stop_gradient(rows).astype(jnp.float32)
        real, seen = _real_rows(x, x.ndim - self.contracted), jnp.float32(rows.shape[0])
        if real is not None:
            rows = jnp.where(real[:, None], rows, jnp.float32(0))
            seen = real.sum().astype(jnp.float32)
        absmax, total, count = (v.get_value() for v in (self.absmax, self.total, self.count))
        self.absmax.set_value(jnp.maximum(absmax, jnp.abs(rows).max(axis=0)))
        self.total.set_value(total + jnp.square(rows).sum(axis=0))
        self.count.set_value(count + seen)
        if index is None or self.experts is None:
            self.counts.set_value(self.counts.get_value() + seen)
        else:
            if real is not None:
                index = jnp.where(real, index, self.experts)
            self.counts.set_value(self.counts.get_value().at[index].add(1.0, mode="drop"))
            if gates is not None:
                rows = rows * jax.lax.stop_gradient(gates)[:, None].astype(jnp.float32)
        if self.moment is None:
            return
        if index is None or self.experts is None:
            more = gram(rows)
        else:
            more = expert_grams(rows, index, self.experts)
        self.moment.set_value(self.moment.get_value() + more)

    def statistics(self, count: np.ndarray) -> dict[str, np.ndarray]:
        """By name what was seen in `count` rows."""
        counts = np.asarray(value(self.counts))
        found = {
            "absmax": np.asarray(value(self.absmax)),
            "mean_square": np.asarray(value(self.total)) / count[..., None],
            "counts": counts,
        }
        for name, held in (("input_moment", self.moment), ("output_moment", self.tap)):
            if held is not None:
                totals = np.asarray(value(held))
                if self.experts is None:
                    found[name] = totals / counts[..., None, None]
                else:
                    found[name] = shrunk(totals, counts)
        return found

    def output(self, y: jax.Array, index: jax.Array | None = None) -> jax.Array:
        """`y` as it is; its gradient is seen on the way back."""
        if self.tap is None:
            return y
        rows = y.reshape(*y.shape[: y.ndim - self.made], -1)
        return tapped(rows, self.tap.get_value(), index).reshape(y.shape)


class ObservedLayer(nnx.Module):
    """Stands where a layer stood that takes no observer, and shows it the input on the way."""

    def __init__(self, inner: Any, observer: InputObserver):
        self.inner, self.observer = inner, observer

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives."""
        self.observer(x)
        return self.observer.output(self.inner(x, *args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        # What the surrounding module asks of the layer (its kernel, its sizes) it still gets.
        if name.startswith("_") or "inner" not in vars(self):
            raise AttributeError(name)
        return getattr(vars(self)["inner"], name)


class CacheObserver(nnx.Module):
    """The range of keys and values and the mean of keys, per KV head and channel."""

    def __init__(self, keys: tuple[int, int], values: tuple[int, int]):
        for name in ("k_min", "v_min", "k_max", "v_max"):
            start = _LARGEST if name.endswith("min") else -_LARGEST
            shape = keys if name.startswith("k") else values
            setattr(self, name, Observed(jnp.full(shape, start, jnp.float32)))
        self.k_total = Observed(jnp.zeros(keys, jnp.float32))
        self.k_count = Observed(jnp.zeros((), jnp.float32))

    def __call__(self, k: jax.Array, v: jax.Array) -> None:
        """Notes keys and values `[B, T, kv_heads, head_dim]` of one call."""
        real = _real_rows(k, 2)
        for name, x in (("k", k), ("v", v)):
            x = x.astype(jnp.float32).reshape(-1, *x.shape[2:])
            least = most = x
            if real is not None:
                least = jnp.where(real[:, None, None], x, _LARGEST)
                most = jnp.where(real[:, None, None], x, -_LARGEST)
            low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
            low.set_value(jnp.minimum(low.get_value(), least.min(axis=0)))
            high.set_value(jnp.maximum(high.get_value(), most.max(axis=0)))
        keys = k.astype(jnp.float32).reshape(-1, *k.shape[2:])
        seen = jnp.ones((keys.shape[0],), jnp.float32) if real is None else real.astype(jnp.float32)
        total = jnp.sum(keys * seen[:, None, None], axis=0)
        self.k_total.set_value(self.k_total.get_value() + total)
        self.k_count.set_value(self.k_count.get_value() + seen.sum())

    def ranges(self) -> KeyValueRange:
        """What was seen."""
        count = np.maximum(np.asarray(value(self.k_count)), 1)
        ends = {name: np.asarray(value(getattr(self, name))) for name in RANGE_FIELDS}
        return KeyValueRange(**ends, k_mean=np.asarray(value(self.k_total)) / count)
