"""Latent attention: over a cache of latents, in every format, against its definition in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fdq
from fdq import nn
from fdq.analysis.planner import cache_bytes_per_token
from fdq.cache import KVCache, LayerScales
from fdq.calibration.observation import calibrate
from fdq.models import CONFIGS, Decoder
from fdq.ops.attention.joined import JoinedKeys
from tests.closeness import assert_close, error
from tests.covering import slow_but
from tests.models import oracles
from tests.models.emulation import array, norm, softmax, turns
from tests.ops.test_attention import SPECS, B, H, S, quantized

HIDDEN, HEADS, RANK, NOPE, ROPE, VALUE = 32, 4, 16, 12, 8, 10
CONFIG = oracles.oracle_config("deepseek_v3").replace(num_layers=1)


def layer(**changes):
    sizes = {"query_rank": 24, "rank": RANK, "nope_dim": NOPE, "rope_dim": ROPE, "value_dim": VALUE}
    return nn.LatentAttention(HIDDEN, HEADS, **{**sizes, **changes}, rngs=nnx.Rngs(params=3))


def rotated(y, turn):
    pairs = (y[..., ::2] + 1j * y[..., 1::2]) * turn[None, :, None]
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(y.shape)


def stored(module, x, turn):
    """Latents `[B, T, 1, RANK]` and rotated channels `[B, T, 1, ROPE]` of the rows x."""
    made = x @ array(module.kv_a_proj_with_mqa.kernel)
    latent, rope = made[..., None, :RANK], made[..., None, RANK:]
    return norm(module.kv_a_layernorm, latent), rotated(rope, turn)


def attended(module, x, turn, latent, rope):
    """What rows x, the last positions, attend to: keys and values of every head are made."""
    b, t, _ = x.shape
    if module.q_proj is None:
        latent_q = norm(module.q_a_layernorm, x @ array(module.q_a_proj.kernel))
        q = latent_q @ array(module.q_b_proj.kernel)
    else:
        q = x @ array(module.q_proj.kernel)
    q = q.reshape(b, t, HEADS, NOPE + ROPE)
    q = np.concatenate([q[..., :NOPE], rotated(q[..., NOPE:], turn)], axis=-1)
    made = (latent[:, :, 0] @ array(module.kv_b_proj.kernel)).reshape(b, -1, HEADS, NOPE + VALUE)
    k = np.concatenate([made[..., :NOPE], np.repeat(rope, HEADS, axis=2)], axis=-1)
    scores = np.einsum("bthd,bshd->bhts", q, k) * module.scale
    s = k.shape[1]
    visible = np.arange(s)[None] <= np.arange(s - t, s)[:, None]
    p = softmax(np.where(visible, scores, -np.inf))
    y = np.einsum("bhts,bshd->bthd", p, made[..., NOPE:])
    return y.reshape(b, t, -1) @ array(module.o_proj.kernel)


def angles(turn, b):
    one = np.broadcast_to(turn[None], (b, *turn.shape))
    return jnp.asarray(one.real, jnp.float32), jnp.asarray(one.imag, jnp.float32)


@jax.jit
def run(module, x, turn, cache, start):
    return module(x, turn, cache, start=start)


FORMATS = ("C16", "C8", "Cfp8", "C4", "C8-kvchannel", "C4-kvchannel")


@pytest.mark.parametrize("format", slow_but(("C16", "C8-kvchannel"), FORMATS))
def test_over_a_cache_it_is_what_the_stored_latents_make(format, rng):
    """Seven rows are written, then three: two sequences, of a quantized kernel but in C16."""
    module = layer(query_rank=None if format == "C16" else 24, scale=0.3)
    if format != "C16":
        module.kv_b_proj.kernel = fdq.quantize(array(module.kv_b_proj.kernel), "W4A16-g8")
    spec = fdq.cache.parse_format(format)
    scales = None
    if spec is not None and not spec.dynamic:
        high = {"int8": 127, "int4": 7.5}[spec.format]
        one = [np.full((1, width), 5 / high, np.float32) for width in (RANK, ROPE)]
        zero = [np.full((1, width), 8, np.uint8) for width in (RANK, ROPE)]
        zero = zero if spec.zero_point else [None, None]
        scales = [LayerScales(k=one[0], v=one[1], k_zero=zero[0], v_zero=zero[1])]
    cache = KVCache.init(CONFIG, 2, 16, spec, scales=scales).layers[0]
    x = rng.standard_normal((2, 10, HIDDEN))
    turn = turns(CONFIG, 10)
    for start, end in ((0, 7), (7, 10)):
        rows, turned = x[:, start:end], turn[start:end]
        y, cache = run(
            module, jnp.asarray(rows, jnp.float32), angles(turned, 2), cache, jnp.int32(start)
        )
        latent, rope = (np.asarray(side.dequantize(), np.float64)[:, 0, :end] for side in cache)
        wanted = attended(module, rows, turned, latent[:, :, None], rope[:, :, None])
        assert_close(y, wanted, of_largest=1e-5)
    # And what is stored is what it should be, to half a step of the format.
    step = {None: 1e-6, "int8": 0.02, "float8_e4m3": 0.07, "int4": 0.4}[spec and spec.format]
    for side, wanted in zip(cache, stored(module, x, turn), strict=True):
        found = np.asarray(side.dequantize())[:, 0, :10]
        assert error(found, wanted[:, :, 0]) < step


def test_without_a_cache_it_is_its_definition_and_has_derivatives(rng):
    module = layer()
    x, turn = rng.standard_normal((2, 6, HIDDEN)), turns(CONFIG, 6)
    wanted = attended(module, x, turn, *stored(module, x, turn))

    def total(module, x):
        y, cache = module(x, angles(turn, 2))
        assert cache is None
        return (y * y).sum(), y

    rows = jnp.asarray(x, jnp.float32)
    (_, y), slope = jax.jit(jax.value_and_grad(total, has_aux=True))(module, rows)
    assert_close(y, wanted, of_largest=1e-5)
    assert all(float(abs(one).max()) > 0 for one in jax.tree.leaves(slope))


class Adapted(nnx.Module):
    """Somebody's adapter around a projection: it has no kernel, and takes arrays."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x):
        return self.inner(x) + jnp.float32(0.25)


