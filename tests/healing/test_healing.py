"""Healing: it comes nearer to the original, moves what it may, and goes on where it was stopped."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fdq
from fdq import nn
from fdq.formats.qtensor import QuantizedWeight, materialize
from fdq.healing import state_file
from fdq.healing.healing import _Reached
from fdq.healing.knobs import Knobs
from fdq.nn.parameters import split
from tests.covering import longest, slow

VOCABULARY, WIDTH = 24, 64


class Model(nnx.Module):
    """A layer with a bias, a norm, and a head that stays as it is."""

    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH, rngs=rngs)
        self.up = nn.Linear(WIDTH, WIDTH, use_bias=True, rngs=rngs)
        self.norm = nn.RMSNorm(WIDTH, epsilon=1e-5, dtype=jnp.float32)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        x = 30 * self.embed_tokens(tokens, jnp.float32)
        return 4 * self.lm_head(jax.nn.silu(self.norm(self.up(x))))


@pytest.fixture
def tokens(rng):
    return rng.integers(VOCABULARY, size=(40, 8))


def healed(tokens, scheme, steps=12, **settings):
    original = Model()
    settings = {"batch_size": 4, "every": 6} | settings
    return fdq.heal(fdq.quantize(original, scheme), original, tokens, steps=steps, **settings)


def weights(model):
    leaves = jax.tree.leaves(split(model)[1], is_leaf=lambda x: isinstance(x, QuantizedWeight))
    return [materialize(leaf) for leaf in leaves if isinstance(leaf, QuantizedWeight)]


SCHEMES = ("W2A16-g32", "W4A8", "NVFP4", "WT2A16", "MXFP4", "WNF4A16", "Wfp8Afp8", "W8A16", "WINT2")


@pytest.mark.parametrize("scheme", [SCHEMES[0], *map(longest, SCHEMES[1:])])
def test_every_format_comes_nearer_with_its_codes_as_they_were(tokens, scheme):
    result = healed(tokens, scheme)
    before = fdq.quantize(Model(), scheme)
    assert result.after < result.before
    assert result.before == result.held_out[0].kl
    for old, new in zip(weights(before), weights(result.model), strict=True):
        assert new.spec == old.spec
        np.testing.assert_array_equal(np.asarray(new.codes), np.asarray(old.codes))
    np.testing.assert_array_equal(result.model.lm_head.kernel[...], before.lm_head.kernel[...])
    assert not np.array_equal(result.model.norm.scale[...], before.norm.scale[...])
    assert not np.array_equal(result.model.up.bias[...], before.up.bias[...])


@pytest.mark.slow
@pytest.mark.longest
def test_the_model_is_the_one_that_was_measured(tokens):
    result = healed(tokens, "W2A16-g32", held_out=tokens[:5])
    log_p, log_q = (jax.nn.log_softmax(m(jnp.asarray(tokens[:5]))) for m in (Model(), result.model))
    found = float((jnp.exp(log_p) * (log_p - log_q)).sum(-1).mean())
    np.testing.assert_allclose(found, result.after, rtol=1e-4)
    assert result.numbers == sum(q.scale.size for q in weights(result.model)) + 2 * WIDTH


@pytest.mark.slow
@pytest.mark.longest
def test_free_codes_come_nearer_still(tokens):
    fixed, free = (
        healed(tokens, "W2A16-g32", steps=30, codes=c, learning_rate=1e-2)
        for c in ("fixed", "free")
    )
    assert free.after < 0.8 * fixed.after
    old, new = (weights(m) for m in (fixed.model, free.model))
    assert any(not np.array_equal(a.codes, b.codes) for a, b in zip(old, new, strict=True))
    assert [a.nbytes for a in old] == [b.nbytes for b in new]


@pytest.mark.parametrize("codes", [slow("free"), longest("fixed")])
def test_a_stopped_run_goes_on_to_the_same_result(tokens, tmp_path, codes):
    whole = healed(tokens, "W2A16-g32", codes=codes)
    path = tmp_path / "state.npz"

    def stop(done, steps, note):
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        healed(tokens, "W2A16-g32", codes=codes, state=path, progress=stop)
    seen = []
    again = healed(
        tokens, "W2A16-g32", codes=codes, state=path, progress=lambda *news: seen.append(news[0])
    )
    assert seen == [8, 9, 10, 11, 12]
    assert again.losses == whole.losses
    assert again.held_out == whole.held_out
    for a, b in zip(jax.tree.leaves(again.model), jax.tree.leaves(whole.model), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    with pytest.raises(ValueError, match="another run of fdq.heal .seed=0 there, 1 here"):
        healed(tokens, "W2A16-g32", codes=codes, state=path, seed=1)
    with pytest.raises(ValueError, match="another run of fdq.heal .teacher="):
        model = fdq.quantize(Model(), "W2A16-g32")
        settings = {"batch_size": 4, "every": 6, "steps": 12, "codes": codes, "state": path}
        fdq.heal(model, Model(seed=1), tokens, **settings)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="no state of fdq.heal, or damaged"):
        healed(tokens, "W2A16-g32", codes=codes, state=path)


def test_what_cannot_be_healed_is_refused(tokens):
    with pytest.raises(ValueError, match="too few for batch_size=4"):
        healed(tokens[:3], "W2A16-g32")
    with pytest.raises(ValueError, match=r"unknown kinds \['norm'\]"):
        healed(tokens, "W2A16-g32", tuned=["norm"])
    with pytest.raises(ValueError, match="no quantized weights"):
        fdq.heal(Model(), Model(), tokens)
    with pytest.raises(ValueError, match="not chosen one by one"):
        healed(tokens, "WT2A16", codes="free")
    with pytest.raises(ValueError, match="expected tokens .N, L. of integers"):
        healed(tokens * 1.0, "W2A16-g32")


class Narrow(nnx.Module):
    """One layer, of which little is to be compiled."""

    def __init__(self):
        self.up = nn.Linear(32, 32, rngs=nnx.Rngs(0))

    def __call__(self, tokens):
        return self.up(jax.nn.one_hot(tokens, 32))


def test_a_teacher_that_says_nan_is_told(tokens, tmp_path, monkeypatch):
    teacher, model = Narrow(), fdq.quantize(Narrow(), "W8A16")
    teacher.up.kernel.set_value(teacher.up.kernel[...].at[0].set(jnp.nan))
    state = tmp_path / "state.npz"
    with pytest.raises(ValueError, match="the KL on held-out rows of step 0 is nan"):
        fdq.heal(model, teacher, tokens, batch_size=4, state=state)
    assert not state.exists()
    for rate in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="expected a positive learning_rate"):
            fdq.heal(model, Narrow(), tokens, batch_size=4, learning_rate=rate)
    monkeypatch.setitem(sys.modules, "optax", None)
    with pytest.raises(ModuleNotFoundError, match="needs optax: pip install") as caught:
        fdq.heal(model, Narrow(), tokens)
    assert caught.value.name == "optax"


def test_damaged_states_are_named(tmp_path):
    path, settings = tmp_path / "state.npz", {"seed": 0}
    a = np.arange(4, dtype=np.float32)
    state_file.write(path, {"settings": settings, "losses": [1.0]}, [a])
    header, arrays = state_file.read(path, [a], settings)
    assert header["losses"] == [1.0]
    np.testing.assert_array_equal(arrays[0], a)
    reached = _Reached({"x": a}, (), {}, [], [])
    with pytest.raises(ValueError, match="state.npz: no state of fdq.heal, or damaged"):
        _Reached.read(path, settings, reached)  # without held_out
    for text in (b"[1]", b"7", b"{", b'"settings"'):
        np.savez(path, header=np.frombuffer(text, np.uint8))
        with pytest.raises(ValueError, match="state.npz: no state of fdq.heal, or damaged"):
            state_file.read(path, [a], settings)
    _Reached({"x": a + np.inf}, (), {}, [1.0], []).write(tmp_path / "none.npz", settings)
    assert not (tmp_path / "none.npz").exists()


def test_codes_of_wint2_that_have_no_derivative_stay():
    knobs = Knobs.of(fdq.quantize(Model(), "WINT2"), free=False)
    names = {name.rpartition(".")[2] for name in knobs.starts}
    assert "super_scale" in names
    assert not names & {"code_scale", "code_offset"}


@pytest.mark.slow
@pytest.mark.longest
def test_the_curve_is_a_picture(tokens, tmp_path):
    result = healed(tokens, "W2A16-g32", steps=3)
    result.plot(tmp_path / "curve.svg")
    text = (tmp_path / "curve.svg").read_text()
    assert text.startswith("<svg")
    assert "held out" in text
    assert f"{result.before:.4g}" in text
