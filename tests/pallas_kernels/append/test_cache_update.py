"""The append kernel in the interpreter, against XLA's steps and against fdq's own cache."""

import dataclasses
import functools

import append_program
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from covering import covering

from fdq.cache import quantize_cache
from fdq.ops.rope_append.xla import apply_rotary
from fdq.schemes.scheme import CacheSpec
from pallas_kernels.aot.ahead_of_time import compile_for, unavailable
from pallas_kernels.append import cache_row
from pallas_kernels.append.cache_update import append, append_reference
from pallas_kernels.cache.arrays import CacheArrays
from pallas_kernels.cache.float8 import e4m3_bits
from pallas_kernels.cache.formats import CACHE_WORDS
from pallas_kernels.mosaic.launch import launch

# Programs run once: compiling them is what takes time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
HEADS, KV_HEADS, SLOTS, D = 3, 2, 20, 64
WIDTH = (HEADS + 2 * KV_HEADS) * D
SPECS = {
    "float": None,
    "int8": CacheSpec(format="int8"),
    "float8": CacheSpec(format="float8_e4m3"),
    "int4": CacheSpec(format="int4", zero_point=True),
    "int8 channel": CacheSpec(format="int8", granularity="channel", dynamic=False),
    "float8 head": CacheSpec(format="float8_e4m3", granularity="head", dynamic=False),
    "int4 channel": CacheSpec(format="int4", granularity="channel", dynamic=False, zero_point=True),
}


def make(rng, name, dtype, *, splits=None, batch=2):
    """Positional arguments of `append`."""
    spec = SPECS[name]
    words = CACHE_WORDS[None if spec is None else spec.format]
    shape = (batch, WIDTH) if splits is None else (splits, batch, WIDTH)
    qkv = rng.standard_normal(shape)
    qkv = jnp.asarray(qkv, jnp.float32 if splits else dtype)
    angle = rng.uniform(0, 6, (batch, D // 2))
    angles = [jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin)]
    slots = jnp.asarray(rng.permutation(SLOTS)[:batch], jnp.int32)
    codes = rng.integers(0, 9, (batch, KV_HEADS, SLOTS, D // words.packed))
    codes = jnp.asarray(codes, dtype if spec is None else words.dtypes[0])
    scale = zero = None
    if spec is not None:
        small = (batch, KV_HEADS, SLOTS) if spec.dynamic else spec.static_shape(KV_HEADS, D)
        spread = {"int8": 0.02, "float8_e4m3": 0.005, "int4": 0.3}[spec.format]
        scale = jnp.asarray(rng.uniform(0.5, 1.5, small) * spread, jnp.float32)
        zero = jnp.asarray(rng.integers(4, 12, small), jnp.uint8) if spec.zero_point else None
    side = CacheArrays(codes, scale, zero, words.format)
    return [qkv, *angles, slots, side, side]


def run(function, arguments, **options):
    run = functools.partial(function, heads=HEADS, **options)
    return jax.jit(run, compiler_options=QUICK)(*arguments)


def assert_equal(result, expected):
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    for (path, b), a in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(result), strict=True
    ):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))


@pytest.mark.parametrize(
    "name, interleaved",
    covering(
        [*((name, i % 2 == 0) for i, name in enumerate(SPECS)), ("int8", True), ("int4", False)],
        lambda values: (SPECS[values[0]] and SPECS[values[0]].format, values[1]),
    ),
)
def test_formats(rng, name, interleaved):
    """Codes, scales and queries are XLA's, bit for bit, and other slots stay as they are."""
    arguments = make(rng, name, jnp.bfloat16)
    result = run(append, arguments, interleaved=interleaved)
    assert_equal(result, run(append_reference, arguments, interleaved=interleaved))
    slots = np.asarray(arguments[3])
    olds, news = jax.tree.leaves(arguments[4:]), jax.tree.leaves(result[1:])
    for old, new in zip(olds, news, strict=True):
        if old.ndim < 3:
            np.testing.assert_array_equal(old, new)
            continue
        changed = (np.asarray(old) != np.asarray(new)).reshape(2, KV_HEADS, SLOTS, -1).any((1, 3))
        for b in range(2):
            assert changed[b, slots[b]]
            assert changed[b].sum() == 1


