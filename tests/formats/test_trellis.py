"""Trellis codes: what streams mean, that searches find good ones, and how they are used."""

import hashlib
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdq
from fdq.formats import FORMATS, survivors, trellis_tables, viterbi
from fdq.formats.qtensor import dequantize
from fdq.quantizers import expected_distortion, quantize_array
from fdq.schemes.scheme import Scheme, WeightSpec
from tests.covering import longest, slow, slow_but
from tests.formats.cases import TRELLISES, defined_value

every_width = pytest.mark.parametrize(
    "bits", ["2", *map(slow, ("3.5", "4")), *map(longest, ("1.5", "2.5", "3"))]
)


def spec(bits: str) -> WeightSpec:
    return WeightSpec.default(f"trellis{bits}_v1")


@pytest.mark.parametrize("bits", TRELLISES)
def test_names(bits):
    scheme = Scheme.parse(f"wt{bits}a16c8")
    assert str(scheme) == f"WT{bits}A16C8"
    assert str(spec(bits)) == f"WT{bits}"
    assert scheme.weight == spec(bits) == WeightSpec.parse(f"trellis{bits}")
    assert spec(bits).scale_dtype == "bfloat16"
    assert FORMATS[f"trellis{bits}_v1"].bits == float(bits)
    with pytest.raises(ValueError, match="Did you mean 'WT"):
        Scheme.parse("WT5A16")
    with pytest.raises(ValueError, match="granularity"):
        Scheme.parse(f"WT{bits}-g64")


def test_tables_of_a_version_never_change():
    file = pathlib.Path(trellis_tables.__file__).with_name("trellis_tables_v1.npz")
    with np.load(file) as stored:
        arrays = {name: stored[name] for name in stored.files}
    assert {name: a.shape for name, a in arrays.items()} == {
        bits: (4096, values) for bits, values in TRELLISES.items()
    }
    content = b"".join(np.ascontiguousarray(arrays[bits]).tobytes() for bits in TRELLISES)
    assert hashlib.sha256(content).hexdigest() == SHA256_V1


SHA256_V1 = "007fea0ac3ffa58a22e0712fbdb0854ab2421107248cb23a46330f46f7a3abdf"


@pytest.mark.parametrize("n", [slow(16), slow(128), slow(144), 400])
@pytest.mark.parametrize("bits", slow_but(("1.5", "3"), TRELLISES))
def test_streams_of_any_bytes_decode_as_defined(bits, n, rng):
    """Not only those that a search makes: whole tiles, shorter ones, and both."""
    format, k = FORMATS[spec(bits).format], 3
    shape = format.abstract((2, k, n), spec(bits))["codes"].shape
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    scale = rng.uniform(0.5, 2, (2, 1, n)).astype(jnp.bfloat16)
    q = fdq.QTensor(codes=jnp.asarray(codes), scale=jnp.asarray(scale), spec=spec(bits))
    assert q.shape == (2, k, n)
    assert q.bits_per_weight == pytest.approx(float(bits) + 16 / k)
    for i in range(2):
        one = jax.tree.map(lambda a: a[i], q)  # noqa: B023
        np.testing.assert_array_equal(np.asarray(dequantize(q)[i]), defined_value(one, k, n))


