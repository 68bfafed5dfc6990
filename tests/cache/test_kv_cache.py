"""The KV cache: what is written is read back, in place, in every format."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fdq.cache import KVCache, LayerScales, abstract_scales, parse_format
from fdq.ops.rope_append.xla import write_slots
from fdq.schemes.scheme import CacheSpec

HEADS, DIM, SLOTS = 2, 8, 12
CONFIG = types.SimpleNamespace(num_layers=2, num_kv_heads=HEADS, head_dim=DIM, dtype="float32")
SPECS = {
    "C16": None,
    "C8": CacheSpec.parse("C8"),
    "Cfp8": CacheSpec.parse("Cfp8"),
    "C4": CacheSpec.parse("C4"),
    "C8-kvchannel": CacheSpec(format="int8", granularity="channel", dynamic=False),
    "Cfp8-kvhead": CacheSpec(format="float8_e4m3", granularity="head", dynamic=False),
    "C4-kvchannel": CacheSpec(format="int4", granularity="channel", dynamic=False, zero_point=True),
}
# Relative to the largest value of what shares a scale: half a step of the format.
TOLERANCE = {None: 0.0, "int8": 0.51 / 127, "float8_e4m3": 1 / 16, "int4": 0.51 / 15 * 2}


def make(name, batch=1, slots=SLOTS, **options):
    spec, scales = SPECS[name], None
    if spec is not None and not spec.dynamic:
        width = DIM if spec.granularity == "channel" else 1
        one = np.full(
            (HEADS, width), 4.0 / {"int8": 127, "float8_e4m3": 448, "int4": 7.5}[spec.format]
        )
        zero = np.full((HEADS, width), 8, np.uint8) if spec.zero_point else None
        scales = [LayerScales(k=one, v=one, k_zero=zero, v_zero=zero)] * 2
    return KVCache.init(CONFIG, batch, slots, spec, scales=scales, **options)


@functools.partial(jax.jit, donate_argnums=0)
def write(cache, k, v, start):
    """Two keys and values of the second layer."""
    first, (keys, values) = cache.layers
    pair = type(first)(write_slots(keys, k, start), write_slots(values, v, start))
    return KVCache((first, pair), cache.length)


@pytest.mark.parametrize("name", SPECS)
def test_written_is_read_back(name, rng):
    """Two writes at different slots of each of three sequences; the rest stays as it was."""
    k, v = np.clip(rng.standard_normal((2, 3, 2, HEADS, DIM)), -3.9, 3.9).astype(np.float32)
    start = np.array([0, 7, SLOTS - 2], np.int32)
    cache = write(make(name, batch=3), k, v, start)
    spec = SPECS[name]
    bound = TOLERANCE[spec.format if spec else None] * 4.0
    for written, fresh, x in zip(cache.layers[1], cache.layers[0], (k, v), strict=True):
        assert written.shape == (3, HEADS, SLOTS, DIM)
        stored = np.asarray(written.dequantize())
        for row, first in enumerate(start):
            np.testing.assert_allclose(
                stored[row, :, first : first + 2], x[row].swapaxes(0, 1), atol=bound, rtol=0
            )
            untouched = np.delete(np.asarray(written.codes[row]), [first, first + 1], 1)
            assert not untouched.any()
        assert not np.asarray(fresh.codes).any()
    assert cache.length.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", SPECS)
def test_scalar_start_is_the_same_slot_for_all(name, rng):
    k, v = rng.standard_normal((2, 3, 2, HEADS, DIM)).astype(np.float32)
    one = write(make(name, batch=3), k, v, np.int32(4))
    many = write(make(name, batch=3), k, v, np.full(3, 4, np.int32))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, many))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("batch", [1, 4])
def test_update_is_in_place(name, batch):
    """The output aliases the whole cache, and nothing as large as a layer is made on the way."""
    cache = jax.eval_shape(functools.partial(make, name, batch, 4096))
    new = jax.ShapeDtypeStruct((batch, 1, HEADS, DIM), jnp.float32)
    start = jax.ShapeDtypeStruct((batch,), jnp.int32)
    memory = write.lower(cache, new, new, start).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache.nbytes
    assert memory.temp_size_in_bytes < cache.nbytes / 50


@pytest.mark.parametrize(
    ("name", "bits"),
    [("C16", 32), ("C8", 8 + 32 / DIM), ("Cfp8", 8 + 32 / DIM), ("C4", 4 + 40 / DIM)],
)
def test_nbytes(name, bits):
    cache = make(name, batch=3)
    assert cache.nbytes == bits * 3 * SLOTS * HEADS * DIM * 2 * 2 / 8
    assert (cache.batch, cache.max_length, cache.num_layers) == (3, SLOTS, 2)
    abstract = jax.eval_shape(functools.partial(make, name, 3))
    assert abstract.nbytes == cache.nbytes


def test_static_scales_survive_the_cache():
    scale = jnp.ones((HEADS, 1))
    scales = [LayerScales(k=scale, v=scale)] * 2
    cache = KVCache.init(CONFIG, 1, SLOTS, "Cfp8-kvhead", scales=scales)
    new = np.zeros((1, 1, HEADS, DIM), np.float32)
    write(cache, new, new, np.int32(0))
    assert float(scale.sum()) == HEADS


def test_abstract_scales():
    spec = SPECS["C4-kvchannel"]
    (one, _) = abstract_scales(CONFIG, spec)
    cache = jax.eval_shape(functools.partial(make, "C4-kvchannel"))
    stored = cache.layers[0].k
    assert one.k.shape == stored.scale.shape and one.k_zero.dtype == stored.zero.dtype


def test_formats_by_name():
    assert parse_format("c8") == parse_format(CacheSpec(format="int8")) == SPECS["C8"]
    assert parse_format("C16") is None and parse_format(None) is None
    with pytest.raises(ValueError, match="C9"):
        parse_format("C9")


def test_wrong_scales():
    with pytest.raises(ValueError, match=r"needs scales: pass scales="):
        KVCache.init(CONFIG, 1, SLOTS, SPECS["C8-kvchannel"])
    scales = [LayerScales(k=np.ones((HEADS, 3)), v=np.ones((HEADS, 3)))] * 2
    with pytest.raises(ValueError, match=r"got shape \(2, 3\), expected \(2, 8\) or \(2, 1\)"):
        KVCache.init(CONFIG, 1, SLOTS, SPECS["C8-kvchannel"], scales=scales)
    scales = [LayerScales(k=np.ones((HEADS, DIM)), v=np.ones((HEADS, DIM)))] * 2
    with pytest.raises(ValueError, match="k_zero: got shape None"):
        KVCache.init(CONFIG, 1, SLOTS, SPECS["C4-kvchannel"], scales=scales)
    with pytest.raises(ValueError, match="computes its scales"):
        KVCache.init(CONFIG, 1, SLOTS, "C8", scales=scales)
    with pytest.raises(ValueError, match="scales of 1 layers, expected 2"):
        KVCache.init(CONFIG, 1, SLOTS, SPECS["C8-kvchannel"], scales=scales[:1])


@pytest.mark.parametrize("name", ["C16", "C4", "C8-kvchannel", "Cfp8-kvhead"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_what_belongs_to_keys_is_sharded_as_they_are(name, kind):
    mesh = jax.make_mesh((2, 2), ("data", "tp"), axis_types=(kind, kind))
    cache = make(name, batch=4, sharding=NamedSharding(mesh, PartitionSpec("data", "tp")))
    plain = make(name, batch=4)
    assert jax.tree.structure(cache) == jax.tree.structure(plain)
    tensor = cache.layers[1].v
    assert tuple(tensor.codes.sharding.spec)[:2] == ("data", "tp")
    assert tuple(cache.length.sharding.spec) == ("data",)
    if tensor.dynamic and tensor.scale is not None:
        assert tuple(tensor.scale.sharding.spec)[:2] == ("data", "tp")
    elif tensor.scale is not None:
        assert tuple(tensor.scale.sharding.spec)[:1] == ("tp",)
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_a_sharding_of_other_axes_is_refused():
    mesh = jax.make_mesh((2,), ("tp",))
    with pytest.raises(ValueError, match=r"NamedSharding of \[batch, kv_heads, slots, head_dim\]"):
        make("C8", sharding=NamedSharding(mesh, PartitionSpec(*[None] * 4, "tp")))


def filled(name, batch, rng, slots=SLOTS):
    """One of random keys and values, and these."""
    k, v = np.clip(rng.standard_normal((2, batch, 2, HEADS, DIM)), -3.9, 3.9).astype(np.float32)
    cache = make(name, batch, slots)
    layers = tuple(
        type(pair)(write_slots(pair.k, k + i, jnp.int32(0)), write_slots(pair.v, v, jnp.int32(0)))
        for i, pair in enumerate(cache.layers)
    )
    return KVCache(layers, jnp.arange(1, batch + 1, dtype=jnp.int32))


def read(cache):
    return [np.asarray(tensor.dequantize()) for layer in cache.layers for tensor in layer]


# The batch is that of the KV heads: what belongs to heads must not be taken for sequences.
@pytest.mark.parametrize("name", SPECS)
def test_rows_are_taken_and_repeated(name, rng):
    cache = filled(name, HEADS, rng)
    before = read(cache)
    for rows, taken in (
        ([1, 0], cache.take([1, 0])),
        ([1, 1, 0], jax.jit(lambda c, r: c.take(r))(cache, np.array([1, 1, 0]))),
        ([0, 0, 1, 1], cache.repeat(2)),
    ):
        assert taken.length.tolist() == [row + 1 for row in rows]
        for found, whole in zip(read(taken), before, strict=True):
            np.testing.assert_array_equal(found, whole[rows])
        assert jax.tree.structure(taken) == jax.tree.structure(cache)
    # Either may be donated: nothing is shared.
    mine = {a.unsafe_buffer_pointer() for a in jax.tree.leaves(cache)}
    for other in (cache.take([0, 1]), cache.insert(0, cache.take([1]))):
        assert not mine & {a.unsafe_buffer_pointer() for a in jax.tree.leaves(other)}


@pytest.mark.parametrize("name", SPECS)
def test_sequences_are_put_in_place_of_others(name, rng):
    cache, other = filled(name, 3, rng), filled(name, 2, rng, slots=5)
    put = cache.insert([2, 0], other)
    assert put.length.tolist() == [2, 2, 1]
    for found, whole, new in zip(read(put), read(cache), read(other), strict=True):
        np.testing.assert_array_equal(found[1], whole[1])
        np.testing.assert_array_equal(found[[2, 0], :, :5], new)


def test_what_cannot_be_put_in_place_is_named(rng):
    cache = filled("C8", 2, rng)
    for row, other, message in (
        (0, filled("C4", 1, rng), r"expected a C8 cache of 2 heads, int8 x 8, found a C4"),
        (0, filled("C8", 1, rng, slots=20), "at most 12 slots, found 2 layers, 20"),
        ([0, 1], filled("C8", 1, rng), "got 2 rows for a cache of 1 sequences"),
        (2, filled("C8", 1, rng), r"rows: expected 0 to 1, found \[?2"),
        (0.5, filled("C8", 1, rng), "rows: expected integers"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.insert(row, other)
    static = filled("C8-kvchannel", 2, rng)
    layers = tuple(
        type(pair)(*(t.replace(scale=t.scale * 2) for t in pair)) for pair in static.layers
    )
    with pytest.raises(ValueError, match="the static scale of the two caches differs"):
        static.insert(0, KVCache(layers, static.length).take([0]))


def test_rollback_of_a_cache(rng):
    cache = filled("C8", 3, rng)
    assert cache.rollback(2).length.tolist() == [1, 2, 2]
    assert cache.rollback(np.array([-1, 1, 9])).length.tolist() == [0, 1, 3]
