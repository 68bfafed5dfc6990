"""Kernels on a mesh: each device prepares the weights that it has, and launches its own kernels."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fdq
from fdq.decoding.state import DecodeState
from fdq.formats.qtensor import materialize
from fdq.models import Decoder
from fdq.ops.prepared_weight import WordsWeight
from fdq.sharding import make_mesh, prepare
from pallas_kernels.device import default_device
from tests.covering import longest, slow
from tests.sharding.many_devices import config_of

ATTENTION = {"append_kernel": 1, "decode_attention_kernel": 1}
LAUNCHES = {
    "llama": {"matrix_vector_int4_g128_m1": 4, **ATTENTION},
    "qwen3_moe": {"matrix_vector_int4_g128_m1": 2, "gathered_int4_g128_m1": 2, **ATTENTION},
}


def launches(jaxpr, around=0):
    """Kernels of a jaxpr by name, and in how many `jax.shard_map`s each one is."""
    found = collections.Counter()
    for equation in jaxpr.eqns:
        kind, parameters = equation.primitive.name, equation.params
        if kind in ("mpmd_map", "core_map", "pallas_call"):
            found[str(parameters["name"]), around] += 1
        for value in parameters.values():
            for one in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(one, "jaxpr", one)
                if hasattr(inner, "eqns"):
                    found += launches(inner, around + (kind == "shard_map"))
    return found


def small(name, layers=1):
    """Four heads of 64 and 256 channels, which two devices divide: the interpreter is slow."""
    sizes = {"num_heads": 4, "head_dim": 64, "intermediate_size": 256, "num_layers": layers}
    config = config_of(name, **sizes)
    if config.moe is not None:
        moe = dataclasses.replace(config.moe, num_experts=4, intermediate_size=256)
        config = config.replace(moe=moe)
    return fdq.quantize(Decoder(config, rngs=nnx.Rngs(params=0)), "W4A16C8", method="absmax")


def start(model):
    """The state after the token 3."""
    cache = model.init_cache(1, 16)
    return DecodeState.start(jnp.asarray([[3]]), jnp.ones((1,), jnp.int32), cache)


@pytest.mark.parametrize("name", ["llama", slow("qwen3_moe")])
def test_each_of_two_devices_has_its_kernels(name, monkeypatch):
    """They are in the one `shard_map`, over words and a cache of the device's own."""
    monkeypatch.setenv("FDQ_IMPLEMENTATION", "mosaic_gpu")
    one = small(name)
    many = fdq.shard(one, make_mesh({"tensor": 2}))
    qkv = many.layers[0].self_attn.qkv_proj
    second = jax.tree.map(lambda a: a.addressable_shards[1].data, materialize(qkv.kernel))
    with pytest.raises(ValueError, match="the model is on a mesh"):
        fdq.prepare(many)
    prepare(many)
    # Made of the weight that the device has, as on one device.
    own = fdq.prepare(second)
    assert isinstance(qkv.kernel, WordsWeight) and isinstance(own, WordsWeight)
    for array, expected in zip(jax.tree.leaves(qkv.kernel), jax.tree.leaves(own), strict=True):
        np.testing.assert_array_equal(array.addressable_shards[1].data, expected)
    state = start(many)
    codes = state.cache.layers[0].k.codes
    assert {shard.data.shape for shard in codes.addressable_shards} == {(1, 1, 16, 64)}
    step, params = fdq.functional(many)
    expected = {(kernel, 1): count for kernel, count in LAUNCHES[name].items()}
    assert launches(jax.make_jaxpr(step)(params, state).jaxpr) == expected
    back = fdq.unshard(many)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", longest("qwen3_moe")])
def test_kernels_on_two_devices_give_the_tokens_of_one(name, monkeypatch):
    """Two steps, so that the second reads what the first appended, against XLA on one device."""
    one = small(name)
    found = []
    for model in (one, fdq.shard(one, make_mesh({"tensor": 2}))):
        if model.placement is not None:
            monkeypatch.setenv("FDQ_IMPLEMENTATION", "mosaic_gpu")
            prepare(model)
        step, params = fdq.functional(model)
        state, run = start(model), jax.jit(step)
        for _ in range(2):
            logits, state = run(params, state)
            state = state.push(jnp.argmax(logits, axis=-1))
            found.append((np.asarray(logits), np.asarray(state.tokens[0, :3])))
    for (wanted, tokens), (logits, mine) in zip(found[:2], found[2:], strict=True):
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-4)
        np.testing.assert_array_equal(mine, tokens)


@pytest.mark.slow
@pytest.mark.longest
def test_decoded_experts_on_two_devices_are_those_of_one(monkeypatch):
    """A prompt of one token 70 times, for which the same experts are picked and others have no
    rows; the last layer's keys are of what they have added up to.
    """
    one = small("qwen3_moe", layers=2)  # the first has experts
    tokens = jnp.full((1, 70), 3, jnp.int32)
    found = []
    for model in (one, fdq.shard(one, make_mesh({"expert": 2}))):
        if model.placement is not None:
            monkeypatch.setenv("FDQ_IMPLEMENTATION", "decoded")
            prepare(model)
        state = fdq.prefill(model, tokens, model.init_cache(1, 80, "C16"))
        key = state.cache.layers[-1].k.codes[:, :, :70]
        found.append(np.asarray(key, np.float32))
    assert np.isfinite(found[1]).all()
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-3)


def test_a_trace_is_for_the_devices_of_its_mesh():
    """Not for the default one, where a mesh is of another kind of devices."""
    cpu = jax.devices("cpu")[0]
    assert default_device() is cpu
    other = type("Device", (), {"device_kind": "NVIDIA Test", "platform": "gpu"})()
    mesh = jax.sharding.AbstractMesh(
        (2,),
        ("tensor",),
        axis_types=(jax.sharding.AxisType.Auto,),
        abstract_device=jax.sharding.AbstractDevice(cpu.device_kind, None, "cpu"),
    )
    with jax.sharding.use_abstract_mesh(mesh), jax.default_device(other):
        assert default_device() is cpu
