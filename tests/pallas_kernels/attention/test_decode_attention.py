"""Decode attention in the interpreter, on CUDA cores and on (emulated) tensor cores."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from covering import covering, slow

import fdq
from fdq.cache import CacheTensor, quantize_cache
from fdq.ops.kernels import kernel_arrays
from fdq.schemes.scheme import CacheSpec
from pallas_kernels.attention import parts
from pallas_kernels.attention.cuda_cores import heads_per_program
from pallas_kernels.attention.decode_attention import decode_attention, decode_attention_reference
from pallas_kernels.attention.parts import choose_parts, exponent
from pallas_kernels.cache.arrays import CacheArrays
from pallas_kernels.mosaic.launch import launch

BOUND = 5e-6  # of the largest reference value
# Programs run once: compiling them is what takes time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

SPECS = {
    "bfloat16": None,
    "float16": None,
    "float32": None,
    "int8": CacheSpec(format="int8"),
    "float8": CacheSpec(format="float8_e4m3"),
    "int4": CacheSpec(format="int4", zero_point=True),
    "int8 channel": CacheSpec(format="int8", granularity="channel", dynamic=False),
    "float8 head": CacheSpec(format="float8_e4m3", granularity="head", dynamic=False),
    "int4 channel": CacheSpec(format="int4", granularity="channel", dynamic=False, zero_point=True),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a cache and queries are made from."""

    batch: int = 2
    kv_heads: int = 1
    group: int = 2
    slots: int = 150
    head_dim: int = 64


quantized = jax.jit(quantize_cache, static_argnums=1)


def make(rng, name, sizes):
    """Queries, keys and values."""
    spec = SPECS[name]
    d = sizes.head_dim
    shape = (sizes.batch, sizes.kv_heads, sizes.slots, d)
    q = rng.standard_normal((sizes.batch, sizes.kv_heads * sizes.group, d))
    sides = []
    for _ in "kv":
        x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
        if spec is None:
            sides.append(CacheArrays(x.astype(name)))
            continue
        static = {}
        if not spec.dynamic:
            spread = {"int8": 0.02, "float8_e4m3": 0.01, "int4": 0.3}[spec.format]
            scale = rng.uniform(0.5, 1.5, spec.static_shape(sizes.kv_heads, d)) * spread
            static["scale"] = jnp.asarray(scale, jnp.float32)
            if spec.zero_point:
                static["zero"] = jnp.asarray(rng.integers(5, 11, scale.shape), jnp.uint8)
        sides.append(kernel_arrays(quantized(x, spec, **static)))
    return jnp.asarray(q, jnp.float32), *sides


@functools.partial(jax.jit, static_argnames=("sliding_window", "scale"), compiler_options=QUICK)
def reference(q, k, v, lengths, **settings):
    return decode_attention_reference(q, k, v, lengths=lengths, **settings)


def check(rng, name, sizes, lengths, **options):
    arrays = make(rng, name, sizes)
    lengths = jnp.asarray(lengths, jnp.int32)
    run = jax.jit(functools.partial(decode_attention, **options), compiler_options=QUICK)
    out = run(*arrays, lengths=lengths)
    expected = reference(*arrays, lengths, sliding_window=options.get("sliding_window"))
    assert_close(out, expected, of_largest=BOUND, what=name)
    return out, arrays, lengths


# Formats, and with them groups, head dims, numbers of slots that fill no tile, and parts.
CUDA_CORES = {
    "bfloat16": (Sizes(group=1, slots=40, head_dim=128), 1),
    "float16": (Sizes(group=2, slots=33), 2),
    "float32": (Sizes(group=3, slots=21), 1),
    "int8": (Sizes(group=5, slots=70), 2),
    "float8": (Sizes(group=3, slots=20, head_dim=256), 1),
    "int4": (Sizes(group=2, slots=33, head_dim=128), 1),
    "int8 channel": (Sizes(group=16, slots=17), 1),
    "float8 head": (Sizes(group=7, slots=19), 1),
    "int4 channel": (Sizes(kv_heads=2, slots=31), 1),
}
TENSOR_CORES = {
    "bfloat16": (Sizes(group=4, slots=65, head_dim=128), 1),
    "float16": (Sizes(group=2, slots=100), 1),
    "int8": (Sizes(group=5, slots=150, head_dim=128), 2),
    "float8": (Sizes(group=8, slots=64), 1),
    "int4": (Sizes(group=12, slots=70), 1),
    "int8 channel": (Sizes(group=16, slots=90), 1),
    "float8 head": (Sizes(group=3, slots=64, head_dim=256), 1),
    "int4 channel": (Sizes(group=7, slots=70, head_dim=128), 1),
}


def _kinds(name):
    spec = SPECS[name]
    return (None,) if spec is None else (spec.format if spec.format == "int4" else "8 bits",)