def test_norms_bias_and_partial_sums(rng):
    arguments = make(rng, "int4", jnp.bfloat16, splits=3)
    options = {
        "interleaved": False,
        "dtype": jnp.bfloat16,
        "bias": jnp.asarray(rng.standard_normal(WIDTH), jnp.bfloat16),
        "q_norm": jnp.asarray(rng.uniform(0.5, 1.5, D), jnp.bfloat16),
        "k_norm": jnp.asarray(rng.uniform(0.5, 1.5, D), jnp.bfloat16),
    }
    assert_equal(run(append, arguments, **options), run(append_reference, arguments, **options))


@pytest.mark.parametrize("name", ["int8", "int4 channel"])
def test_agrees_with_the_cache_of_fdq(rng, name):
    """The steps of `fdq.ops.rope_append` in XLA, one by one."""
    arguments = make(rng, name, jnp.bfloat16)
    result = run(append, arguments, interleaved=False)
    qkv, cos, sin, slots, side, _ = arguments
    spec = SPECS[name]
    x = qkv.reshape(2, 1, HEADS + 2 * KV_HEADS, D)
    q, k, v = jnp.split(x, (HEADS, HEADS + KV_HEADS), axis=2)
    angles = (cos[:, None], sin[:, None])
    rotate = jax.jit(functools.partial(apply_rotary, angles=angles, interleaved=False))
    np.testing.assert_array_equal(result.q, rotate(q)[:, 0])
    static = {} if spec.dynamic else {"scale": side.scale, "zero": side.zero}
    for stored, x in ((result.k, rotate(k)), (result.v, v)):
        expected = quantize_cache(jnp.swapaxes(x, 1, 2), spec, **static).codes
        for b in range(2):
            np.testing.assert_array_equal(stored.codes[b, :, slots[b]], expected[b, :, 0])


def test_slots_beyond_the_cache(rng):
    """As in XLA, the last one; a negative one is the first."""
    arguments = make(rng, "float", jnp.float32)
    arguments[3] = jnp.asarray([SLOTS + 5, -3], jnp.int32)
    result = run(append, arguments, interleaved=True)
    v = arguments[0].reshape(2, -1, D)[:, -KV_HEADS:]
    np.testing.assert_array_equal(result.v.codes[0, :, SLOTS - 1], v[0])
    np.testing.assert_array_equal(result.v.codes[1, :, 0], v[1])


def test_float32_activations(rng):
    """The rotation may differ by a bit there, and with it a scale."""
    arguments = make(rng, "int8", jnp.float32)
    result, expected = (run(f, arguments, interleaved=True) for f in (append, append_reference))
    assert_close(result.q, expected.q, of_largest=3e-7)
    assert_close(result.k.scale, expected.k.scale, of_largest=3e-7)
    np.testing.assert_array_equal(result.v.codes, expected.v.codes)
    np.testing.assert_array_equal(result.v.scale, expected.v.scale)


@pytest.mark.slow
def test_vmap(rng):
    one = make(rng, "int8", jnp.bfloat16)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), one)
    options = {"heads": HEADS, "interleaved": True}
    result = jax.vmap(functools.partial(append, **options))(*stacked)
    expected = jax.vmap(functools.partial(append_reference, **options))(*stacked)
    assert_equal(result, expected)


@pytest.mark.slow
@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
@pytest.mark.parametrize("cache_format, gpu", [("int8", "t4"), ("int4", "h200"), (None, "l4")])
def test_a_donated_cache_is_written_in_place(cache_format, gpu):
    function = append_program.append_in_a_loop
    arguments = append_program.arguments(cache_format)
    report = compile_for(function, arguments, gpu, donate=(0,))
    assert report.problems() == []
    caches = sum(
        np.prod(a.shape) * np.dtype(a.dtype).itemsize for a in jax.tree.leaves(arguments[0])
    )
    assert report.alias_bytes == caches
    assert report.temp_bytes < caches / 20
    largest = max((copy.bytes for copy in report.copies), default=0)
    assert largest < caches / 20


