"""Sampling against its definition in NumPy, and against the frequencies of many draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdq.decoding.sampling import Sampling, candidates, sample

VOCAB = 12


def definition(logits, s):
    """Probability of each token: restrict one after the other, renormalize at the end."""
    scaled = logits.astype(np.float64) / s.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    allowed = set(order[: s.top_k] if s.top_k else order)
    if s.top_p is not None:
        kept = [t for t in order if t in allowed]
        total = sum(p[t] for t in kept)
        mass, nucleus = 0.0, []
        for token in kept:
            nucleus.append(token)
            mass += p[token] / total
            if mass >= s.top_p:
                break
        allowed &= set(nucleus)
    if s.min_p is not None:
        allowed &= {t for t in allowed if p[t] >= s.min_p * p.max()}
    q = np.array([p[t] if t in allowed else 0.0 for t in range(len(p))])
    return q / q.sum()


CASES = [
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(temperature=1.7, top_k=4),
    Sampling(top_k=1),
    Sampling(top_p=0.6),
    Sampling(top_p=1e-6),
    Sampling(min_p=0.2),
    Sampling(temperature=1.3, top_k=8, top_p=0.8, min_p=0.1),
    Sampling(top_k=1000),
]


@pytest.mark.parametrize("sampling", CASES, ids=repr)
def test_probabilities_are_those_of_the_definition(sampling, rng):
    for logits in rng.standard_normal((5, VOCAB)).astype(np.float32) * 2:
        tokens, scaled = candidates(jnp.asarray(logits), sampling)
        q = np.zeros(VOCAB)
        q[np.asarray(tokens)] = jax.nn.softmax(scaled)
        np.testing.assert_allclose(q, definition(logits, sampling), atol=1e-6)


def test_frequencies(rng):
    sampling = Sampling(temperature=0.8, top_k=5, top_p=0.9)
    logits = rng.standard_normal(VOCAB).astype(np.float32)
    n = 20000
    keys = jax.random.split(jax.random.key(3), n)
    drawn = sample(jnp.broadcast_to(logits, (n, VOCAB)), keys, sampling)
    assert drawn.dtype == jnp.int32
    frequencies = np.bincount(np.asarray(drawn), minlength=VOCAB) / n
    expected = definition(logits, sampling)
    assert (frequencies[expected == 0] == 0).all()
    np.testing.assert_allclose(frequencies, expected, atol=4 * 0.5 / n**0.5)


def test_a_row_draws_the_same_alone_and_in_a_batch(rng):
    logits = jnp.asarray(rng.standard_normal((6, VOCAB)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 6)
    together = sample(logits, keys, Sampling())
    alone = [sample(logits[i : i + 1], keys[i : i + 1], Sampling())[0] for i in range(6)]
    assert together.tolist() == [int(token) for token in alone]


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=0)])
def test_greedy(sampling, rng):
    logits = rng.standard_normal((3, VOCAB)).astype(np.float32)
    logits[1, 4] = logits[1, 7] = 9.0
    tokens = sample(jnp.asarray(logits), None, sampling)
    assert tokens.tolist() == logits.argmax(-1).tolist() and tokens[1] == 4


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-45])
def test_temperatures_near_zero_are_greedy(temperature, rng):
    logits = rng.standard_normal((3, VOCAB)).astype(np.float32) * 1e4
    keys = jax.random.split(jax.random.key(0), 3)
    tokens = sample(jnp.asarray(logits), keys, Sampling(temperature=temperature, top_p=0.9))
    assert tokens.tolist() == logits.argmax(-1).tolist()


def test_random_draws_need_keys(rng):
    with pytest.raises(ValueError, match="needs PRNG keys"):
        sample(jnp.zeros((1, VOCAB)), None, Sampling())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected 0 or more, found -1"),
        ({"temperature": float("nan")}, "temperature: expected 0 or more"),
        ({"top_k": 0}, "top_k: expected 1 or more, found 0"),
        ({"top_p": 0.0}, "top_p: expected above 0 and at most 1, found 0"),
        ({"min_p": 1.5}, "min_p: expected above 0 and at most 1, found 1.5"),
    ],
)
def test_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 2.5}, "top_k: expected an integer, found 2.5"),
        ({"top_k": "5"}, "top_k: expected an integer, found '5'"),
        ({"temperature": "0.7"}, "temperature: expected a number or an array of them, found '0.7'"),
        ({"temperature": None}, "temperature: expected a number or an array of them, found None"),
        ({"top_p": [0.9]}, r"top_p: expected a number or an array of them, found \[0.9\]"),
        ({"min_p": True}, "min_p: expected a number or an array of them, found True"),
    ],
)
def test_no_numbers(fields, message):
    with pytest.raises(TypeError, match=message):
        Sampling(**fields)


def test_numbers_of_numpy_are_numbers():
    assert Sampling(temperature=np.float32(0.5), top_k=np.int64(3)).top_k == 3


def test_arrays_say_a_value_a_sequence(rng):
    """Each row draws as it would with its own numbers; 0 is greedy among others that are not."""
    logits = jnp.asarray(rng.standard_normal((4, VOCAB)) * 2, jnp.float32)
    keys = jax.random.split(jax.random.key(1), 4)
    temperature, top_k = np.float32([0, 0.5, 1.0, 3.0]), np.int32([3, 5, 2, 12])
    together = sample(logits, keys, Sampling(temperature=temperature, top_k=top_k, top_p=0.9))
    for i in range(4):
        own = Sampling(temperature=float(temperature[i]), top_k=int(top_k[i]), top_p=0.9)
        assert together[i] == sample(logits[i : i + 1], keys[i : i + 1], own)[0]
    assert together[0] == logits[0].argmax()


def test_another_number_compiles_nothing(rng):
    logits = jnp.asarray(rng.standard_normal((2, VOCAB)), jnp.float32)
    keys = jax.random.split(jax.random.key(1), 2)
    run = jax.jit(sample)
    for sampling in (
        Sampling(temperature=0.7, top_k=5, top_p=0.9),
        Sampling(temperature=1.3, top_k=8, top_p=0.5),
    ):
        assert (run(logits, keys, sampling) == sample(logits, keys, sampling)).all()
    assert run._cache_size() == 1
    # Traced as well, also where nothing is known of it.
    traced = jax.jit(lambda t, k: sample(logits, keys, Sampling(temperature=t, top_k=k)))
    expected = sample(logits, keys, Sampling(temperature=0.8, top_k=3))
    assert (traced(0.8, 3) == expected).all()


def test_numbers_that_a_tree_operation_changed_are_looked_at(rng):
    logits = jnp.asarray(rng.standard_normal((200, VOCAB)), jnp.float32)
    keys = jax.random.split(jax.random.key(1), 200)
    wider = jax.tree.map(lambda k: k * 4, Sampling(temperature=0.25, top_k=2))
    assert wider.top_k == 8 and wider.temperature == 1
    expected = sample(logits, keys, Sampling(top_k=8))
    assert (sample(logits, keys, wider) == expected).all()
    half = Sampling(temperature=jnp.full(200, 1.0, jnp.bfloat16), top_k=8)
    assert (sample(logits, keys, half) == expected).all()


def test_arrays_of_another_batch_are_refused():
    sampling = Sampling(temperature=np.ones(3, np.float32))
    with pytest.raises(ValueError, match=r"temperature: expected one number or \[2\]"):
        sample(jnp.zeros((2, VOCAB)), jax.random.split(jax.random.key(0), 2), sampling)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"temperature": np.float32([1, -1])}, ValueError, "temperature: expected 0 or more"),
        ({"top_k": np.float32([1, 2])}, TypeError, "top_k: expected integers, found float32"),
        ({"top_p": jnp.float32([0.5, 0.0])}, ValueError, "top_p: expected above 0"),
        ({"min_p": np.array(["a"])}, TypeError, "min_p: expected a number"),
    ],
)
def test_arrays_out_of_range(fields, error, message):
    with pytest.raises(error, match=message):
        Sampling(**fields)
