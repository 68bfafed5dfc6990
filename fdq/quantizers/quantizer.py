"""What a quantizer is: it chooses the codes and scales of a weight, given how they are stored."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from fdq.formats import FORMATS as FORMATS
from fdq.formats import Arrays, Format
from fdq.quantizers.no_derivative import without_derivative
from fdq.schemes.kinds import QUANTIZERS as QUANTIZERS
from fdq.schemes.scheme import WeightSpec

Statistics = Mapping[str, Any]
"""By name a statistic, float32: `"mean_square"` and `"absmax"` of each input channel, `[..., K]`,
`"input_moment"` `[..., K, K]` and `"output_moment"` `[..., N, N]`; those of users `[..., K]`."""

MOMENT_AXES = {"input_moment": (-2, -2), "output_moment": (-1, -1)}
"""Statistics that are second moments, by the axes of a weight `[..., K, N]` that theirs are."""


def statistic_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of one matrix of a weight of `shape`: `[K]`, `[K, K]` or `[N, N]`."""
    return tuple(shape[axis] for axis in MOMENT_AXES.get(name, (-2,)))


class Distortion(NamedTuple):
    """E|w - w'|^2 of a weight of variance 1, good to about 1%.

    `kind` is `"integral"` (numeric) or `"simulated"` (a seeded sample).
    """

    value: float
    kind: str


class Quantizer(abc.ABC):
    """One way to choose codes and scales; a member of `QUANTIZERS`, which users may add to.

    Attributes:
      name: what `method=` and the rules of a recipe call it.
      statistics: those that it uses where they are known.
      required: those of them without which it cannot work.
      one_at_a_time: a stack is taken one matrix after the other, to save memory.
      columns_apart: what it makes of a column does not depend on the others, where the format
        keeps them apart too.
    """

    name: str
    statistics: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    one_at_a_time: bool = False
    columns_apart: bool = False

    @abc.abstractmethod
    def unsupported(self, spec: WeightSpec, dtype: Any = jnp.float32) -> str | None:
        """Why a weight of `dtype` cannot be quantized to `spec`, as in "is for nvfp4"; or None."""

    @abc.abstractmethod
    def matrix(self, w: jax.Array, spec: WeightSpec, statistics: Statistics) -> Arrays:
        """Quantizes one matrix; traced.

        Args:
          w: `[K, N]` in the dtype of the checkpoint.
          spec: how it is stored.
          statistics: by name, `[K]` each, or what `statistic_shape` says.

        Returns:
          The arrays of the format, by field name of `QTensor`.
        """

    def slabs(self, shape: tuple[int, ...], spec: WeightSpec) -> int:
        """How many slabs of columns a matrix is taken in, one after the other, to save memory."""
        del shape, spec
        return 1

    def expected_distortion(self, spec: WeightSpec, k: int) -> Distortion:
        """What to expect of a weight `[k, N]` of independent N(0, 1) numbers, N large."""
        raise NotImplementedError(f"Quantizer {self.name} does not know its distortion.")

    def __call__(self, w: Any, spec: WeightSpec, statistics: Statistics, path: str) -> Arrays:
        """Quantizes a stack `[..., K, N]`, also an abstract one; `path` is for errors."""
        del path
        if isinstance(w, jax.ShapeDtypeStruct) and w.sharding is None:
            known = tuple((name, tuple(x.shape)) for name, x in sorted(statistics.items()))
            made = _abstract(self, spec, tuple(w.shape), jnp.dtype(w.dtype), known)
            # Arrays of its own: what two weights have counts once.
            return {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in made.items()}
        run = functools.partial(_run, quantizer=self, spec=spec)
        if isinstance(w, jax.ShapeDtypeStruct):
            return jax.eval_shape(run, w, dict(statistics))
        if any(isinstance(leaf, Tracer) for leaf in (w, *statistics.values())):
            return _traced(self, spec)(w, dict(statistics))
        return run(w, dict(statistics), sequential=len(w.sharding.device_set) == 1)


def default_of(spec: WeightSpec, dtype: Any = jnp.float32) -> Quantizer:
    """The quantizer of a spec for which none was chosen: a search for 4 bits and fewer."""
    preferred = ("search", "absmax") if FORMATS[spec.format].bits <= 4 else ("absmax", "search")
    for name in (*preferred, *QUANTIZERS):
        quantizer = QUANTIZERS[name]
        if quantizer.unsupported(spec, dtype) is None and not quantizer.required:
            return quantizer
    raise ValueError(f"No quantizer can choose the codes of {spec}. Register one that can.")