def test_every_float8_code():
    """All values of float8_e4m3fn, their midpoints (ties to even) and a little beside them."""
    values = np.arange(127, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float32)
    middle = (values[1:] + values[:-1]) / 2
    x = np.concatenate([values, middle, middle * np.float32(1 + 2**-20), middle * 0.9999])
    x = jnp.asarray(np.concatenate([x, -x]), jnp.float32)
    expected = jax.lax.bitcast_convert_type(x.astype(jnp.float8_e4m3fn), jnp.uint8)
    np.testing.assert_array_equal(e4m3_bits(x), expected.astype(jnp.int32))


def test_slots_outside_of_the_cache(rng):
    arguments = make(rng, "float", jnp.float32)
    arguments[3] = jnp.asarray([-1, SLOTS + 5], jnp.int32)
    result = run(append, arguments, interleaved=True)
    assert_equal(result, run(append_reference, arguments, interleaved=True))


def test_layers_alike_are_lowered_once(rng, monkeypatch):
    """Lowering for a GPU takes seconds a launch: 32 layers must not pay it 32 times."""
    launches = []
    monkeypatch.setattr(cache_row, "launch", lambda *a, **k: launches.append(a) or launch(*a, **k))
    arguments = make(rng, "int8", jnp.float16, batch=3)  # a shape that no other test has

    def layers(qkv, cos, sin, slots, k, v):
        for _ in range(3):
            out = append(qkv, cos, sin, slots, k, v, heads=HEADS, interleaved=True)
            k, v = out.k, out.v
        return k, v

    jax.jit(layers).trace(*arguments)
    assert len(launches) == 1


def test_what_is_refused(rng):
    arguments = make(rng, "float", jnp.float32)
    plain = functools.partial(append, heads=HEADS, interleaved=True)
    with pytest.raises(NotImplementedError, match="no gradient"):
        jax.grad(lambda qkv: plain(qkv, *arguments[1:]).q.sum())(arguments[0])
    with pytest.raises(ValueError, match="partial sums of qkv need dtype"):
        run(append, [arguments[0][None], *arguments[1:]], interleaved=True)
    with pytest.raises(ValueError, match=r"int8 \[B, KH, S, 64\], found float32"):
        plain(*arguments[:4], *(dataclasses.replace(a, format="int8") for a in arguments[4:]))
    with pytest.raises(ValueError, match="both scales go with a quantized format"):
        scaled = dataclasses.replace(arguments[4], scale=jnp.ones((2, KV_HEADS, SLOTS)))
        plain(*arguments[:4], scaled, arguments[5])
    with pytest.raises(ValueError, match="q_norm and k_norm go together"):
        plain(*arguments, k_norm=jnp.ones((64,)))
    with pytest.raises(ValueError, match=r"expected cos \[2, 32\], found \[2, 64\]"):
        plain(arguments[0], jnp.ones((2, 64)), *arguments[2:])
    with pytest.raises(ValueError, match=r"expected slots \[2\], found \[1\]"):
        plain(*arguments[:3], jnp.zeros((1,), jnp.int32), *arguments[4:])
    with pytest.raises(ValueError, match="expected k and v alike"):
        plain(*arguments[:5], jax.tree.map(lambda a: a[:, :, :4], arguments[5]))
    with pytest.raises(ValueError, match="expected \\[2, "):
        run(append, [arguments[0][:, :-1], *arguments[1:]], interleaved=True)
    with pytest.raises(NotImplementedError, match="head_dim=32"):
        run(
            append,
            [*arguments[:4], *jax.tree.map(lambda a: a[..., :32], arguments[4:])],
            interleaved=True,
        )