@pytest.mark.parametrize(
    ("bits", "values", "window"), [(1, 1, 4), (3, 2, 4), slow(2, 1, 5), slow(2, 2, 3)]
)
def test_the_path_is_the_best_of_all_of_its_overlap(bits, values, window, rng):
    """Against every stream of a few steps, and no worse than most overlaps' best."""
    steps = {1: 8, 2: 4, 3: 3}[bits]
    levels = rng.standard_normal((1 << window, values)).astype(np.float32)
    x = rng.standard_normal((steps, values, LANES)).astype(np.float32)
    out = np.asarray(viterbi.tail_biting_path(jnp.asarray(x), jnp.asarray(levels), bits))
    streams = np.array(list(itertools.product(range(1 << bits), repeat=steps)))

    def costs(streams):
        """[streams, B], and the first overlap of each stream."""
        flat = (streams[:, :, None] >> np.arange(bits)) & 1
        flat = flat.reshape(len(streams), -1)
        places = (np.arange(steps)[:, None] * bits + np.arange(window)) % flat.shape[1]
        windows = flat[:, places] @ (1 << np.arange(window))  # [streams, steps]
        error = np.square(levels[windows][..., None] - x).sum(axis=(1, 2))
        return error, windows[:, 0] & ((1 << (window - bits)) - 1)

    every, overlaps = costs(streams)
    found, kept = costs(out.T)
    bests, chosen = np.empty(LANES), np.diagonal(found)
    for lane in range(LANES):
        same = overlaps == kept[lane]
        np.testing.assert_allclose(chosen[lane], every[same, lane].min(), rtol=1e-5)
        bests[lane] = np.mean([every[overlaps == o, lane].min() for o in np.unique(overlaps)])
    assert chosen.mean() < bests.mean()


def survivor(x, levels, bits, weights, feedback, part, seam):
    """Of one sequence `[steps, V]`, overlap by overlap in float64: the bits of the path kept."""
    steps, values = x.shape
    window = len(levels).bit_length() - 1
    kept = {seam: (0.0, [], [])}  # by overlap: cost, errors, bits
    for step in range(steps):
        before = step // part * part * values
        reached = {}
        for state, level in enumerate(levels):
            overlap = state & ((1 << (window - bits)) - 1)
            if overlap not in kept:
                continue
            cost, errors, path = kept[overlap]
            own = slice(step * values, (step + 1) * values)
            wanted = x[step] + np.asarray(errors[:before]) @ feedback[:before, own]
            cost = cost + np.sum(weights[step] * (wanted - level) ** 2)
            if state >> bits not in reached or cost < reached[state >> bits][0]:
                path = [*path, state & ((1 << bits) - 1)]
                reached[state >> bits] = cost, [*errors, *(x[step] - level)], path
        kept = reached
    return kept[seam][2]


@pytest.mark.parametrize(("bits", "values", "window"), [(1, 2, 4), slow(2, 1, 5), slow(3, 1, 4)])
def test_survivors_are_led_on_by_their_own_errors(bits, values, window, rng):
    """Against a search that keeps lists; and without feedback it is the search without."""
    steps, part, lanes = 12, 3, 5
    levels = rng.standard_normal((1 << window, values))
    x = rng.standard_normal((steps, values, lanes))
    weights = rng.uniform(0.5, 2, x.shape)
    feedback = 0.4 * rng.standard_normal((lanes, steps * values, steps * values))
    size = np.arange(steps * values) // (part * values)
    feedback = np.where(size[:, None] < size, feedback, 0)
    x, levels, weights, feedback = (a.astype(np.float32) for a in (x, levels, weights, feedback))
    run = jax.jit(survivors.tail_biting_path, static_argnames=("bits", "part"))
    plain = jax.jit(viterbi.tail_biting_path, static_argnums=2)(x, levels, bits, weights)
    found = run(x, levels, bits, weights, 0 * feedback, part)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(plain))
    found = np.asarray(run(x, levels, bits, weights, feedback, part))
    assert (found != np.asarray(plain)).any()
    for lane in range(lanes):
        stream = [code >> bit & 1 for code in found[:, lane] for bit in range(bits)]
        seam = sum(bit << i for i, bit in enumerate(stream[: window - bits]))
        own = [a.astype(np.float64) for a in (x[..., lane], weights[..., lane], feedback[lane])]
        kept = survivor(own[0], levels.astype(np.float64), bits, own[1], own[2], part, seam)
        np.testing.assert_array_equal(found[:, lane], kept)


LANES = 40
BOUNDS = {"1.5": 0.143, "2": 0.074, "2.5": 0.0382, "3": 0.0192, "3.5": 0.0103, "4": 0.0052}


