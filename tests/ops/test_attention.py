"""attention over a cache, quantized or not, against one softmax over the decoded cache."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdq
from fdq import ops
from fdq.cache import CacheTensor, quantize_cache
from fdq.schemes.scheme import CacheSpec
from tests.closeness import error
from tests.covering import covering

B, H, KH, S, D = 3, 4, 2, 37, 16
SPECS = {
    "C16": None,
    "int8": CacheSpec(format="int8"),
    "fp8": CacheSpec(format="float8_e4m3"),
    "int4": CacheSpec(format="int4", zero_point=True),
    "int8 channel": CacheSpec(format="int8", granularity="channel", dynamic=False),
    "fp8 head": CacheSpec(format="float8_e4m3", granularity="head", dynamic=False),
    "int4 static": CacheSpec(format="int4", granularity="channel", dynamic=False, zero_point=True),
}
# Largest error of one element, relative to the largest magnitude of its token and head.
STEPS = {"int8": 0.5 / 127, "float8_e4m3": 16 / 448, "int4": 0.5 / 7}


def quantized(rng, spec, slots=S):
    x = jnp.asarray(rng.standard_normal((B, KH, slots, D)), jnp.float32)
    scale = zero = None
    if spec is not None and not spec.dynamic:
        width = D if spec.granularity == "channel" else 1
        bound = {"int8": 127, "float8_e4m3": 448, "int4": 7}[spec.format]
        scale = jnp.asarray(rng.uniform(4, 5, (KH, width)) / bound, jnp.float32)
        if spec.zero_point:
            zero = jnp.asarray(rng.integers(7, 9, (KH, width)), jnp.uint8)
    return x, quantize_cache(x, spec, scale=scale, zero=zero)


@functools.cache
def compiled(window, block):
    return jax.jit(functools.partial(fdq.attention, sliding_window=window, block_size=block))


@pytest.mark.parametrize("name", SPECS)
def test_cache_codes(name, rng):
    spec = SPECS[name]
    x, tensor = quantized(rng, spec)
    back = np.asarray(tensor.dequantize())
    assert np.abs(back).max() > 1
    if spec is None:
        assert (back == np.asarray(x)).all()
        return
    assert tensor.shape == x.shape
    assert tensor.codes.shape == (B, KH, S, D // 2 if spec.format == "int4" else D)
    largest = np.abs(np.asarray(x)).max(-1, keepdims=True) if spec.dynamic else 5.0
    assert (np.abs(back - np.asarray(x)) <= 1.05 * STEPS[spec.format] * largest).all()


@pytest.mark.parametrize("name", SPECS)
def test_equals_the_reference(name, rng):
    """Sequences of different lengths, a chunk of three queries, 37 slots in blocks of 8."""
    spec = SPECS[name]
    (_, k), (_, v) = quantized(rng, spec), quantized(rng, spec)
    q = jnp.asarray(rng.standard_normal((B, 3, H, D)), jnp.float32)
    lengths = jnp.asarray([37, 5, 20], jnp.int32)
    for window in (None, 6) if name in ("C16", "int8") else (None,):
        y = compiled(window, 8)(q, k, v, lengths=lengths)
        reference = ops.attention_reference(q, k, v, lengths=lengths, sliding_window=window)
        assert error(y, reference) < 2e-6


@pytest.mark.parametrize(
    ("name", "program", "width"),
    covering(
        itertools.product(SPECS, ["decoded", "parts", "lanes"], [D, 20]),
        lambda case: [case[0], case[1:]],
    ),
)
def test_every_program_means_the_same(name, program, width, rng):
    """Whichever the CPU is given: blocks of 16 and, where the cache is shorter, of 37 slots."""
    spec = SPECS[name]
    if spec is not None and not spec.dynamic and width != D:
        pytest.skip("static scales are made for D channels")
    k, v = (jnp.asarray(rng.standard_normal((B, KH, S, width)), jnp.float32) for _ in "kv")
    k, v = (quantized(rng, spec)[1] if width == D else quantize_cache(a, spec) for a in (k, v))
    q = jnp.asarray(rng.standard_normal((B, 1, H, width)), jnp.float32)
    lengths = jnp.asarray([37, 5, 20], jnp.int32)
    reference = ops.attention_reference(q, k, v, lengths=lengths)
    for block in (16, 512):
        with ops.forced_program(program, block):
            y = jax.jit(functools.partial(fdq.attention))(q, k, v, lengths=lengths)
        assert error(y, reference) < 2e-6


@pytest.mark.parametrize(
    ("name", "lengths"),
    covering(
        itertools.product(
            ["int8", "bfloat16", "int4", "C16", "int8 channel"],
            [[48, 5, 20], [21, 5, 9], [0, 0, 1]],
        ),
        lambda case: [case[0][:4], str(case[1])],
    ),
)
def test_a_cache_in_parts_is_read_whole_or_in_blocks(name, lengths, rng, monkeypatch):
    """As it is more than half full or less, in chunks of 8 slots, with and without a window."""
    monkeypatch.setattr("fdq.ops.attention.sides._CHUNK", 8)
    k, v = (quantized(rng, SPECS.get(name), 48)[1] for _ in "kv")
    if name == "bfloat16":
        k, v = (a.replace(codes=a.codes.astype(jnp.bfloat16)) for a in (k, v))
    q = jnp.asarray(rng.standard_normal((B, 2, H, D)), jnp.float32)
    lengths = jnp.asarray(lengths, jnp.int32)
    for window in (None, 6):
        attend = functools.partial(fdq.attention, sliding_window=window)
        with ops.forced_program("parts", 16):
            y = jax.jit(attend)(q, k, v, lengths=lengths)
        reference = ops.attention_reference(q, k, v, lengths=lengths, sliding_window=window)
        assert error(y, reference) < 3e-6


def test_parts_of_a_long_cache_do_not_overflow():
    """As many slots as 127 * 127 * slots is more than an int32, and nothing to cut them by."""
    slots = 2 * 131071
    v = quantize_cache(jnp.ones((1, 1, slots, 2), jnp.float32), SPECS["int8"])
    lengths = jnp.asarray([slots], jnp.int32)
    for size in (4096, 1 << 20):
        with ops.forced_program("parts", size):
            y = fdq.attention(jnp.zeros((1, 1, 2, 2)), v, v, lengths=lengths)
        np.testing.assert_allclose(y, 1.0, rtol=1e-5)


@pytest.mark.parametrize("name", ["C16", "int8", "int4"])
def test_the_derivative_by_queries_is_that_of_the_decoded_cache(name, rng):
    """Also where floats are taken apart, and rounded, to be multiplied."""
    (_, k), (_, v) = quantized(rng, SPECS[name]), quantized(rng, SPECS[name])
    q, dq = (jnp.asarray(rng.standard_normal((B, 1, H, D)), jnp.float32) for _ in "qd")
    lengths = jnp.asarray([37, 5, 20], jnp.int32)
    reference = functools.partial(ops.attention_reference, k=k, v=v, lengths=lengths)
    _, wanted = jax.jvp(reference, (q,), (dq,))
    for program in ("parts", "decoded"):
        with ops.forced_program(program, 16):
            _, found = jax.jvp(lambda q: fdq.attention(q, k, v, lengths=lengths), (q,), (dq,))
        assert error(found, wanted) < 1e-5


@pytest.mark.parametrize("shape", [(0, 1, 8), (2, 0, 8), (2, 1, 0)])
def test_nothing_to_attend_to(shape):
    batch, queries, slots = shape
    q, k = jnp.ones((batch, queries, H, D)), jnp.ones((batch, KH, slots, D))
    y = fdq.attention(q, k, k, lengths=jnp.zeros((batch,), jnp.int32))
    assert y.shape == q.shape and not y.any()


@pytest.mark.parametrize("program", ["parts", "decoded"])
def test_the_batch_of_an_export_may_be_a_symbol(program):
    (batch,) = jax.export.symbolic_shape("b")
    cache = CacheTensor.empty((1, KH, 1024, D), SPECS["int8"])
    cache = jax.tree.map(lambda a: jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype), cache)
    arguments = (
        jax.ShapeDtypeStruct((batch, 1, H, D), jnp.float32),
        cache,
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    )
    with ops.forced_program(program, 256):
        attend = jax.jit(lambda q, k, lengths: fdq.attention(q, k, k, lengths=lengths))
        assert jax.export.export(attend)(*arguments).out_avals[0].shape == (batch, 1, H, D)


@pytest.mark.parametrize("length", [1, 8, 9, 37])
def test_one_query(length, rng):
    """Decode, at lengths on and off a block's edge; slots beyond the length may hold anything."""
    (_, k), (_, v) = (quantized(rng, SPECS["int8"]) for _ in "kv")
    q = jnp.asarray(rng.standard_normal((B, 1, H, D)), jnp.float32)
    lengths = jnp.full((B,), length, jnp.int32)
    y = compiled(None, 8)(q, k, v, lengths=lengths)
    assert error(y, ops.attention_reference(q, k, v, lengths=lengths)) < 2e-6
    k = k.replace(codes=k.codes.at[:, :, length:].set(99))
    v = v.replace(codes=v.codes.at[:, :, length:].set(-99))
    assert (compiled(None, 8)(q, k, v, lengths=lengths) == y).all()


