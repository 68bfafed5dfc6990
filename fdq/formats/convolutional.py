"""CC2: the convolutional code that FastDeploy calls WINT2, 2.06 bits per weight.

One byte stands for four consecutive rows of a column. It is mapped to a 15-bit word, of which each
weight reads a window of 6 bits that overlaps its neighbour's by 3::

    word = floor(code * code_scale + code_offset + 0.5)                  in float32
    v_i  = ((word >> (9, 6, 3, 0)[i]) & 63) - 32                         i = row % 4
    w    = v_i * local_scale * super_scale

`local_scale` is a 4-bit number of 64 rows, two in a byte of `scale` (even group in the low
nibble; FastDeploy's files have it in the high one); `super_scale`, `code_scale` and
`code_offset` are float32 of a column. Source of the decoder: FastDeploy's
`wint2_fused_moe_kernel.py`. Its encoder is not published; this one picks, for every four weights,
the nearest of the 256 codewords, under constants searched for normal weights (with the full-range
constants 32767 / 255 and 0 the code is worse than rounding to four levels).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdq.formats import distortion, exact_arithmetic, grouping, packing
from fdq.formats.format import Arrays, Format, Tables, Unit
from fdq.schemes.scheme import WeightSpec

GROUP = 64
ROWS_PER_CODE = 4
SHIFTS = (9, 6, 3, 0)

CODE_SCALE = np.float32(120.956170)
CODE_OFFSET = np.float32(1129.4370)
# Value of one unit of v for weights of unit variance, and the local scale that stands for it:
# groups with up to 1.5 times the column's spread are in reach.
UNIT = 0.06139
TYPICAL_LOCAL_SCALE = 10
LARGEST_LOCAL_SCALE = 15

SWEEP = (-2, 2)  # local scales tried around the one that matches the spread of the group
ROUNDS = 3  # of choosing codes, then fitting super_scale to them
SLAB_WEIGHTS = 1 << 18  # weights encoded at a time
UNROLL = 4  # codewords compared in one pass over a slab


class Convolutional(Format):
    """CC2; `bits` is what codes take, local scales add 1/16."""

    name = "cc2"
    grammar_name = "CC2"
    aliases = ("wint2",)
    bits = 2
    closed_form = False
    searchable = True
    group_size = GROUP
    scale_dtypes = ("uint4",)
    fixed = True

    def reach(self, spec: WeightSpec) -> float:
        """Of the super scale; most of a column's local scales are near a typical one."""
        return TYPICAL_LOCAL_SCALE * 32.0

    def array_names(self, spec: WeightSpec) -> tuple[str, ...]:
        """All but `codes` and `scale` (local scales) are float32 `[..., 1, N]`."""
        return ("codes", "scale", "code_scale", "code_offset", "super_scale")

    def padding(self, k: int) -> int:
        """None: K is a multiple of 64."""
        return 0

    def shape_from_codes(self, codes: tuple[int, ...], padding: int) -> tuple[int, ...]:
        """Four rows a code."""
        *lead, rows, n = codes
        return (*lead, rows * ROWS_PER_CODE, n)

    def decode(
        self, arrays: Arrays, spec: WeightSpec, *, padding: int = 0, dtype: Any = jnp.float32
    ) -> jax.Array:
        """The arrays -> `[..., K, N]`, exactly as NumPy computes the definition in float32."""
        codes = arrays["codes"]
        *lead, rows, n = codes.shape
        values = jnp.stack(self.decode_unit([codes], spec, self.unit_tables(arrays, spec)), axis=-2)
        local = self._local_scales(arrays)
        # v * local is an exact small integer: one rounding, as in any order of the two products.
        wide = (*local.shape[:-1], GROUP // ROWS_PER_CODE, ROWS_PER_CODE, n)
        local = jnp.broadcast_to(local[..., :, None, None, :], wide)
        scaled = (values.reshape(local.shape) * local).reshape(*lead, rows * ROWS_PER_CODE, n)
        return (scaled * arrays["super_scale"]).astype(dtype)

    @property
    def unit(self) -> tuple[int, int]:
        """Four rows a byte."""
        return 1, ROWS_PER_CODE

    def decode_unit(self, unit: Unit, spec: WeightSpec, tables: Tables = ()) -> Unit:
        """uint8 codes -> the values -32..31 of their four rows, exactly as NumPy computes them."""
        high, low, offset = tables
        code = unit[0].astype(jnp.float32)
        # Both products are exact: fused or not, the sum is rounded as in the definition.
        word = jnp.floor(code * high + code * low + offset + jnp.float32(0.5)).astype(jnp.int32)
        windows = [(word >> jnp.int32(shift)) & jnp.int32(63) for shift in SHIFTS]
        return [w.astype(jnp.float32) - jnp.float32(32) for w in windows]

    def unit_tables(self, arrays: Arrays, spec: WeightSpec) -> Tables:
        """The code scale as a sum of two numbers, and the code offset."""
        return (*exact_arithmetic.halves(arrays["code_scale"]), arrays["code_offset"])

    def multiplier(self, parameters: Arrays, spec: WeightSpec) -> jax.Array:
        """Local scales times super scale."""
        return self._local_scales(parameters) * parameters["super_scale"]

    def _local_scales(self, arrays: Arrays) -> jax.Array:
        scale, groups = arrays["scale"], arrays["codes"].shape[-2] * ROWS_PER_CODE // GROUP
        local = packing.unpack(scale, 4, padding=2 * scale.shape[-2] - groups)
        return local.astype(jnp.float32)

    def encode(self, w: jax.Array, spec: WeightSpec, parameters: Arrays | None = None) -> Arrays:
        """A float32 weight `[..., K, N]` -> arrays, all rows of equal importance."""
        run = functools.partial(self.search, spec=spec)
        for _ in range(w.ndim - 2):
            run = jax.vmap(run)
        return run(w)

    def search(self, w: jax.Array, spec: WeightSpec, importance: jax.Array | None = None) -> Arrays:
        """Encodes `[K, N]`: nearest codewords, best local scales, a fitted super scale."""
        k, n = w.shape
        columns = max(1, min(n, SLAB_WEIGHTS // k))
        slabs = -(-n // columns)
        padded = jnp.pad(w, [(0, 0), (0, slabs * columns - n)])
        split = jnp.moveaxis(padded.reshape(k, slabs, columns), 1, 0)
        out = jax.lax.map(lambda slab: _encode_columns(slab, importance), split)
        joined = {
            name: jnp.moveaxis(a, 0, 1).reshape(a.shape[1], slabs * columns)[:, :n]
            for name, a in out.items()
        }
        return {
            "codes": joined["codes"],
            "scale": packing.pack(joined["local_scale"], 4),
            "code_scale": jnp.full((1, n), CODE_SCALE),
            "code_offset": jnp.full((1, n), CODE_OFFSET),
            "super_scale": joined["super_scale"],
        }

    def search_distortion(self, spec: WeightSpec, k: int) -> float:
        """Simulated: the code of normal numbers, with the best continuous scale of each group."""
        return distortion.of_codebook(codebook(), GROUP, UNIT)


@functools.cache
def codebook() -> np.ndarray:
    """The values of the 256 codes under the encoder's constants, int32 `[256, 4]`."""
    code = np.arange(256, dtype=np.float32)
    word = np.floor(code * CODE_SCALE + CODE_OFFSET + np.float32(0.5)).astype(np.int32)
    return np.stack([((word >> shift) & 63) - 32 for shift in SHIFTS], axis=-1)


def _encode_columns(w: jax.Array, importance: jax.Array | None) -> Arrays:
    """`[K, n]` -> `codes [K/4, n]`, `local_scale [K/64, n]`, `super_scale [1, n]`."""
    k, n = w.shape
    groups = k // GROUP
    largest = jnp.max(jnp.abs(w), axis=0, keepdims=True)
    size = jnp.where(largest >= grouping.SMALLEST_NORMAL, largest, jnp.float32(1.0))
    w = w / size
    h = jnp.ones((k, 1), jnp.float32) if importance is None else importance[:, None]
    spread = jnp.sqrt(jnp.mean(jnp.square(w.reshape(groups, GROUP, n)), axis=1))
    whole = jnp.sqrt(jnp.mean(jnp.square(w), axis=0, keepdims=True))
    widest = jnp.max(spread, axis=0, keepdims=True)
    step = jnp.maximum(whole / TYPICAL_LOCAL_SCALE, widest / LARGEST_LOCAL_SCALE)
    super_scale = jnp.where(whole > 0, jnp.float32(UNIT) * step, jnp.float32(1.0))

    def refine(_, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        super_scale = state[0]
        codes, local = _choose(w, h, spread, super_scale)
        values = jnp.asarray(codebook(), jnp.float32)[codes]  # [K/4, n, 4]
        values = jnp.moveaxis(values, -1, 1).reshape(groups, GROUP, n)
        values = (values * local[:, None, :]).reshape(k, n)
        numerator = jnp.sum(h * values * w, axis=0, keepdims=True)
        denominator = jnp.sum(h * values * values, axis=0, keepdims=True)
        fitted = jnp.where(numerator > 0, numerator / denominator, super_scale)
        # Twelve bits: the rest of a long sum depends on how XLA orders it.
        fitted = jax.lax.reduce_precision(fitted, exponent_bits=8, mantissa_bits=12)
        return fitted, codes, local

    start = (super_scale, jnp.zeros((k // ROWS_PER_CODE, n), jnp.int32), jnp.zeros_like(spread))
    super_scale, codes, local = jax.lax.fori_loop(0, ROUNDS, refine, start)
    return {
        "codes": codes.astype(jnp.uint8),
        "local_scale": local.astype(jnp.uint8),
        "super_scale": super_scale * size,
    }


def _choose(
    w: jax.Array, h: jax.Array, spread: jax.Array, super_scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Local scales (float32 `[K/64, n]`) and codes (int32 `[K/4, n]`) of least error."""
    groups, n = spread.shape
    middle = jnp.round(spread * jnp.float32(UNIT) / super_scale)
    middle = jnp.clip(middle, 1 - SWEEP[0], LARGEST_LOCAL_SCALE - SWEEP[1])

    def attempt(i: jax.Array, best):
        local = middle + jnp.asarray(i + SWEEP[0], jnp.float32)
        scale = jnp.broadcast_to((local * super_scale)[:, None, :], (groups, GROUP, n))
        codes, score = _nearest(w / scale.reshape(w.shape), h)
        total = jnp.sum(score.reshape(groups, GROUP // ROWS_PER_CODE, n), axis=1)
        # sum h (w - s v)^2 = sum h w^2 - 2 s^2 score, for w / s = y and score = y.v - v.v / 2.
        gain = total * jnp.square(local * super_scale)
        least, kept_local, kept_codes = best
        wins = gain > least
        wide = jnp.broadcast_to(wins[:, None, :], (groups, GROUP // ROWS_PER_CODE, n))
        return (
            jnp.where(wins, gain, least),
            jnp.where(wins, local, kept_local),
            jnp.where(wide.reshape(codes.shape), codes, kept_codes),
        )

    zero = jnp.zeros_like(spread)
    nothing = (zero, zero, jnp.zeros((w.shape[0] // ROWS_PER_CODE, n), jnp.int32))
    _, local, codes = jax.lax.fori_loop(0, SWEEP[1] - SWEEP[0] + 1, attempt, nothing)
    return codes, local


def _nearest(y: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Index of the nearest codeword of every four rows of `y` `[K, n]`, and its score."""
    k, n = y.shape
    parts = jnp.moveaxis(y.reshape(k // ROWS_PER_CODE, ROWS_PER_CODE, n), 1, 0)
    h = jnp.broadcast_to(h.reshape(k // ROWS_PER_CODE, ROWS_PER_CODE, 1), (k // 4, 4, n))
    h = jnp.moveaxis(h, 1, 0)
    book = jnp.asarray(codebook(), jnp.float32)

    def compare(i: jax.Array, best):
        index, score = best
        i = jnp.asarray(i, jnp.int32)  # a Python number under jax.disable_jit, 64 bits under x64
        words = jax.lax.dynamic_slice_in_dim(book, i * UNROLL, UNROLL)
        for j in range(UNROLL):
            found = jnp.zeros_like(score)
            for part in range(ROWS_PER_CODE):
                value = words[j, part]
                found = found + h[part] * value * (parts[part] - 0.5 * value)
            wins = found > score
            score = jnp.where(wins, found, score)
            index = jnp.where(wins, i * UNROLL + j, index)
        return index, score

    start = (jnp.zeros((k // ROWS_PER_CODE, n), jnp.int32), jnp.full((k // 4, n), -jnp.inf))
    return jax.lax.fori_loop(0, len(codebook()) // UNROLL, compare, start)


CC2 = Convolutional()
