"""How the tables of trellis codes were made: by Lloyd's algorithm, with Viterbi's as its search.

    python -m fdq.formats.trellis_training 2.5 table.npy        # a minute or two on a core

Streams are found for sequences of normal numbers, then each entry of the table becomes the mean of
what it stood for, and so on. It starts from normal numbers in a random order (the quantiles, so
that all are there), and every round has a fresh sample, the last ones a larger.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from fdq.formats import viterbi
from fdq.formats.trellis import LANES, TRELLISES
from fdq.formats.trellis_tables import WINDOW

SEQUENCE = 256  # weights, two tiles: of the seam of a stream the table should know little
ROUNDS = 40
SAMPLE, LAST_SAMPLE = 1 << 18, 1 << 20  # weights of a round, and of each of the last eight
PRIOR = 2.0  # times that an entry counts for itself, so that rare ones stay where they are


def train(step_bits: int, values: int, seed: int = 0) -> np.ndarray:
    """A table float32 `[4096, values]` for steps of so many bits and values."""
    table, rng = first_table(values, seed), np.random.default_rng(seed + 1)
    for i in range(ROUNDS):
        weights = SAMPLE if i < ROUNDS - 8 else LAST_SAMPLE
        shape = (weights // (SEQUENCE * LANES), SEQUENCE // values, values, LANES)
        x = rng.standard_normal(shape).astype(np.float32)
        states = np.asarray(_states(x, table, step_bits)).reshape(-1)
        found = np.moveaxis(x, 2, -1).reshape(-1, values)
        counts = np.bincount(states, minlength=len(table))[:, None]
        sums = [np.bincount(states, found[:, v], len(table)) for v in range(values)]
        table = ((np.stack(sums, axis=-1) + PRIOR * table) / (counts + PRIOR)).astype(np.float32)
    return table


def first_table(values: int, seed: int) -> np.ndarray:
    """The quantiles of a normal distribution in a random order, one for each value of a step."""
    count, normal = 1 << WINDOW, statistics.NormalDist()
    quantiles = np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)])
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(count) for _ in range(values)]
    return np.stack([quantiles[order] for order in orders], axis=-1).astype(np.float32)


@functools.partial(jax.jit, static_argnums=2)
def _states(x: Any, table: Any, bits: int) -> jax.Array:
    """Of `[batches, steps, values, lanes]` the windows of the best streams, without `values`."""

    def batch(x: jax.Array) -> jax.Array:
        codes = viterbi.tail_biting_path(x, table, bits)
        parts = [
            jnp.roll(codes, -i, axis=0) << jnp.int32(i * bits) for i in range(-(-WINDOW // bits))
        ]
        return functools.reduce(jnp.bitwise_or, parts) & jnp.int32((1 << WINDOW) - 1)

    return jax.lax.map(batch, x)


def main() -> None:
    """Trains one and writes it as bfloat16 numbers, the upper halves of float32 ones."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bits", type=float, choices=[format.bits for format in TRELLISES])
    parser.add_argument("file", type=pathlib.Path)
    arguments = parser.parse_args()
    (format,) = (format for format in TRELLISES if format.bits == arguments.bits)
    table = train(format.step_bits, format.values)
    np.save(arguments.file, table.astype(ml_dtypes.bfloat16).view(np.uint16))


if __name__ == "__main__":
    main()
