"""Trellis codes of 1.5 to 4 bits: the values of a row are windows over one stream of bits.

A row of the weight (one input, all outputs) is cut into tiles of 128 columns, the last of which may
be shorter. A tile is a circular stream of `128 * bits` bits, a whole number of bytes, the lower bit
first. Its columns are values in turn, one or two a step; the step that starts at bit `p` reads the
12 bits from there on, past the end those of the start, and a table says what they mean::

    window = stream[p] + 2 * stream[p + 1] + ... + 2048 * stream[p + 11]     p = step * bits_a_step
    w      = table[window][i] * scale                                         i-th value of the step

So a window shares all but `bits_a_step` bits with the next: a weight has the choice of 4096 values
at the price of a few bits, and a Viterbi search finds the best stream. `scale` is bfloat16, one of
a column. The tables hold bfloat16 numbers, trained for normal weights of unit variance by
`fdq.formats.trellis_training`; their version is part of the format's name.

Source: QTIP (arXiv 2406.11235), whose trellis has tiles of 16 x 16 and codes that are computed.
Tiles along the outputs let feedback from one input to the next see every error (LDLQ), without
blocks; a smaller window makes a table that a core's cache holds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from fdq.formats import grouping, survivors, trellis_tables, viterbi
from fdq.formats.format import Arrays, Format
from fdq.formats.trellis_tables import WINDOW
from fdq.schemes.scheme import WeightSpec

TILE = 128  # columns
UNIT_STEPS = 8  # of which the bits are whole bytes
PART = 4  # columns of a tile between which there is feedback, where it is wanted
LANES = 16  # sequences of a step of the search, which a CPU's vectors hold
ROUNDS = 3  # of fitting scales to codes, before those that are kept


class Trellis(Format):
    """A trellis code; `bits` is what codes take, scales add `16 / K`."""

    closed_form = False
    searchable = True
    granularities = ("channel",)
    scale_dtypes = ("bfloat16",)

    def __init__(self, bits: float, values: int):
        self.bits: Any = bits
        self.values = values  # of a step
        self.step_bits = round(bits * values)
        self.name = f"trellis{bits:g}_v{trellis_tables.VERSION}"
        self.grammar_name = f"T{bits:g}"
        self.synonyms = (f"trellis{bits:g}",)

    @property
    def table(self) -> jax.Array:
        """float32 `[4096, values]`, exactly bfloat16 numbers."""
        return jnp.asarray(trellis_tables.table(self.bits), jnp.float32)

    def check(self, spec: WeightSpec, k: int, n: int, path: str = "<array>") -> None:
        """Eight steps of codes are whole bytes."""
        super().check(spec, k, n, path)
        columns = UNIT_STEPS * self.values
        if n % columns:
            raise ValueError(
                f"{path}: N={n} (columns, out-features) is not divisible by {columns}, as the "
                f"codes of {self.grammar_name} need. Leave this tensor out by a rule, or give it "
                "another type."
            )

    def reach(self, spec: WeightSpec) -> float:
        """Of weights that are all alike; the levels go to about 4."""
        return 1.0

    def padding(self, k: int) -> int:
        """None: rows have streams of their own."""
        return 0

    def shape_from_codes(self, codes: tuple[int, ...], padding: int) -> tuple[int, ...]:
        """`step_bits` bytes are eight steps."""
        *lead, k, size = codes
        return (*lead, k, size // self.step_bits * UNIT_STEPS * self.values)

    def abstract(self, shape: tuple[int, ...], spec: WeightSpec) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the arrays."""
        *lead, k, n = shape
        size = n // (UNIT_STEPS * self.values) * self.step_bits
        return {
            "codes": jax.ShapeDtypeStruct((*lead, k, size), jnp.uint8),
            "scale": jax.ShapeDtypeStruct((*lead, 1, n), jnp.dtype(spec.scale_dtype)),
        }

    def decode(
        self, arrays: Arrays, spec: WeightSpec, *, padding: int = 0, dtype: Any = jnp.float32
    ) -> jax.Array:
        """The arrays -> `[..., K, N]`."""
        return (self.levels(arrays["codes"]) * self.multiplier(arrays, spec)).astype(dtype)

    def levels(self, codes: jax.Array) -> jax.Array:
        """Stored codes uint8 `[..., K, bytes]` -> what the table says, float32 `[..., K, N]`."""
        tile = TILE // (UNIT_STEPS * self.values) * self.step_bits
        parts, start = [], 0
        for size in (codes.shape[-1] // tile * tile, codes.shape[-1] % tile):
            if size:
                streams = codes[..., start : start + size]
                parts.append(self._decode_tiles(streams, min(size, tile)))
                start += size
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)

    def _decode_tiles(self, codes: jax.Array, tile: int) -> jax.Array:
        """Of tiles of so many bytes, next to each other."""
        *lead, size = codes.shape
        bits = self.step_bits
        stream = codes.reshape(*lead, size // tile, tile).astype(jnp.int32)
        # Three bytes from each byte on hold every window that starts in it.
        following = [jnp.concatenate([stream[..., i:], stream[..., :i]], axis=-1) for i in (1, 2)]
        words = stream | following[0] << jnp.int32(8) | following[1] << jnp.int32(16)
        words = words.reshape(*words.shape[:-1], tile // bits, bits)
        places = [divmod(step * bits, 8) for step in range(UNIT_STEPS)]
        windows = jnp.stack([words[..., at] >> jnp.int32(by) for at, by in places], axis=-1)
        levels = self._look_up(windows & jnp.int32((1 << WINDOW) - 1))
        while levels.ndim > codes.ndim:  # explicit mesh axes allow merging one pair at a time
            *kept, outer, inner = levels.shape
            levels = levels.reshape(*kept, outer * inner)
        return levels

    def _look_up(self, windows: jax.Array) -> jax.Array:
        """`[...]` below 4096 -> `[..., values]`."""
        table = jnp.asarray(trellis_tables.words(self.bits))
        sharding = jax.typeof(windows).sharding
        explicit = AxisType.Explicit in sharding.mesh.axis_types  # a gather cannot tell by itself
        word = table.at[windows].get(
            mode="promise_in_bounds", out_sharding=sharding if explicit else None
        )
        # A bfloat16 number is the upper half of a float32 one: two of them are one word.
        halves = [word << jnp.uint32(16), word & jnp.uint32(0xFFFF0000)][: self.values]
        return jnp.stack([jax.lax.bitcast_convert_type(h, jnp.float32) for h in halves], axis=-1)

    def encode(self, w: jax.Array, spec: WeightSpec, parameters: Arrays | None = None) -> Arrays:
        """A float32 weight `[..., K, N]` -> arrays, all rows of equal importance."""
        run = functools.partial(self.search, spec=spec)
        for _ in range(w.ndim - 2):
            run = jax.vmap(run)
        return run(w)

    def search(self, w: jax.Array, spec: WeightSpec, importance: jax.Array | None = None) -> Arrays:
        """Encodes `[K, N]`: the best streams, and scales fitted to them.

        A row's importance weighs in the scales only: its stream has no other rows to look after.
        """
        largest = grouping.absolute_maximum(grouping.to_groups(w, spec))
        size = jnp.where(largest >= grouping.SMALLEST_NORMAL, largest, jnp.float32(1.0))
        w = w / size
        h = jnp.ones((w.shape[0], 1), jnp.float32) if importance is None else importance[:, None]

        def refine(_, scale: jax.Array) -> jax.Array:
            return self.fitted_scale(w, self.levels(self.nearest(w, scale)), h, scale)

        scale = jax.lax.fori_loop(0, ROUNDS, refine, self.first_scale(w, h))
        scale = (scale * size).astype(jnp.bfloat16)
        return {"codes": self.nearest(w * size, scale.astype(jnp.float32)), "scale": scale}

    def first_scale(self, w: jax.Array, h: jax.Array) -> jax.Array:
        """The spread of each column, float32 `[1, N]`; no stream is 0, but a scale may be."""
        return jnp.sqrt(jnp.sum(h * w * w, axis=0, keepdims=True) / jnp.sum(h))

    def fitted_scale(
        self, w: jax.Array, levels: jax.Array, h: jax.Array, scale: jax.Array
    ) -> jax.Array:
        """The scale of least squared error for given levels; `scale` where there is none."""
        above = jnp.sum(h * levels * w, axis=0, keepdims=True)
        below = jnp.sum(h * levels * levels, axis=0, keepdims=True)
        return jnp.where(above > 0, above / below, scale)

    def nearest(
        self,
        w: jax.Array,
        scale: jax.Array,
        weights: jax.Array | None = None,
        feedback: Sequence[jax.Array] = (),
    ) -> jax.Array:
        """The stored codes of the streams nearest to `w / scale`, float32 `[K, N]` and `[1, N]`.

        `weights` `[1, N]` are those of the squared errors of `w / scale`; by default all are alike.
        `feedback` is what these errors add to later columns of a tile, in parts of `part(tile)` of
        them: for each of `tiles(N)`, `[count, tile, tile]` (`survivors.tail_biting_path`).
        """
        k, u = w.shape[0], w / jnp.where(scale > 0, scale, jnp.float32(1.0))
        wanted = (u,) if weights is None else (u, jnp.broadcast_to(weights, u.shape))
        parts = []
        for kind, (start, stop, tile) in enumerate(self.tiles(u.shape[1])):
            steps = tile // self.values
            batches = [self._batches(a[:, start:stop], steps) for a in wanted]
            if feedback:
                count, lanes = batches[0].shape[0], batches[0].shape[-1]
                each = jnp.tile(feedback[kind], (k, 1, 1))
                each = jnp.pad(each, ((0, count * lanes - each.shape[0]), (0, 0), (0, 0)))
                batches.append(each.reshape(count, lanes, tile, tile))
            out = jax.lax.map(lambda x: self.paths(*x), tuple(batches))  # [batches, steps, lanes]
            out = jnp.moveaxis(out, -1, 1).reshape(-1, steps)[: k * (stop - start) // tile]
            parts.append(self.pack(out).reshape(k, -1))
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)

    def _batches(self, u: jax.Array, steps: int) -> jax.Array:
        """Tiles of so many steps, next to each other in `[K, n]`, `[batches, steps, V, lanes]`."""
        x = u.reshape(-1, steps, self.values)
        lanes = min(LANES, x.shape[0])
        x = jnp.pad(x, [(0, -x.shape[0] % lanes), (0, 0), (0, 0)])
        return jnp.moveaxis(x.reshape(-1, lanes, steps, self.values), 1, -1)

    def tiles(self, n: int) -> Iterator[tuple[int, int, int]]:
        """Columns from, to, and of each tile: of whole tiles, and of the one that is shorter."""
        whole = n // TILE * TILE
        if whole:
            yield 0, whole, TILE
        if n > whole:
            yield whole, n, n - whole

    def part(self, tile: int) -> int:
        """Columns of a tile between which there is feedback, a whole number of steps."""
        return math.gcd(tile, PART)

    def paths(
        self,
        x: jax.Array,
        weights: jax.Array | None = None,
        feedback: jax.Array | None = None,
    ) -> jax.Array:
        """The best streams of `[steps, values, B]`, by steps: int32 `[steps, B]`."""
        if weights is None or feedback is None:
            return viterbi.tail_biting_path(x, self.table, self.step_bits, weights)
        part = self.part(x.shape[0] * self.values) // self.values
        return survivors.tail_biting_path(x, self.table, self.step_bits, weights, feedback, part)

    def pack(self, codes: jax.Array) -> jax.Array:
        """The bits of each step, int32 `[..., steps]` -> bytes, uint8."""
        *lead, steps = codes.shape
        units = codes.reshape(*lead, steps // UNIT_STEPS, UNIT_STEPS)
        parts = []
        for byte in range(self.step_bits):
            value = jnp.zeros(units.shape[:-1], jnp.int32)
            for step in range(UNIT_STEPS):
                at = step * self.step_bits - 8 * byte
                if -self.step_bits < at < 8:
                    code = units[..., step]
                    value |= code << jnp.int32(at) if at >= 0 else code >> jnp.int32(-at)
            parts.append((value & jnp.int32(255)).astype(jnp.uint8))
        return jnp.stack(parts, axis=-1).reshape(*lead, steps // UNIT_STEPS * self.step_bits)

    def search_distortion(self, spec: WeightSpec, k: int) -> float:
        """Simulated: the code of normal numbers."""
        del k  # which matters to no stream
        w = np.random.default_rng(round(2 * self.bits)).standard_normal(SAMPLE).astype(np.float32)
        arrays = jax.jit(self.search, static_argnums=1)(w, spec)
        return float(np.mean(np.square(w - np.asarray(self.decode(arrays, spec)))))


SAMPLE = (512, TILE)  # of the simulation

# Two values a step where that is as good as one, and half of the work.
TRELLISES = tuple(
    Trellis(bits, values) for bits, values in ((1.5, 2), (2, 2), (2.5, 2), (3, 1), (3.5, 2), (4, 1))
)