def test_queries_in_the_middle(rng):
    """offset says where the queries stand: later slots of the same cache are not seen."""
    _, tensor = quantized(rng, None)
    k = tensor.codes
    q = jnp.asarray(rng.standard_normal((B, 2, H, D)), jnp.bfloat16)
    offset = jnp.asarray([0, 4, 30], jnp.int32)
    y = fdq.attention(q, k, k, lengths=jnp.full((B,), S, jnp.int32), offset=offset, block_size=16)
    early = fdq.attention(q, k, k, lengths=offset + 2, block_size=64)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(y, np.float32), np.asarray(early, np.float32), rtol=1e-2, atol=1e-2
    )
    # The first query of the first sequence sees one slot: its value comes back.
    assert error(y[0, 0, 0].astype(jnp.float32), k[0, 0, 0]) < 1e-2


@pytest.mark.parametrize("name", ["C16", "int8", "int4"])
def test_memory_does_not_grow_with_the_cache(name):
    """A cache 16 times as long needs the same temporary memory, and is never copied."""
    spec = SPECS[name]
    temp = []
    for slots in (1024, 16384):
        make = functools.partial(CacheTensor.empty, (1, KH, slots, D), spec)
        k = jax.eval_shape(make)
        q = jax.ShapeDtypeStruct((1, 1, H, D), jnp.bfloat16)
        lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
        program = compiled(None, 256).lower(q, k, k, lengths=lengths)
        temp.append(program.compile().memory_analysis().temp_size_in_bytes)
    assert temp[1] <= temp[0] + 4096