@pytest.mark.parametrize("name", covering(CUDA_CORES, _kinds))
def test_formats_on_cuda_cores(rng, name):
    sizes, parts = CUDA_CORES[name]
    slots = sizes.slots
    out, arrays, lengths = check(rng, name, sizes, [slots, slots // 2], parts=parts)
    if name == "int4":
        q, *sides = arrays
        k, v = (CacheTensor(a.codes, a.scale, a.zero, SPECS[name]) for a in sides)
        xla = fdq.attention(q[:, None], k, v, lengths=lengths, implementation="xla")
        assert_close(out, xla[:, 0], of_largest=BOUND)


@pytest.mark.parametrize("name", covering(TENSOR_CORES, _kinds))
def test_formats_on_tensor_cores(rng, name):
    sizes, parts = TENSOR_CORES[name]
    slots = sizes.slots
    check(rng, name, sizes, [slots, slots // 2], parts=parts, tensor_cores=True)


def test_fewer_slots_than_a_tile(rng):
    check(rng, "int8", Sizes(group=1, slots=9), [9, 4], parts=1)


@pytest.mark.parametrize("tensor_cores", [slow(False), True])
def test_lengths_and_windows(rng, tensor_cores):
    out, *_ = check(
        rng,
        "int8",
        Sizes(batch=4, slots=170),
        [0, 1, 64, 170],
        parts=2,
        sliding_window=70,
        tensor_cores=tensor_cores,
    )
    assert not out[0].any()


@pytest.mark.parametrize("tensor_cores", [slow(False), True])
def test_what_counts(rng, tensor_cores):
    """Hidden slots do not, not even scales of zero as in a fresh cache; to the bit.

    Scales and zero points do: with those of other tokens the result is another.
    """
    q, *sides = make(rng, "int4", Sizes(slots=100))
    lengths = jnp.asarray([40, 90], jnp.int32)
    options = {"lengths": lengths, "parts": 1, "tensor_cores": tensor_cores}
    run = jax.jit(functools.partial(decode_attention, **options), compiler_options=QUICK)
    expected = reference(q, *sides, lengths)
    out = run(q, *sides)
    assert_close(out, expected, of_largest=BOUND)
    for side in range(2):
        for name in ("scale", "zero"):
            others = list(sides)
            shuffled = {name: getattr(sides[side], name)[:, :, ::-1]}
            others[side] = dataclasses.replace(sides[side], **shuffled)
            difference = np.abs(run(q, *others) - expected).max()
            assert difference > 100 * BOUND * np.abs(expected).max(), (side, name)
    hidden = jnp.arange(100)[None, None, :] >= lengths[:, None, None]

    def blank(a):
        mask = hidden if a.ndim == 3 else hidden[..., None]
        return jnp.where(mask, jnp.zeros((), a.dtype), a)

    np.testing.assert_array_equal(out, run(q, *jax.tree.map(blank, sides)))


@pytest.mark.parametrize("tensor_cores", [False, True])
def test_large_scores(rng, tensor_cores):
    """Probabilities of one slot alone, and scores far below zero."""
    q, k, v = make(rng, "bfloat16", Sizes(slots=70))
    q = q.astype(jnp.bfloat16)
    lengths = jnp.asarray([70, 39], jnp.int32)
    out = decode_attention(
        q, k, v, lengths=lengths, scale=-100.0, parts=1, tensor_cores=tensor_cores
    )
    assert_close(out, reference(q, k, v, lengths, scale=-100.0), of_largest=0.01)


@pytest.mark.parametrize(
    ("name", "size"),
    [("int8", 3e5), ("int4", 1e-6), slow("float16", 3e5), slow("int8 channel", 1e-6)],
)
def test_queries_beyond_float16_on_tensor_cores(rng, name, size):
    """Codes meet queries as float16, which ends at 65504 and has few bits below 2^-14."""
    q, k, v = make(rng, name, Sizes(slots=70))
    lengths = jnp.asarray([70, 39], jnp.int32)
    q = q * size
    scale = 0.5 / size
    out = decode_attention(q, k, v, lengths=lengths, parts=1, tensor_cores=True, scale=scale)
    assert_close(out, reference(q, k, v, lengths, scale=scale), of_largest=BOUND)


def test_values_with_a_scale_of_zero_on_tensor_cores(rng):
    q, k, v = make(rng, "int8", Sizes(slots=70))
    lengths = jnp.asarray([70, 39], jnp.int32)
    v = dataclasses.replace(v, scale=v.scale.at[:, :, 7:20].set(0))
    out = decode_attention(q, k, v, lengths=lengths, parts=1, tensor_cores=True)
    assert_close(out, reference(q, k, v, lengths), of_largest=BOUND)


@pytest.mark.slow
def test_vmap_and_gradient(rng):
    q, k, v = make(rng, "bfloat16", Sizes(slots=20))
    lengths = jnp.asarray([20, 7], jnp.int32)

    def run(q, k, v, lengths):
        return decode_attention(q, k, v, lengths=lengths, parts=1)

    stacked = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), (q, k, v, lengths))
    assert_close(jax.vmap(run)(*stacked), jax.vmap(reference)(*stacked), of_largest=BOUND)
    twice = jnp.stack([q, 2 * q])
    out = jax.vmap(run, (0, None, None, None))(twice, k, v, lengths)
    assert_close(out[1], reference(2 * q, k, v, lengths), of_largest=BOUND)
    plain = decode_attention_reference
    gradient = jax.grad(lambda *a: run(*a).sum())(q, k, v, lengths)
    expected = jax.grad(lambda *a, lengths: plain(*a, lengths=lengths).sum())(
        q, k, v, lengths=lengths
    )
    assert_close(gradient, expected, of_largest=BOUND)


def test_what_is_refused(rng):
    q, k, v = make(rng, "bfloat16", Sizes(slots=20))
    lengths = jnp.asarray([20, 7], jnp.int32)
    with pytest.raises(NotImplementedError, match="head_dim=32"):
        narrow = jax.tree.map(lambda a: a[..., :32], (q, k, v))
        decode_attention(*narrow, lengths=lengths)
    with pytest.raises(NotImplementedError, match="no tensor-core kernel"):
        decode_attention(q, k, v, lengths=lengths, tensor_cores=True)
    with pytest.raises(ValueError, match="k and v alike"):
        decode_attention(q, k, CacheArrays(v.codes[:, :, :10]), lengths=lengths)
    with pytest.raises(ValueError, match="both scales go with a quantized format"):
        decode_attention(q, dataclasses.replace(k, scale=jnp.ones((2, 1, 20))), v, lengths=lengths)
    codes = jnp.zeros(k.codes.shape, jnp.int8)
    one, two, three = (
        CacheArrays(codes, scale, format="int8")
        for scale in (jnp.ones((1, 64)), None, jnp.ones((2, 1, 19)))
    )
    with pytest.raises(ValueError, match=r"found k\.scale"):
        decode_attention(q, one, two, lengths=lengths)
    with pytest.raises(ValueError, match=r"\[B, KH, S\] = \[2, 1, 20\] or all"):
        decode_attention(q, three, one, lengths=lengths)
    with pytest.raises(ValueError, match="k and v alike"):
        decode_attention(q, one, k, lengths=lengths)
    with pytest.raises(ValueError, match=r"expected lengths int32 \[2\]"):
        decode_attention(q, k, v, lengths=lengths[:1])
    with pytest.raises(ValueError, match="sliding_window=0, expected 1 or more"):
        decode_attention(q, k, v, lengths=lengths, sliding_window=0)
    with pytest.raises(ValueError, match="float8_e4m3"):
        wrong = [dataclasses.replace(a, format="fp8") for a in (k, v)]
        decode_attention(q, *wrong, lengths=lengths)


def test_how_a_sequence_is_shared():
    assert [heads_per_program(g, 128) for g in (1, 4, 5, 7, 8, 12, 16)] == [1, 4, 3, 4, 4, 4, 4]
    assert heads_per_program(5, 256) == 2
    assert choose_parts(1, 100, 3) == 1
    assert choose_parts(1, 1024, 3) == 4  # no part below 256 slots
    assert choose_parts(12, 8192, 3) == 1  # the interpreter has 4 multiprocessors
    assert choose_parts(5, 8192, 3) == 2  # 10 of 12 places, and none of a second turn
    assert choose_parts(7, 8192, 3) == 6  # 42 of 48 places in four turns; 7 of 12 in one
    assert choose_parts(100, 8192, 2) == 1


def test_exponents_are_whole(rng):
    x = jnp.asarray([-1e30, -3.4, 0.0, 2.5, 1000.2], jnp.float32)
    np.testing.assert_array_equal(exponent(x), [-(2**20), -3, 0, 2, 1000])


@pytest.mark.parametrize("tensor_cores", [False, True])
def test_layers_alike_are_lowered_once(rng, monkeypatch, tensor_cores):
    """Lowering for a GPU takes seconds a launch: 32 layers must not pay it 32 times."""
    launches = []
    monkeypatch.setattr(parts, "launch", lambda *a, **k: launches.append(a) or launch(*a, **k))
    # A shape that no other test has, in one part: one launch.
    q, k, v = make(rng, "int8", Sizes(batch=3, slots=67, head_dim=128))
    lengths = jnp.asarray([67, 3, 40], jnp.int32)

    def layers(q, k, v, lengths):
        for _ in range(3):
            q = decode_attention(q, k, v, lengths=lengths, parts=1, tensor_cores=tensor_cores)
        return q

    jax.jit(layers).trace(q, k, v, lengths)
    assert len(launches) == 1