@every_width
def test_the_error_of_normal_weights(bits, rng):
    w = rng.standard_normal((128, 256)).astype(np.float32)
    q = quantize_array(w, spec(bits))
    error = np.mean(np.square(np.asarray(dequantize(q)) - w)) / np.mean(np.square(w))
    shannon = 4.0 ** -float(bits)
    assert 1.1 * shannon < error < BOUNDS[bits]
    if bits == "3":
        assert expected_distortion(spec(bits)).value == pytest.approx(error, rel=0.03)


@pytest.mark.slow
def test_odd_rows_shorter_tiles_and_columns_of_any_size(rng):
    size = np.exp2(rng.uniform(-20, 20, (1, 176))).astype(np.float32)
    w = rng.standard_normal((37, 176)).astype(np.float32) * size
    w[:, 5] = 0
    q = quantize_array(w, spec("2"))
    assert q.shape == (37, 176)
    found = np.asarray(dequantize(q))
    np.testing.assert_array_equal(found, defined_value(q, 37, 176))
    assert np.mean(np.square((found - w) / size)) < 0.09
    assert not found[:, 5].any()
    with pytest.raises(ValueError, match=r"a\.b: N=20 .*not divisible by 16.*Leave .* by a rule"):
        quantize_array(w[:, :20], spec("2"), path="a.b")


@pytest.mark.slow
def test_importance_moves_scales(rng):
    """Rows of two sizes: the scale is that of those that count."""
    w = rng.standard_normal((64, 128)).astype(np.float32)
    w[32:] *= 3
    h = np.repeat(np.array([1, 1e-3], np.float32), 32)

    def error(**settings):
        difference = np.asarray(dequantize(quantize_array(w, spec("2"), **settings))) - w
        return np.sum(h[:, None] * np.square(difference))

    assert error(importance=h) < 0.7 * error()


@pytest.mark.slow
def test_ops_take_it(rng):
    """By decoding it; floats, rows that are looked up, experts, derivatives, quantized inputs."""
    w = rng.standard_normal((2, 48, 128)).astype(np.float32)
    q = fdq.quantize(jnp.asarray(w), "WT3")
    decoded = np.asarray(dequantize(q))
    x = rng.standard_normal((2, 5, 48)).astype(np.float32)
    np.testing.assert_allclose(np.asarray(jnp.asarray(x) @ q), x @ decoded, rtol=0, atol=1e-4)
    one = q[0]
    np.testing.assert_array_equal(np.asarray(fdq.take(one, jnp.array([7, 0]))), decoded[0][[7, 0]])
    turned = fdq.einsum("mn,kn->mk", jnp.asarray(decoded[0][:3]), one)
    np.testing.assert_allclose(np.asarray(turned), decoded[0][:3] @ decoded[0].T, atol=1e-3)
    y = fdq.matmul(jnp.asarray(x[0]), one, activation="int8")
    np.testing.assert_allclose(np.asarray(y), x[0] @ decoded[0], atol=0.5)
    assert not np.array_equal(np.asarray(y), x[0] @ decoded[0])
    gradient = jax.grad(lambda x: fdq.matmul(x, one).sum())(jnp.asarray(x[0]))
    np.testing.assert_allclose(
        np.asarray(gradient), np.broadcast_to(decoded[0].sum(axis=1), (5, 48)), atol=1e-4
    )


def test_a_checkpoint_says_which_tables(tmp_path, rng):
    w = rng.standard_normal((2, 24, 128)).astype(np.float32)
    tree = fdq.quantize({"kernel": jnp.asarray(w[0]), "experts": {"w": jnp.asarray(w)}}, "WT2.5")
    fdq.save(tree, tmp_path / "checkpoint")
    assert '"trellis2.5_v1"' in (tmp_path / "checkpoint" / "fdq.json").read_text()
    back = fdq.load(tmp_path / "checkpoint")
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
