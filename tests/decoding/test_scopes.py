"""Profiles of decoding name layers and ops: scopes reach every instruction that takes time."""

import re

import jax
import jax.extend
import jax.numpy as jnp
import pytest

import fdq
import fdq.models
from fdq.cache.kv_cache import KVCache
from fdq.decoding.programs import decode as _decode
from fdq.decoding.programs import extend as _extend
from fdq.decoding.state import DecodeState
from fdq.nn import split
from tests.models import oracles

# Whatever costs time; the rest is fused into it.
HEAVY = r"dot_general|reduce\w*|scatter|gather|dynamic_update_slice|sort|top_k|exp|cos|rsqrt|while"
ATTENTION = ["qkv_proj/matmul", "qkv_proj/norm", "rope_append", "attention", "o_proj/matmul"]
DENSE = ["gate_up_proj/matmul", "down_proj/matmul", "down_proj/swiglu"]
MIXTURE = [
    "router/route",
    "experts/gate_up_proj/grouped_matmul",
    "experts/down_proj/grouped_matmul",
]


def program(name, scheme, *, prompt):
    """A decode loop, or the reading of a prompt, as it is traced; and its config."""
    config = oracles.oracle_config(name)
    model = fdq.models.abstract(config)
    template, params = split(fdq.quantize(model, scheme) if scheme else model)

    def start():
        cache = KVCache.init(config, 2, 32, "C8")
        return DecodeState.start(jnp.zeros((2, 1), jnp.int32), jnp.ones((2,), jnp.int32), cache)

    state = jax.eval_shape(start)
    if prompt:
        tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
        first = jax.ShapeDtypeStruct((), jnp.int32)
        traced = _extend.trace(template, params, tokens, state.cache, first)
    else:
        stops, sampling = jax.ShapeDtypeStruct((2, 1), jnp.int32), fdq.Sampling(top_k=4)
        sampling = sampling.for_batch(2)
        traced = _decode.trace(template, params, state, stops, sampling, steps=2)
    return traced, config


def named(jaxpr, outer=""):
    """Each primitive with its scopes, as XLA is told them."""
    for equation in jaxpr.eqns:
        name = f"{outer}/{equation.source_info.name_stack}"
        inner = jax.extend.core.jaxprs_in_params(equation.params)
        yield equation.primitive.name, name
        for one in inner:
            yield from named(one, name)


@pytest.mark.parametrize("prompt", [False, True], ids=["step", "prefill"])
@pytest.mark.parametrize(
    ("name", "scheme"), [("llama", "W4A16-g32"), ("llama", None), ("ernie4_5_moe", "W8A8")]
)
def test_heavy_instructions_name_layer_and_op(name, scheme, prompt):
    traced, config = program(name, scheme, prompt=prompt)
    found = set(named(traced.jaxpr.jaxpr))
    places = r"layers\.\d+/(self_attn|mlp)/\w+|embed_tokens|norm|lm_head|rotary_angles"
    places += r"|last_tokens|sampling|push"
    heavy = {scope for primitive, scope in found if re.fullmatch(HEAVY, primitive)}
    assert len(heavy) > 10
    assert [one for one in heavy if not re.search(rf"(^|/)({places})(/|$)", one)] == []
    everything = {scope for _, scope in found}
    for layer in range(config.num_layers):
        experts = config.moe is not None and layer in config.moe.layers
        scopes = [f"self_attn/{scope}" for scope in ATTENTION]
        scopes += [f"mlp/{scope}" for scope in (MIXTURE if experts else DENSE)]
        for scope in scopes:
            wanted = re.escape(f"layers.{layer}/{scope}").replace("/", "/(?:.*/)?") + "(?:/|$)"
            assert any(re.search(wanted, one) for one in everything), scope
    if not prompt:
        assert any("/sampling" in one for one in everything)
        assert any("/lm_head" in one for one in everything)
