"""What x of a matrix kernel may be, and how the kernel reads it while it stages it.

An array `[M, K]`; `Gated`, the partial sums of gate and up; `Normed`, rows that want their norm.
A decode step is a chain of small products, and what XLA would do between two of them costs it one
to three launches each; so the kernel that reads the rows finishes them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.matmul.core import ReadX
from pallas_kernels.mosaic.launch import THREADS, load, synchronize
from pallas_kernels.weights.kernel_weight import KernelWeight
from pallas_kernels.weights.layout import WeightLayout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gated:
    """`silu(gate) * up`, still as the partial sums of the product that made gate and up.

    Gate, up and the result are rounded to `dtype`, as a model in that dtype does.
    """

    partials: Any  # float32 [split, M, 2 I], gate first
    dtype: Any = dataclasses.field(default=jnp.bfloat16, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """`(M, I)`."""
        return self.partials.shape[-2], self.partials.shape[-1] // 2

    def value(self) -> jax.Array:
        """`[M, I]` in `dtype`."""
        gate, up = jnp.split(jnp.sum(self.partials, axis=0), 2, axis=-1)
        return gated(gate, up, self.dtype).astype(self.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Normed:
    """Rows that are normalized on their way in: `x / sqrt(mean(x^2) + epsilon) * scale`."""

    x: Any  # [M, K], any float dtype; results are rounded to it
    scale: Any  # [K]
    epsilon: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of x."""
        return tuple(self.x.shape)

    @property
    def dtype(self) -> Any:
        """Of x, and of the rows."""
        return self.x.dtype

    def value(self) -> jax.Array:
        """The rows, in plain JAX: float32 inside, rounded to the dtype of x."""
        y = self.x.astype(jnp.float32)
        y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return (y * self.scale.astype(jnp.float32)[None, :]).astype(self.x.dtype)


def gated(gate: jax.Array, up: jax.Array, dtype: Any) -> jax.Array:
    """float32 `silu(gate) * up`: of rounded numbers, rounded once, as XLA does in `dtype`."""

    def rounded(a):
        return a.astype(dtype).astype(jnp.float32)

    gate = rounded(gate)
    return rounded(gate / (1.0 + jnp.exp(-gate)) * rounded(up))


Rows = jax.Array | Gated | Normed


def finished(x: Rows) -> jax.Array:
    """The rows as an array `[M, K]`."""
    return x.value() if isinstance(x, (Gated, Normed)) else x


def rows_shape(x: Rows, caller: str, *, int8: bool = False) -> tuple[int, int]:
    """`(M, K)` of the rows that `caller` was given, floats or, if so, `int8`; or ValueError."""
    if isinstance(x, Gated):
        if x.partials.ndim != 3 or x.partials.shape[-1] % 2:
            raise ValueError(
                f"{caller}: Gated needs partials [split, M, 2 I], found {x.partials.shape}."
            )
        return x.shape
    if len(x.shape) != 2 or not all(x.shape):
        raise ValueError(f"{caller}: expected rows x [M, K], found {tuple(x.shape)}.")
    if not (jnp.issubdtype(x.dtype, jnp.floating) or (int8 and x.dtype == jnp.int8)):
        raise ValueError(f"{caller}: expected float rows, found {x.dtype} {tuple(x.shape)}.")
    if isinstance(x, Normed) and x.scale.shape != x.shape[1:]:
        raise ValueError(
            f"{caller}: Normed rows {x.shape} need a scale [{x.shape[1]}], found {x.scale.shape}."
        )
    m, k = x.shape
    return m, k


_MOST_PARTIALS = 16  # rows of partial sums that every program may read again


def readable(x: Rows, layout: WeightLayout, rows: int) -> Rows:
    """`x`, finished where a kernel cannot (gate and up must end where segments do) or should not:
    every program adds the partial sums of its `rows` up, which for many costs more than a launch.
    """
    if not isinstance(x, Gated):
        return x
    costly = x.partials.shape[0] * rows > _MOST_PARTIALS
    return x.value() if costly or layout.k % layout.segment else x


def row_operands(x: Rows, layout: WeightLayout) -> list[jax.Array]:
    """The arrays that a kernel reads x from."""
    shape = (layout.segments, layout.segment_units, layout.words.rows)
    if isinstance(x, Gated):
        parts, m, _ = x.partials.shape
        return [x.partials.reshape(parts, m, 2, *shape)]

    def by_segments(a):
        missing = layout.segments * layout.segment - a.shape[-1]
        a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)]) if missing else a
        return a.reshape(*a.shape[:-1], *shape)

    if isinstance(x, Normed):
        return [by_segments(x.x), by_segments(x.scale), whole(x.x)]
    return [by_segments(x)]


