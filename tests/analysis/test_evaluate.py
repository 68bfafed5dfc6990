"""`fdq.evaluate` against its definition in numpy, on models small enough to read."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx

from fdq.analysis.evaluation import Windows, evaluate, record_logits
from fdq.analysis.windows import check_tokenizers
from fdq.models import CONFIGS, Decoder

VOCAB = 11


class Bigram(nnx.Module):
    """Logits depend on the current token only, so that no window changes them."""

    def __init__(self, seed: int, vocab: int = VOCAB):
        self.table = nnx.Param(jax.random.normal(jax.random.key(seed), (vocab, vocab)))

    def __call__(self, tokens):
        return self.table[...][tokens]


@pytest.fixture(scope="module")
def decoder():
    config = CONFIGS["ernie-4.5-0.3b"].replace(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        dtype="float32",
    )
    return Decoder(config, rngs=nnx.Rngs(params=0))


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_figures_equal_their_definitions(rng):
    model, reference = Bigram(0), Bigram(1)
    tokens = rng.integers(0, VOCAB, 37)
    report = evaluate(
        model, tokens, reference=reference, text_bytes=100, window=8, stride=3, batch=4
    )
    log_q, log_p = (
        log_softmax(np.asarray(m.table[...], np.float64)[tokens[:-1]]) for m in (model, reference)
    )
    nats = -log_q[np.arange(36), tokens[1:]]
    assert report.tokens == 36
    assert report.nats_per_token == pytest.approx(nats.mean(), rel=1e-5)
    assert report.perplexity == pytest.approx(math.exp(nats.mean()), rel=1e-5)
    assert report.bits_per_byte == pytest.approx(nats.sum() / math.log(2) / 100, rel=1e-5)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    assert report.kl_nats_per_token == pytest.approx(kl, rel=1e-4)
    agree = (log_p.argmax(-1) == log_q.argmax(-1)).mean()
    assert report.top1_agreement == pytest.approx(agree)
    assert 0 < agree < 1
    assert report.weight_bytes == VOCAB * VOCAB * 4
    assert (report.bits_per_weight, report.quantized_bits_per_weight) == (32, None)
    others = -log_p[np.arange(36), tokens[1:]]
    assert report.reference_bits_per_byte == pytest.approx(others.sum() / np.log(2) / 100, rel=1e-5)


def test_a_model_has_no_distance_from_itself(rng):
    model = Bigram(0)
    report = evaluate(model, rng.integers(0, VOCAB, 20), reference=model, window=8)
    assert report.kl_nats_per_token == pytest.approx(0, abs=1e-6)
    assert report.top1_agreement == 1


@pytest.mark.parametrize(
    ("length", "window", "stride", "batch"),
    [(2, 1, 1, 3), (9, 8, 8, 1), (10, 8, 4, 3), (37, 8, 3, 4), (40, 8, 8, 2), (41, 13, 5, 64)],
)
def test_windows_score_each_token_once_with_its_context(length, window, stride, batch):
    tokens = np.arange(length, dtype=np.int32)
    scored = []
    cut = Windows(tokens=tokens, window=window, stride=stride, batch=batch)
    for inputs, targets, mask in cut.batches():
        assert inputs.shape == targets.shape == mask.shape == (batch, window)
        np.testing.assert_array_equal(inputs + 1, targets)
        rows, columns = np.nonzero(mask)
        scored += targets[rows, columns].tolist()
        late = inputs[rows, 0] > 0  # not in the first window, whose context is what there is
        assert (columns[late] >= window - stride).all()
    assert scored == list(range(1, length))


def test_windows_change_nothing_where_context_does_not_matter(rng):
    model, tokens = Bigram(0), rng.integers(0, VOCAB, 50)
    values = [
        evaluate(model, tokens, window=w, stride=s, batch=b).nats_per_token
        for w, s, b in ((49, 49, 1), (8, 4, 2), (8, 1, 16))
    ]
    np.testing.assert_allclose(values, values[0], rtol=1e-5)


def test_recorded_reference_is_the_reference(rng):
    model, reference = Bigram(0), Bigram(1)
    tokens = rng.integers(0, VOCAB, 30)
    recorded = record_logits(reference, tokens, window=8, batch=4)
    direct = evaluate(model, tokens, reference=reference, window=8, batch=4)
    again = evaluate(model, tokens, reference=recorded, window=8)
    assert again.kl_nats_per_token == direct.kl_nats_per_token
    with pytest.raises(ValueError, match="Record it again"):
        evaluate(model, tokens[:-1], reference=recorded, window=8)
    with pytest.raises(ValueError, match="Record it again"):
        evaluate(model, tokens, reference=recorded, window=7)


def test_forbidden_tokens_of_the_reference_do_not_spoil_the_divergence(rng):
    forbid = jnp.full((1, 1, VOCAB), 0.0).at[..., 3].set(-jnp.inf)
    model = Bigram(0)
    tokens = rng.integers(0, VOCAB, 20)
    report = evaluate(model, tokens, reference=lambda t: model(t) + forbid, window=8)
    assert report.kl_nats_per_token is not None
    assert math.isfinite(report.kl_nats_per_token)


@pytest.mark.slow
def test_through_a_16_bit_cache_nothing_changes_and_through_8_bits_little(decoder, rng):
    tokens = rng.integers(0, 64, 40)
    plain = evaluate(decoder, tokens, reference=decoder, window=16, batch=2)
    cached = {
        name: evaluate(
            decoder,
            tokens,
            reference=decoder,
            window=16,
            batch=2,
            through_cache=True,
            cache=name,
        )
        for name in ("C16", "C8", "C4")
    }
    assert plain.cache is None
    assert cached["C16"].nats_per_token == pytest.approx(plain.nats_per_token, abs=1e-5)
    kl = {name: report.kl_nats_per_token for name, report in cached.items()}
    assert kl["C16"] < kl["C8"] < kl["C4"] / 10 < 0.01, kl
    heads, width, layers = 2, 16, 2
    assert cached["C16"].cache_bytes_per_token == 2 * layers * heads * width * 4  # float32
    assert cached["C8"].cache == "C8"
    assert cached["C8"].cache_bytes_per_token < cached["C16"].cache_bytes_per_token / 2


def test_report_prints_and_becomes_json(rng):
    report = evaluate(Bigram(0), rng.integers(0, VOCAB, 20), text_bytes=40)
    assert "bits per byte" in str(report)
    assert "KL" not in str(report)  # there was no reference
    assert json.loads(report.to_json())["tokens"] == 19


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([[1, 2]], {}, "vector of integers"),
        ([1.0, 2.0], {}, "vector of integers"),
        ([1], {}, "at least 2 tokens"),
        ([-1, 2], {}, "tokens run from -1"),
        ([1, 2], {"window": 0}, "`window`"),
        ([1, 2], {"window": 4, "stride": 5}, "`stride`"),
        ([1, 2], {"batch": 0}, "`batch`"),
        ([1, 2], {"cache": "C8"}, "through_cache"),
    ],
)
def test_bad_arguments_are_refused(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(Bigram(0), tokens, **options)


def test_models_that_cannot_be_compared_are_refused(decoder, rng):
    with pytest.raises(ValueError, match="vocab"):
        evaluate(Bigram(0), [1, 2, 3], reference=Bigram(1, vocab=12))
    with pytest.raises(ValueError, match="vocabulary is 0 to 63"):
        evaluate(decoder, [1, 64])
    with pytest.raises(TypeError, match=r"fdq\.models"):
        evaluate(Bigram(0), [1, 2, 3], through_cache=True)
    with pytest.raises(TypeError, match="callable"):
        evaluate(3, [1, 2, 3])


def test_windows_beyond_the_positions_of_the_model_warn(rng):
    model = Bigram(0)
    model.config = CONFIGS["llama-3-8b"].replace(vocab_size=VOCAB, max_position=4)
    tokens = rng.integers(0, VOCAB, 20)
    with pytest.warns(UserWarning, match="evaluate: 8 tokens are more than the 4 positions"):
        evaluate(model, tokens, window=8)
    evaluate(model, tokens, window=4)


def test_tokenizers_with_other_merges_are_refused_where_they_cut_the_text_differently(tmp_path):
    vocab = {"a": 0, "b": 1, "ab": 2, "ba": 3}
    for name, merge in (("one", ("a", "b")), ("other", ("b", "a"))):
        (tmp_path / name).mkdir()
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[merge]))
        backend.save(str(tmp_path / name / "tokenizer.json"))
    one, other = (str(tmp_path / name / "tokenizer.json") for name in ("one", "other"))
    check_tokenizers(one, other, np.array([0, 0, 0]))
    check_tokenizers(one, None, np.array([0, 2, 0]))
    with pytest.raises(ValueError, match="cut this text differently"):
        check_tokenizers(one, other, np.array([0, 2, 0]))