def test_a_module_of_somebody_elses_makes_keys_and_values(rng):
    module = layer()
    module.kv_b_proj = Adapted(module.kv_b_proj)
    x, turn = jnp.asarray(rng.standard_normal((2, 6, HIDDEN)), jnp.float32), turns(CONFIG, 6)
    cache = KVCache.init(CONFIG, 2, 9).layers[0]
    y, _ = run(module, x, angles(turn, 2), cache, jnp.int32(0))
    whole, _ = module(x, angles(turn, 2))
    assert_close(y, whole, of_largest=1e-5)


def test_a_cache_takes_what_latents_take():
    model, _ = oracles.oracle("deepseek_v3")
    a_token = {"C16": 4 * (RANK + ROPE), "C8": RANK + ROPE + 8, "C4": (RANK + ROPE) // 2 + 10}
    for format, size in a_token.items():
        cache = model.init_cache(2, 20, format)
        assert cache.nbytes == 3 * 2 * 20 * size
        assert [side.shape for side in cache.layers[0]] == [(2, 1, 20, RANK), (2, 1, 20, ROPE)]
    published = CONFIGS["deepseek-v3"]
    assert cache_bytes_per_token(published, None) == 61 * 2 * (512 + 64)
    assert cache_bytes_per_token(published, fdq.cache.parse_format("C8")) == 61 * (512 + 64 + 8)


def test_static_scales_come_from_calibration(rng):
    model = Decoder(CONFIG, rngs=nnx.Rngs(params=0))
    seen = calibrate(model, rng.integers(0, 96, (2, 12)))
    assert "layers.0.self_attn.kv_b_proj.kernel" in seen.absmax
    model.set_cache_scales(seen.cache_scales("C8-kvchannel"))
    cache = model.init_cache(1, 8, "C8-kvchannel")
    assert [side.scale.shape for side in cache.layers[0]] == [(1, RANK), (1, ROPE)]
    shapes = fdq.cache.abstract_scales(CONFIG, fdq.cache.parse_format("C4-kvchannel"))[0]
    assert (shapes.k.shape, shapes.v_zero.shape) == ((1, RANK), (1, ROPE))


@pytest.mark.slow
def test_latents_are_on_every_device_and_heads_may_be_sharded():
    model, expected = oracles.oracle("deepseek_v3")
    mesh = jax.make_mesh((2,), ("tp",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    heads = NamedSharding(mesh, PartitionSpec(None, "tp"))
    cache = model.init_cache(2, 32, "C8", sharding=heads)
    assert cache.layers[0].k.codes.sharding.is_fully_replicated

    def put(path, array):
        names = [str(getattr(key, "name", getattr(key, "key", key))) for key in path]
        spec = PartitionSpec(None, "tp") if {"q_b_proj", "kv_b_proj"} & set(names) else None
        spec = PartitionSpec("tp", None) if "o_proj" in names else spec
        return jax.device_put(array, NamedSharding(mesh, spec or PartitionSpec()))

    sharded = jax.tree_util.tree_map_with_path(put, model)
    assert len(sharded.layers[0].self_attn.kv_b_proj.kernel[...].sharding.device_set) == 2
    state = fdq.prefill(
        sharded, expected["prompt"], sharded.init_cache(2, 32, "C16", sharding=heads)
    )
    tokens = fdq.decode(sharded, state, steps=4).generated()
    assert tokens == expected["greedy"][:, :4].tolist()


@pytest.mark.parametrize("program", ["decoded", "parts", "lanes"])
@pytest.mark.parametrize("name", slow_but(("int8", "int4 static"), SPECS))
def test_joined_keys_are_read_by_every_program(name, program, rng):
    """A part of one format and a part of another's scales; the first is the values too."""
    _, latent = quantized(rng, SPECS[name])
    _, rope = quantized(rng, SPECS[name])
    keys = JoinedKeys((latent, rope))
    q = jnp.asarray(rng.standard_normal((B, 2, H, keys.shape[-1])), jnp.float32)
    lengths = jnp.asarray([S, 5, 20], jnp.int32)
    with fdq.ops.forced_program(program, 16):
        y = jax.jit(functools.partial(fdq.attention, scale=0.2))(q, keys, latent, lengths=lengths)
    reference = fdq.ops.attention_reference(q, keys, latent, lengths=lengths, scale=0.2)
    assert y.shape == (B, 2, H, latent.head_dim)
    assert error(y, reference) < 3e-6


def test_a_cache_needs_to_know_where_to_write():
    cache = KVCache.init(CONFIG, 1, 4).layers[0]
    with pytest.raises(ValueError, match="needs start, the first slot"):
        layer()(jnp.zeros((1, 1, HIDDEN)), angles(turns(CONFIG, 1), 1), cache)
