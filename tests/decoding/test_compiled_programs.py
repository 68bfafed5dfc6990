"""Programs of decoding as they are compiled: without weights, without copies, in place."""

import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import fdq
import fdq.models
from fdq.cache.kv_cache import KVCache
from fdq.decoding.functional import functional
from fdq.decoding.loop import decode
from fdq.decoding.programs import decode as _decode
from fdq.decoding.programs import extend as _extend
from fdq.decoding.state import DecodeState
from fdq.nn import split
from tests.covering import longest, slow
from tests.models import oracles

ORACLE = "qwen3"
CONFIG = oracles.oracle_config(ORACLE)


def abstract_state(batch, slots, format, config=CONFIG):
    def init():
        cache = KVCache.init(config, batch, slots, format)
        first = jnp.zeros((batch, 1), jnp.int32)
        return DecodeState.start(first, jnp.ones((batch,), jnp.int32), cache)

    return jax.eval_shape(init)


def constants(jaxpr):
    """Elements of all constants of a closed jaxpr and those inside of it."""
    inner = jax.tree.leaves(
        [list(equation.params.values()) for equation in jaxpr.eqns],
        is_leaf=lambda p: isinstance(p, jax.extend.core.ClosedJaxpr),
    )
    inner = [p for p in inner if isinstance(p, jax.extend.core.ClosedJaxpr)]
    return sum(map(np.size, jaxpr.consts)) + sum(map(constants, inner))


@pytest.mark.parametrize("scheme", [None, "W8A8", "W4A16-g32"])
def test_weights_are_no_constants(scheme):
    """Of a step, and of the whole loop with a model as the argument of the user's jit."""
    model = oracles.oracle(ORACLE)[0]
    if scheme:
        model = fdq.quantize(fdq.models.abstract(CONFIG), scheme)
    step, params = functional(model)
    state = abstract_state(2, 48, "C8")
    loop = jax.make_jaxpr(lambda model, state: decode(model, state, 2))
    for jaxpr in (jax.make_jaxpr(step)(params, state), loop(model, state)):
        # What is left: the rotation's frequencies, masks and numbers.
        assert constants(jaxpr) < 100
    held = jax.make_jaxpr(lambda: jnp.arange(8.0) @ jnp.asarray(np.ones((8, 32))))()
    assert constants(held) >= 256


@pytest.fixture
def cpu(request, monkeypatch):
    """The class of CPUs that programs are compiled for, those of other tests forgotten."""
    monkeypatch.setattr("fdq.ops.choice.cpu_class", lambda: request.param)
    for program in (_decode, _extend):
        program.clear_cache()
    yield request.param
    for program in (_decode, _extend):
        program.clear_cache()


@pytest.mark.parametrize("cpu", ["avx2", "amx"], indirect=True)
@pytest.mark.parametrize(
    ("format", "batch", "inner"),
    [longest("C16", 1, False), ("C8", 3, False), slow("C8", 3, True), longest("C4", 1, False)],
)
def test_the_loop_works_in_the_donated_cache(format, batch, inner, cpu):
    """Nothing as large as the cache is copied; the cache comes back where it was.

    No temporary grows with the slots, but for scores of a whole cache where it is read as one.
    """
    config = CONFIG.replace(num_layers=1)
    template, params = split(fdq.models.abstract(config))
    stops = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    temporary = {}
    for slots in (1024, 16384):  # more than a block of attention
        state = abstract_state(batch, slots, format, config)
        arguments = (template, params, state, stops)
        if inner:
            count = jax.ShapeDtypeStruct((), jnp.int32)
            lowered = _decode.lower(*arguments, None, None, count, a_trip=16)
        else:
            lowered = _decode.lower(*arguments, steps=2)
        compiled = lowered.compile()
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= state.cache.nbytes
        temporary[slots] = memory.temp_size_in_bytes
        if slots == 16384:
            assert memory.temp_size_in_bytes < max(state.cache.nbytes / 2, cpu == "amx" and 2**25)
            copies = re.findall(r"= \w+\[([\d,]*)\]\S* (?:copy|concatenate)\(", compiled.as_text())
            sizes = [int(np.prod([int(d) for d in shape.split(",") if d])) for shape in copies]
            values = batch * slots * CONFIG.num_kv_heads
            rows = 3 * CONFIG.num_heads // CONFIG.num_kv_heads if cpu == "amx" else 1
            assert max(sizes, default=0) <= values * rows < values * CONFIG.head_dim
    assert temporary[16384] < temporary[1024] + 64 * 1024 * batch or cpu == "amx"


