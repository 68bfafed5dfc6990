"""The best mixture for a size: solved as by trying all, met in bytes, better than one for all."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fdq
from fdq import nn
from fdq.analysis import sensitivity
from fdq.analysis.planner import weight_table
from fdq.analysis.sensitivity import Sensitivity, Unit

WIDTH, VOCABULARY = 64, 16
CANDIDATES = ("W2A16-g32", "W4A16-g32", "W8A16")


class Model(nnx.Module):
    """Of two layers the first is one that hardly counts."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH, rngs=rngs)
        self.idle = nn.Linear(WIDTH, WIDTH, rngs=rngs)
        self.busy = nn.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, tokens):
        x = 50 * self.embed_tokens(tokens, jnp.float32)
        return (0.01 * self.idle(x) + self.busy(x))[..., :VOCABULARY]


def random_units(rng, count, candidates, factor=1):
    sizes = factor * np.sort(rng.integers(100, 900, (count, candidates)), axis=1)
    kl = np.sort(rng.random((count, candidates)), axis=1)[:, ::-1]
    rows = zip(sizes.tolist(), kl.tolist(), strict=True)
    return tuple(
        Unit(pattern=f"layers.{i}.w", weights=1000, bytes=tuple(size), kl=tuple(loss))
        for i, (size, loss) in enumerate(rows)
    )


def test_no_other_choice_of_the_size_is_better(rng):
    for large in range(20):
        # Of the large ones several bytes share a bucket.
        units = random_units(rng, 5, 3, 10_000 if large % 2 else 1)
        found = Sensitivity(candidates=("W2", "W3", "W4"), units=units, rest=0)
        least = sum(unit.bytes[0] for unit in units)
        room = int(rng.integers(least, least + 2000 * (10_000 if large % 2 else 1)))
        chosen = found.chosen(nbytes=room)

        def size(choice, units=units):
            return sum(unit.bytes[c] for unit, c in zip(units, choice, strict=True))

        fitting = [c for c in itertools.product(range(3), repeat=5) if size(c) <= room]
        assert size(chosen) <= room
        assert found.kl_of(chosen) == pytest.approx(min(map(found.kl_of, fitting)))


def test_it_never_loses_to_one_scheme_for_all_of_exactly_its_size(rng):
    for _ in range(20):
        sizes = rng.integers(10**6, 10**7, (40, 1)) + rng.integers(0, 999, (40, 3)).cumsum(axis=1)
        kl = np.sort(rng.random((40, 3)), axis=1)[:, ::-1]
        units = tuple(
            Unit(pattern=f"w{i}", weights=10**7, bytes=tuple(size), kl=tuple(loss))
            for i, (size, loss) in enumerate(zip(sizes.tolist(), kl.tolist(), strict=True))
        )
        found = Sensitivity(candidates=("W2", "W3", "W4"), units=units, rest=0)
        for c in range(3):
            uniform = (c,) * 40
            room = sum(unit.bytes[c] for unit in units)
            assert found.kl_of(found.chosen(nbytes=room)) <= found.kl_of(uniform)


class Fragile(nnx.Module):
    """Whose logits are NaN unless its weights are what they were, if `is_fragile`."""

    def __init__(self):
        self.up = nn.Linear(32, 32, rngs=nnx.Rngs(0))
        self.layers = nnx.List([nn.Linear(32, 32, rngs=nnx.Rngs(i)) for i in (1, 2)])
        self.first = nnx.Param(self.up.kernel[...])

    def __call__(self, tokens):
        changed = jnp.abs(self.up.kernel[...] - self.first[...]).max()
        x = jax.nn.one_hot(tokens, 32)
        for layer in self.layers:
            x = layer(x)
        return self.up(x) + jnp.where(changed > 0, jnp.nan, 0.0)


def test_a_layer_that_quantizing_breaks_is_told_and_not_free(rng):
    tokens = rng.integers(32, size=(1, 4))
    with pytest.raises(ValueError, match=r"KL with up quantized is \[nan"):
        sensitivity.measure(Fragile(), tokens, candidates=["W4A16-g32", "W8A16"])


def test_bits_go_where_they_count(rng, tmp_path):
    model = Model()
    tokens = rng.integers(VOCABULARY, size=(2, 16))
    recipe = fdq.recommend(
        model, tokens, bits=3.6, candidates=CANDIDATES, plot=tmp_path / "bits.svg"
    )
    schemes = [str(recipe.scheme_for(f"{name}.kernel")) for name in ("idle", "busy")]
    assert schemes[0].startswith("W2")
    assert schemes[1].startswith("W4")
    table = weight_table(fdq.quantize(model, recipe))
    assert table.quantized_bits_per_weight <= 3.6
    text = (tmp_path / "bits.svg").read_text()
    assert "busy" in text
    for problem, arguments in {
        "are too few": {"bits": 2.0},
        "not both": {"bits": 3.0, "nbytes": 10_000},
        "found nan": {"bits": float("nan")},
        "found inf": {"bits": float("inf")},
        "the model .* bytes": {"nbytes": 10},
        "two candidates or more": {"candidates": ["W4A16"]},
    }.items():
        with pytest.raises(ValueError, match=problem):
            fdq.recommend(model, tokens, **{"candidates": CANDIDATES} | arguments)
    with pytest.raises(ValueError, match="expected tokens .N, L. of integers"):
        fdq.recommend(model, tokens[0])


@pytest.mark.slow
@pytest.mark.longest
@pytest.mark.parametrize("by", ["layer", "kind"])
def test_a_mixture_beats_the_uniform_scheme_of_its_size_on_the_shipped_model(by):
    from fdq.analysis import sample_text
    from fdq.analysis.shipped_model import shipped_model_path
    from fdq.decoding.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(shipped_model_path())
    model = fdq.load(shipped_model_path(), prepare=False)
    rows = sample_text.calibration_rows(lambda text: tokenizer.encode(text, bos=True), 4)
    text = sample_text.heldout_text(max_bytes=8192).text
    tokens = tokenizer.encode(text, bos=True)
    uniform = fdq.quantize(model, "W3A16")
    found = sensitivity.measure(model, rows, by=by)
    chosen = found.chosen(bits=weight_table(uniform).quantized_bits_per_weight)
    mixed = fdq.quantize(model, found.recipe_of(chosen))
    sizes = [weight_table(m).quantized_bits_per_weight for m in (mixed, uniform)]
    assert sizes[0] <= sizes[1]
    one, other = (
        fdq.evaluate(m, tokens, reference=model).kl_nats_per_token for m in (mixed, uniform)
    )
    assert one < 0.95 * other