def test_keys_and_values_may_differ_in_format(rng):
    (_, k), (_, v) = quantized(rng, SPECS["fp8 head"]), quantized(rng, SPECS["int4"])
    q = jnp.asarray(rng.standard_normal((B, 1, H, D)), jnp.float32)
    lengths = jnp.asarray([37, 5, 20], jnp.int32)
    y = compiled(None, 8)(q, k, v, lengths=lengths)
    assert error(y, ops.attention_reference(q, k, v, lengths=lengths)) < 2e-6


def test_bad_arguments(rng):
    _, k = quantized(rng, SPECS["int8"])
    q = jnp.zeros((B, 1, H, D))
    lengths = jnp.ones((B,), jnp.int32)
    with pytest.raises(ValueError, match=r"needs k and v \[B, KH, S, 16\]"):
        fdq.attention(q, k, jnp.zeros((B, KH, S, 8)), lengths=lengths)
    with pytest.raises(ValueError, match="sliding_window=0, expected 1 or more"):
        fdq.attention(q, k, k, lengths=lengths, sliding_window=0)
    with pytest.raises(ValueError, match="static int8 KV cache: expected a calibrated scale"):
        quantize_cache(jnp.zeros((1, 1, 1, 8)), SPECS["int8 channel"])
    with pytest.raises(ValueError, match="dynamic int8 KV cache: expected no scale"):
        quantize_cache(jnp.zeros((1, 1, 1, 8)), SPECS["int8"], scale=jnp.ones((1, 1)))
    with pytest.raises(ValueError, match="static int4 KV cache: expected zero points"):
        quantize_cache(jnp.zeros((1, 1, 1, 8)), SPECS["int4 static"], scale=jnp.ones((1, 1)))