def row_reader(
    x: Rows,
    refs: Sequence[Any],
    layout: WeightLayout,
    first_row: Any,
    rows: int,
    segment: Any,
    scratch_ref: Any,
) -> ReadX:
    """`read_x` of `core.stage` for a program: its `rows` and its first row and segment.

    Of x the kind counts; `refs` are of `row_operands`; `scratch_ref` is shared float32
    `[1 or more, M]`, free until the first read.
    """
    some = pl.ds(first_row, rows)

    def where(first, count):
        return pl.ds(segment + first, count)

    if isinstance(x, Gated):
        # Axes of x follow those of shared memory: [split, gate or up, segment, row, unit, M].
        by_unit = refs[0].transpose((0, 2, 3, 5, 4, 1))

        def read_gated(first, count, layout_of_x):
            def total(half):
                parts = [
                    load(by_unit.at[s, half, where(first, count), :, :, some], layout_of_x)
                    for s in range(by_unit.shape[0])
                ]
                return functools.reduce(jnp.add, parts)

            return gated(total(0), total(1), x.dtype)

        return read_gated
    by_unit = refs[0].transpose((1, 3, 2, 0))  # [segment, row, unit, M]

    def read(first, count, layout_of_x):
        y = load(by_unit.at[where(first, count), :, :, some], layout_of_x)
        return y.astype(jnp.float32)

    if not isinstance(x, Normed):
        return read
    for m in range(rows):
        scratch_ref[0, m] = inverse_root_mean_square(refs[2], first_row + m, layout.k, x.epsilon)
    synchronize()
    scale_by_unit = refs[1].transpose((0, 2, 1))

    def read_normed(first, count, layout_of_x):
        one_row = layout_of_x.reduce(0).reduce(0).reduce(0)
        factors = load(scratch_ref.at[0], one_row)
        scale = load(scale_by_unit.at[where(first, count)], layout_of_x.reduce(3))
        y = read(first, count, layout_of_x)
        y = y * lax.broadcast_in_dim(factors, y.shape, (3,))
        scale = lax.broadcast_in_dim(scale.astype(jnp.float32), y.shape, (0, 1, 2))
        return (y * scale).astype(x.dtype).astype(jnp.float32)

    return read_normed


def inverse_root_mean_square(x_ref: Any, row: Any, features: int, epsilon: float) -> jax.Array:
    """float32 scalar `1 / sqrt(mean(x[row]^2) + epsilon)`, the mean that of `features` (K).

    `x_ref` is `[M, W]`, W a multiple of 128, with zeros beyond K.
    """
    width = x_ref.shape[-1]

    def add(chunk, total):
        y = x_ref[row, pl.ds(pl.multiple_of(chunk * THREADS, THREADS), THREADS)]
        y = y.astype(jnp.float32)
        return total + y * y

    zero = jnp.zeros((THREADS,), jnp.float32)
    squares = lax.fori_loop(0, width // THREADS, add, zero)
    mean = jnp.sum(squares) * jnp.float32(1 / features)
    return lax.rsqrt(mean + jnp.float32(epsilon))


def whole(a: jax.Array, axis: int = -1) -> jax.Array:
    """`a` with zeros after `axis` up to a multiple of 128; as it is where it is whole."""
    missing = -a.shape[axis] % THREADS
    if not missing:
        return a
    pad = [(0, 0)] * a.ndim
    pad[axis] = (0, missing)
    return jnp.pad(a, pad)


def rows_cotangent(
    cotangent: jax.Array, x: Rows, w: KernelWeight, decoded: jax.Array, picks: int = 1
) -> Rows:
    """The cotangent of rows x `[T, K]` from that of the partial sums, float32 `[split, P, N]`.

    `decoded` is float32 `[K, N]`, or `[P, K, N]` of the experts picked; `picks` is P / T.
    """
    parts = cotangent.shape[0]
    rows = w.layout.segments * w.layout.segment
    pad = [(0, 0)] * (decoded.ndim - 2) + [(0, rows - decoded.shape[-2]), (0, 0)]
    slices = jnp.pad(decoded, pad).reshape(*decoded.shape[:-2], parts, rows // parts, -1)
    formula = "spn,skn->psk" if decoded.ndim == 2 else "spn,pskn->psk"
    found = jnp.einsum(formula, cotangent, slices, precision=lax.Precision.HIGHEST)
    found = found.reshape(-1, picks, rows).sum(axis=1)[:, : w.layout.k]
    values, finish = jax.vjp(finished, x)
    return finish(found.astype(values.dtype))[0]
