"""The scale search: at least as good as every closed form and every scale of a fine grid."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import fdq
from fdq.formats.qtensor import dequantize
from fdq.quantizers import clip_search, quantize_array
from tests.covering import slow
from tests.formats.cases import levels_of, spec


def errors(w, s, method, importance=None):
    q = quantize_array(w, s, method=method, importance=importance)
    return np.square(np.asarray(dequantize(q), np.float64) - w)


@pytest.mark.parametrize(
    ("s", "closed"),
    [
        (spec("int4", 128), ("absmax", "signed_max")),
        slow(spec("int4", 128, zero_point="integer"), ("absmax",)),
        slow(spec("int3", 128, zero_point="offset"), ("absmax",)),
        (spec("int2", 64, zero_point="half"), ("absmax",)),
        (spec("nf4", 64), ("absmax",)),
        slow(spec("mxfp4", 32, "float8_e8m0fnu"), ("absmax",)),
        (spec("nvfp4", 16, "float8_e4m3fn"), ("absmax", "four_over_six")),
    ],
    ids=str,
)
def test_search_beats_every_closed_form(s, closed, rng):
    w = rng.standard_t(5, (256, 32)).astype(np.float32)
    groups = 256 // s.group_size
    searched = errors(w, s, "search").reshape(groups, -1, 32).sum(axis=1)
    for method in closed:
        other = errors(w, s, method).reshape(groups, -1, 32).sum(axis=1)
        assert searched.sum() < 0.97 * other.sum(), method
        assert np.mean(searched <= other * 1.02) > 0.8, method


def test_search_finds_the_best_signed_scale_of_each_group(rng):
    """Against a brute-force search over a grid four times as fine, in float64."""
    s = spec("int4", 32, "bfloat16")
    w = rng.standard_normal((128, 4)).astype(np.float32)
    found = errors(w, s, "search").reshape(4, 32, 4).sum(axis=1)
    groups = w.reshape(4, 32, 4).astype(np.float64)
    largest = np.abs(groups).max(axis=1)
    levels = levels_of(s)
    best = np.full(largest.shape, np.inf)
    for fraction in np.linspace(-1.2, 1.2, 401):
        scale = (fraction * largest / 7.5).astype(ml_dtypes.bfloat16).astype(np.float64)
        if abs(fraction) < 0.2:
            continue
        distance = np.abs(groups[:, None] - levels[None, :, None, None] * scale[:, None, None])
        best = np.minimum(best, np.square(distance.min(axis=1)).sum(axis=1))
    assert np.all(found <= best * 1.04)
    assert found.sum() <= best.sum() * 1.01
    scale = np.asarray(quantize_array(w, s).scale, np.float32)
    assert (scale < 0).any()
    assert (scale > 0).any()


def test_importance_weighs_the_error(rng):
    s = spec("int4", 64)
    w = rng.standard_normal((128, 16)).astype(np.float32)
    h = np.exp(rng.standard_normal(128) * 1.5).astype(np.float32)
    plain = errors(w, s, None)
    guided = errors(w, s, None, importance=jnp.asarray(h))
    assert (h[:, None] * guided).sum() < 0.97 * (h[:, None] * plain).sum()
    assert guided.sum() > plain.sum()
    uniform = errors(w, s, None, importance=np.full(128, 3.0, np.float32))
    assert uniform.sum() == pytest.approx(plain.sum(), rel=1e-3)


def test_importance_of_a_stack_is_one_row_a_matrix(rng):
    s = spec("int4", 32)
    w = rng.standard_normal((2, 64, 8)).astype(np.float32)
    h = np.exp(rng.standard_normal((2, 64))).astype(np.float32)
    both = quantize_array(w, s, importance=h)
    for i in range(2):
        one = quantize_array(w[i], s, importance=h[i])
        for x, y in zip(jax.tree.leaves(both), jax.tree.leaves(one), strict=True):
            np.testing.assert_array_equal(np.asarray(x[i]), np.asarray(y))


def test_memory_does_not_grow_with_the_number_of_candidates():
    s = spec("int4", 128)
    w = jax.ShapeDtypeStruct((512, 256), jnp.float32)
    lowered = jax.jit(lambda w: quantize_array(w, s)).lower(w)
    analysis = lowered.compile().memory_analysis()
    if analysis is None:
        pytest.skip("this backend does not report memory")
    assert analysis.temp_size_in_bytes < 6 * 512 * 256 * 4


@pytest.mark.parametrize("format", ["int4", "nf4"])
def test_searched_codes_use_both_ends(format, rng):
    s = spec(format, 64)
    w = rng.standard_normal((256, 16)).astype(np.float32)
    q = quantize_array(w, s)
    codes = np.asarray(q.codes)
    used = set(np.unique(codes & 15)) | set(np.unique(codes >> 4))
    assert used == set(range(16))


@pytest.mark.parametrize("s", [spec("int4", 64), spec("int3")], ids=str)
def test_slabs_of_columns_change_nothing(s, rng, monkeypatch):
    monkeypatch.setattr(clip_search, "SLAB_WEIGHTS", 2048)
    w = rng.standard_normal((192, 45)).astype(np.float32)  # a shape that no other test compiles
    h = np.exp(rng.standard_normal(192)).astype(np.float32)
    assert clip_search.SEARCH.slabs(w.shape, s) == 5
    slabs = quantize_array(w, s, importance=h)
    whole = jax.vmap(lambda w: quantize_array(w, s, importance=h))(jnp.asarray(w)[None])
    for x, y in zip(jax.tree.leaves(slabs), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y)[0])


def test_columns_that_no_slabs_divide(rng, monkeypatch):
    monkeypatch.setattr(clip_search, "SLAB_WEIGHTS", 1024)
    s = spec("int4", 64)
    w = rng.standard_normal((128, 37)).astype(np.float32)
    assert 37 % clip_search.SEARCH.slabs(w.shape, s) != 0
    slabs = quantize_array(w, s)
    whole = jax.jit(lambda w: quantize_array(w, s))(w)
    for x, y in zip(jax.tree.leaves(slabs), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    "name", ["W4A16", slow("W4A16-channel"), slow("WNVFP4"), "WNF4A16", slow("WCC2")]
)
@pytest.mark.parametrize("nothing", [0.0, 1e-40, 1e-30, 1e30])
def test_importance_that_tells_nothing_apart_changes_nothing(name, nothing, rng):
    """All zero (an input that was always 0), or as small or large as float32 gets."""
    w = rng.standard_normal((256, 32)).astype(np.float32)

    def relative_error(**settings):
        back = np.asarray(fdq.dequantize(fdq.quantize(w, name, **settings)), np.float64)
        return np.linalg.norm(back - w) / np.linalg.norm(w)

    plain = relative_error()
    guided = relative_error(importance=np.full(256, nothing, np.float32))
    assert guided == pytest.approx(plain, rel=0.01)


@pytest.mark.parametrize("name", ["W4A16", "WCC2"])
def test_a_group_without_importance_is_not_given_up(name, rng):
    """The other groups have theirs; the one of zeros counts its channels alike."""
    w = rng.standard_normal((256, 32)).astype(np.float32)
    h = np.exp(rng.standard_normal(256)).astype(np.float32)
    h[:128] = 0.0
    back = np.asarray(fdq.dequantize(fdq.quantize(w, name, importance=h)), np.float64)
    plain = np.asarray(fdq.dequantize(fdq.quantize(w, name)), np.float64)
    error, least = (np.square(x - w)[:128].sum() for x in (back, plain))
    assert error < 1.3 * least


@pytest.mark.parametrize(
    ("wrong", "found"), [(np.nan, "nan"), (np.inf, "inf"), (-1.0, "-1.0"), (-np.inf, "-inf")]
)
def test_importance_that_is_none_is_refused(wrong, found, rng):
    w = rng.standard_normal((256, 4)).astype(np.float32)
    h = np.ones(256, np.float32)
    h[7] = wrong
    message = rf"importance of finite numbers >= 0, found {found} at \[7\] \(1 such in all\)"
    for given in (h, jnp.asarray(h)):
        with pytest.raises(ValueError, match=message):
            fdq.quantize(w, "W4A16", importance=given)
    with pytest.raises(ValueError, match=f"kernel: expected {message}"):
        fdq.quantize({"kernel": jnp.asarray(w)}, "W4A16", importance={"kernel": h})


def test_importance_that_float32_does_not_hold_is_refused(rng):
    w = rng.standard_normal((256, 4)).astype(np.float32)
    with pytest.raises(ValueError, match=r"found 1e\+300 at \[0\] \(256 such in all\)"):
        fdq.quantize(w, "W4A16", importance=np.full(256, 1e300))


@pytest.mark.parametrize("wrong", ["large", np.ones(256, complex), [None] * 256])
def test_importance_of_no_numbers_is_refused(wrong, rng):
    w = rng.standard_normal((256, 4)).astype(np.float32)
    with pytest.raises(TypeError, match="expected importance of numbers, found"):
        fdq.quantize(w, "W4A16", importance=wrong)


def test_importance_may_be_a_list_and_what_is_wrong_in_a_traced_one_gives_nan(rng):
    w = jnp.asarray(rng.standard_normal((128, 2)), jnp.float32)
    h = np.linspace(1, 2, 128, dtype=np.float32)
    expected = fdq.dequantize(fdq.quantize(w, "W4A16", importance=h))
    traced = jax.jit(lambda h: fdq.dequantize(fdq.quantize(w, "W4A16", importance=h)))
    for found in (traced(h), fdq.dequantize(fdq.quantize(w, "W4A16", importance=h.tolist()))):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    for wrong in (np.nan, -1.0):
        h[7] = wrong
        assert np.isnan(traced(h)).all()


def test_a_layer_that_saw_only_zeros_is_quantized_as_without_statistics(rng):
    layer = nnx.Linear(256, 32, rngs=nnx.Rngs(0))
    seen = fdq.calibrate(nnx.Sequential(layer), jnp.zeros((4, 256)))
    guided = fdq.quantize(nnx.Sequential(layer), "W4A16", calibration=seen).layers[0].kernel
    plain = fdq.quantize(nnx.Sequential(layer), "W4A16").layers[0].kernel
    for x, y in zip(jax.tree.leaves(guided), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