@pytest.mark.parametrize("cpu", ["avx2", "amx"], indirect=True)
def test_prefill_works_in_the_donated_cache(cpu):
    template, params = split(fdq.models.abstract(CONFIG))
    cache = abstract_state(2, 8192, "C8").cache
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    position = jax.ShapeDtypeStruct((), jnp.int32)
    memory = _extend.lower(template, params, tokens, cache, position).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache.nbytes
    assert memory.temp_size_in_bytes < max(cache.nbytes / 3, cpu == "amx" and 2**25)


def test_dtypes_of_a_bfloat16_model():
    """Activations and cache take the model's dtype; logits and the router stay float32."""
    config = oracles.oracle_config("ernie4_5_moe").replace(dtype="bfloat16")
    step, params = functional(fdq.models.abstract(config))
    logits, state = jax.eval_shape(step, params, abstract_state(2, 16, "C16", config))
    assert logits.shape == (2, 96) and logits.dtype == jnp.float32
    assert state.cache.layers[1].v.codes.dtype == jnp.bfloat16
    mlp = params["layers"]["1"]["mlp"]
    assert mlp["router"]["kernel"].dtype == mlp["router"]["correction_bias"].dtype == jnp.float32
    assert mlp["experts"]["down_proj"]["kernel"].dtype == jnp.bfloat16


def mixture_of_experts(experts, scheme):
    """The compiled loop of a model of one layer with so many experts, and its params."""
    config = fdq.models.DecoderConfig(
        model_type="ernie4_5_moe",
        vocab_size=96,
        hidden_size=64,
        intermediate_size=64,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rms_norm_epsilon=1e-5,
        rotary=CONFIG.rotary,
        tie_word_embeddings=True,
        dtype="float32",
        moe=fdq.models.MoEConfig(num_experts=experts, top_k=2, intermediate_size=32, layers=(0,)),
    )
    template, params = split(fdq.quantize(fdq.models.abstract(config), scheme))
    state = abstract_state(1, 64, "C8", config)
    stops = jax.ShapeDtypeStruct((1, 0), jnp.int32)
    lowered = _decode.lower(template, params, state, stops, steps=2)
    return lowered.compile(), params["layers"]["0"]["mlp"]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["W4A16-g32", "W8A8"])
def test_decoding_with_experts_reads_only_those_picked(scheme):
    """Nothing has an axis of all experts, and ten times the experts cost no more bytes."""
    few, many = 37, 370
    compiled, mlp = mixture_of_experts(few, scheme)
    experts = mlp["experts"]
    codes = experts["gate_up_proj"]["kernel"].codes
    assert codes.shape == (few, 32 if scheme.startswith("W4") else 64, 64)
    made = re.findall(
        rf"= \w+\[{few},\d+,\d+\]\S* (?!parameter|get-tuple-element|bitcast)([\w-]+)\(",
        compiled.as_text(),
    )
    assert not made
    assert compiled.memory_analysis().temp_size_in_bytes < codes.size
    # Bytes that XLA counts for a step: the router grows with the experts, and what it scores.
    larger, larger_mlp = mixture_of_experts(many, scheme)
    added = larger.cost_analysis()["bytes accessed"] - compiled.cost_analysis()["bytes accessed"]
    router = larger_mlp["router"]["kernel"].size - mlp["router"]["kernel"].size
    of_all = sum(layer["kernel"].nbytes for layer in experts.values()) * (many / few - 1)
    assert 4 * router < added < 1.5 * 4 * router < of_all / 5