def pick(
    spec: WeightSpec, name: str | None, path: str = "<array>", dtype: Any = jnp.float32
) -> Quantizer:
    """The quantizer called `name`, or the spec's default; ValueError names those that there are."""
    if name is None:
        return default_of(spec, dtype)
    reason = QUANTIZERS[name].unsupported(spec, dtype) if name in QUANTIZERS else ""
    if reason is None:
        return QUANTIZERS[name]
    able = [q.name for q in QUANTIZERS.values() if q.unsupported(spec, dtype) is None]
    why = f", which {reason}" if reason else ""
    raise ValueError(
        f"{path}: format {spec.format} has no method {name!r}{why}; use one of "
        f"{', '.join(map(repr, able))}."
    )


@functools.lru_cache(maxsize=256)
def expected_distortion(
    spec: WeightSpec, method: str | None = None, *, k: int = 4096
) -> Distortion:
    """The squared error to expect, without quantizing a tensor.

    Args:
      spec: how the weight is stored.
      method: a quantizer's name; None is the spec's default.
      k: rows of the weight, `[k, N]` independent N(0, 1) numbers with N large.
    """
    return pick(spec, method).expected_distortion(spec, k)


def format_of(spec: WeightSpec) -> Format:
    """The format that a spec names."""
    return FORMATS[spec.format]


@functools.lru_cache(maxsize=1024)
def _abstract(
    quantizer: Quantizer,
    spec: WeightSpec,
    shape: tuple[int, ...],
    dtype: Any,
    statistics: tuple[tuple[str, tuple[int, ...]], ...],
) -> Arrays:
    """What `_run` makes, abstract: models have many weights of few shapes."""
    w = jax.ShapeDtypeStruct(shape, dtype)
    closed = QUANTIZERS.get("absmax")
    if closed is not None and closed.unsupported(spec, dtype) is None:
        # Arrays are those of the format, whoever chooses the codes, and this one is traced soonest.
        quantizer, statistics = closed, ()
    given = {name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in statistics}
    return jax.eval_shape(functools.partial(_run, quantizer=quantizer, spec=spec), w, given)


@functools.lru_cache(maxsize=256)
def _traced(quantizer: Quantizer, spec: WeightSpec) -> Callable[..., Arrays]:
    """`_run` where values are traced, whose derivative is refused."""
    return without_derivative(
        functools.partial(_run, quantizer=quantizer, spec=spec),
        f"The derivative through quantizing to {spec} was asked for: codes are rounded, so it is "
        "zero almost everywhere and says nothing. To train through it, use the straight-through "
        "estimator: with c = jax.lax.stop_gradient(w), "
        "w + fdq.dequantize(fdq.quantize(c, scheme)) - c. For the derivative by scales, "
        "differentiate by those of the QTensor.",
    )


@functools.partial(jax.jit, static_argnames=("quantizer", "spec", "sequential"))
def _run(
    w: jax.Array,
    statistics: dict[str, jax.Array],
    *,
    quantizer: Quantizer,
    spec: WeightSpec,
    sequential: bool = False,
) -> Arrays:
    """`[..., K, N]` -> arrays; `sequential` may take one matrix, or slab of one, at a time."""
    slabs = quantizer.slabs(w.shape[-2:], spec) if sequential else 1

    def one(w: jax.Array, statistics: dict[str, jax.Array]) -> Arrays:
        if slabs == 1:
            return quantizer.matrix(w, spec, statistics)
        return by_slabs(w, slabs, lambda slab: quantizer.matrix(slab, spec, statistics))

    if w.ndim == 2:
        return one(w, statistics)
    if not quantizer.one_at_a_time or not sequential:
        over_stack = one
        for _ in range(w.ndim - 2):
            over_stack = jax.vmap(over_stack)
        return over_stack(w, statistics)
    lead = w.shape[:-2]
    flat = {name: x.reshape(-1, *x.shape[len(lead) :]) for name, x in statistics.items()}
    out = jax.lax.map(lambda pair: one(*pair), (w.reshape(-1, *w.shape[-2:]), flat))
    return {name: a.reshape(*lead, *a.shape[1:]) for name, a in out.items()}


def by_slabs(w: jax.Array, slabs: int, quantize: Any) -> Arrays:
    """Quantizes a matrix in about `slabs` parts of its columns, one after the other."""
    n = w.shape[1]
    columns = -(-n // slabs)
    slabs = -(-n // columns)

    def slab(i: jax.Array) -> Arrays:
        # Where the last slab would be narrower, it starts earlier and does some columns again.
        start = jnp.minimum(i * columns, n - columns)
        return quantize(jax.lax.dynamic_slice_in_dim(w, start, columns, axis=1))

    parts = jax.lax.map(slab, jnp.arange(slabs))
    again = slabs * columns - n

    def joined(a: jax.Array) -> jax.Array:
        if not again:
            return jnp.moveaxis(a, 0, 1).reshape(a.shape[1], n)
        first = jnp.moveaxis(a[:-1], 0, 1).reshape(a.shape[1], (slabs - 1) * columns)
        return jnp.concatenate([first, a[-1, :, again:]], axis=1)

    return {name: joined(a) for name, a in parts.items()}
