"""Experts on tensor cores in the interpreter, and the tiles that rows are dealt out to."""

import jax.numpy as jnp
import numpy as np
import pytest
from canonical_weights import Case, generator, random_weight
from closeness import error
from covering import longest, slow

from pallas_kernels.matmul.gathered_mma import choose_tile_rows, deal, gathered_mma
from pallas_kernels.matmul.row_sources import Gated

INT4 = Case("int4", "group", 128)


@pytest.mark.parametrize(
    "picks, experts, rows",
    [(40, 3, 8), slow(1, 4, 16), slow(40, 3, 16), slow(96, 64, 8), slow(24, 1, 16)],
)
def test_every_pick_has_a_place_in_a_tile_of_its_expert(rng, picks, experts, rows):
    index = rng.integers(0, experts, picks)
    index[: picks // 3] = experts - 1
    tiles = deal(jnp.asarray(index, jnp.int32), experts, rows)
    expert, place, pick = (np.asarray(a) for a in (tiles.expert, tiles.place, tiles.pick))
    assert len(set(place)) == picks and pick.size == expert.size * rows
    np.testing.assert_array_equal(expert[place // rows], index)
    np.testing.assert_array_equal(pick[place], np.arange(picks))
    used = sum(-(-count // rows) for count in np.bincount(index))
    assert (expert < experts).sum() == used
    assert expert.size <= picks


def test_picks_of_nobody_have_no_tile(rng):
    index = rng.choice([0, 2, 3], 40)
    expert, place, pick = vars(deal(jnp.asarray(index, jnp.int32), 3, 8)).values()
    mine = index < 3
    np.testing.assert_array_equal(expert[place[mine] // 8], index[mine])
    np.testing.assert_array_equal(pick[place[mine]], np.arange(40)[mine])
    assert (place[~mine] == pick.size).all()
    used = sum(-(-count // 8) for count in np.bincount(index)[:3])
    assert (expert < 3).sum() == used


@pytest.mark.slow
def test_an_expert_that_all_picked_has_tiles_enough():
    tiles = deal(jnp.zeros((64,), jnp.int32), 64, 8)
    assert np.asarray(tiles.expert)[:8].tolist() == [0] * 8


@pytest.mark.parametrize("gate", [slow(False), longest(True)])
def test_products(gate):
    stack, values = random_weight(INT4, 256, 128, (3,))
    index = generator("index").integers(0, 3, 20)
    index[:12] = 2  # more than one tile
    index[14] = 3  # of another device
    t = 20 if gate else 10
    if gate:
        partials = jnp.asarray(generator("gated").normal(size=(2, t, 512)), jnp.float32)
        x = Gated(partials, jnp.bfloat16)
        rows = np.asarray(x.value(), np.float64)
    else:
        x = jnp.asarray(generator("x").normal(size=(t, 256)) + 0.25, jnp.bfloat16)
        rows = np.asarray(x, np.float64)[np.arange(20) // 2]
    found = gathered_mma(x, stack, jnp.asarray(index))
    assert found.shape[1:] == (20, 128)
    wanted = np.einsum("pk,pkn->pn", rows, values[index % 3])
    wanted[14] = 0
    assert error(found.sum(0), wanted) < 5e-6
    assert not found[:, 14].any()


def test_what_does_not_fit_says_so():
    stack, _ = random_weight(INT4, 128, 128, (2,))
    x, index = jnp.ones((2, 128), jnp.bfloat16), jnp.zeros((4,), jnp.int32)
    with pytest.raises(ValueError, match="P a multiple of T=2"):
        gathered_mma(x, stack, index[:3])
    with pytest.raises(ValueError, match="expected int32 index"):
        gathered_mma(x, stack, index.astype(jnp.float32))
    with pytest.raises(ValueError, match="tile_rows 8, 16 or 32, found 12"):
        gathered_mma(x, stack, index, tile_rows=12)
    with pytest.raises(ValueError, match="found float32"):
        gathered_mma(x.astype(jnp.float32), stack, index)
    assert [choose_tile_rows(p, 64) for p in (12, 384, 4096)] == [8, 16, 32]
