"""Models over eight devices: the tokens of one, two sums a layer, no weight that moves."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdq
from fdq.decoding import programs
from fdq.nn.parameters import split
from fdq.sharding import Rules, make_mesh
from tests.covering import longest, slow
from tests.models import oracles
from tests.sharding.many_devices import PROMPTS, check_tokens, model_of, moved

TENSOR, EXPERT, DATA = {"tensor": 8}, {"tensor": 4, "expert": 2}, {"tensor": 2, "data": 4}
CASES = [
    ("llama", "W4A16C8", TENSOR),
    slow("ernie4_5_moe", "W8A8C8", EXPERT),
    longest("llama", "W8A8C8", DATA),
    longest("llama", "wint2", TENSOR),
    longest("qwen2", "block_wise_fp8", TENSOR),
    longest("qwen3_moe", "W4A16C8", EXPERT),
    longest("ernie4_5_moe", "wint2", EXPERT),
    longest("ernie4_5_moe", "block_wise_fp8", TENSOR),
    slow("gpt_oss", "W4A16C8", TENSOR),
    longest("gpt_oss", "W8A8C8", EXPERT),
    slow("deepseek_v3", "block_wise_fp8", EXPERT),
    longest("deepseek_v2", "W8A16C8", DATA),
    longest("glm4_moe", "W4A16C8", EXPERT),
    slow("gemma3", "W4A16C8", DATA),
    longest("ernie4_5", None, TENSOR),
]
# Every family in every kind of scheme on every kind of mesh.
FAMILIES = {oracles.read_config(name)["model_type"]: name for name in reversed(oracles.NAMES)}
SCHEMES = ("W4A16C8", "W8A8C8", "block_wise_fp8", "wint2")


def every_case():
    """`CASES`, and with `--longest` the whole table."""
    known = [getattr(case, "values", case) for case in CASES]
    table = itertools.product(sorted(FAMILIES.values()), SCHEMES, (TENSOR, EXPERT, DATA))
    return [*CASES, *(longest(*case) for case in table if case not in known)]


def prompts_for(sizes):
    """As many as sequences are cut into, or two."""
    return PROMPTS * (sizes.get("data", 2) // 2)


@pytest.mark.parametrize(("name", "scheme", "sizes"), every_case(), ids=str)
def test_the_tokens_of_one_device(name, scheme, sizes):
    one = model_of(name, scheme)
    many = fdq.shard(one, make_mesh(sizes))
    prompts = prompts_for(sizes)
    found = fdq.generate(many, prompts, 5, stop_tokens=())
    check_tokens(one, found[:2], fdq.generate(one, PROMPTS, 5, stop_tokens=()))

    fns = fdq.functional(many)
    state = fdq.prefill(many, [row[:3] for row in prompts], many.init_cache(len(prompts), 16))
    moves = moved(jax.jit(fns.step).lower(fns.params, state).compile().as_text())
    # The one of the embedding, one after attention, one after the MLP or the experts.
    sums = [(size, place) for kind, size, place in moves if kind == "all-reduce"]
    assert len(sums) == 3 and sum("layers.0" in place for _, place in sums) == 2, moves
    assert all(size <= one.config.hidden_size * len(prompts) for size, _ in sums)
    # Before rows are quantized, each device hears their largest values: one number a row.
    others = [(kind, size) for kind, size, _ in moves if kind != "all-reduce"]
    experts = getattr(one.config, "num_experts_per_tok", None) or 1
    most = len(prompts) * experts * math.prod(sizes.values())
    assert all(kind == "all-gather" and size <= most for kind, size in others), others
    assert not others or scheme == "W8A8C8"


def test_the_loop_works_in_the_donated_cache():
    """Each device keeps its part of the cache where it is; sampling moves two numbers a row."""
    sizes = {"tensor": 4, "data": 2}
    many = fdq.shard(model_of("llama", "W4A16C8"), make_mesh(sizes))
    template, params = split(many)
    state = fdq.prefill(many, [[3, 1, 4], [2, 7, 1]], many.init_cache(2, 4096))
    stops = jnp.full((2, 1), -1)
    compiled = programs.decode.lower(template, params, state, stops, steps=2).compile()
    memory = compiled.memory_analysis()
    share = state.cache.nbytes / 8
    assert memory.alias_size_in_bytes >= share
    assert memory.temp_size_in_bytes < share / 2
    moves = moved(compiled.as_text())
    gathers = [size for kind, size, _ in moves if kind == "all-gather"]
    assert gathers == [4 * 1 * 2]
    assert {kind for kind, *_ in moves} == {"all-reduce", "all-gather"}


@pytest.mark.slow
def test_what_else_a_model_does():
    """Logits, hidden states, log-probabilities, functions for one's own loop, evaluation."""
    one = model_of("llama", "W4A16C8")
    many = fdq.shard(one, jax.make_mesh((4, 2), ("tensor", "data")))
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    for argument in ({"tokens": tokens}, {"inputs_embeds": np.ones((2, 3, 128), np.float32)}):
        results = [m(**argument, return_hidden_states=True) for m in (one, many)]
        for a, b in zip(*map(jax.tree.leaves, results), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
    odd = tokens[:1]  # not over two devices
    np.testing.assert_allclose(many(odd), one(odd), rtol=0, atol=1e-4)
    both = [fdq.generate(m, PROMPTS, 4, stop_tokens=(), return_logprobs=True) for m in (one, many)]
    assert both[0][0] == both[1][0]
    np.testing.assert_allclose(both[0][1], both[1][1], atol=1e-4)
    found = []
    for model in (one, many):
        fns = fdq.functional(model)
        state = fns.init(fns.params, tokens, 16, return_logprobs=True)
        logits, state = jax.jit(fns.extend)(fns.params, tokens[:, :2], state)
        last, state = jax.jit(fns.step)(fns.params, state.take([1, 0]))
        state = state.push(jnp.argmax(last, axis=-1), logits=last)
        found.append([np.asarray(a) for a in (logits, last, state.tokens, state.logprobs)])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
    reports = [fdq.evaluate(m, np.arange(120) % 50, window=32) for m in (one, many)]
    assert abs(reports[0].nats_per_token - reports[1].nats_per_token) < 1e-4


@pytest.mark.slow
def test_a_processor_sees_all_logits_also_where_a_mesh_is_set():
    one = model_of("llama", "W4A16C8")
    mesh = jax.make_mesh((8,), ("tensor",))
    many = fdq.shard(one, mesh)

    def even(logits, state):
        return jnp.where(jnp.arange(logits.shape[-1])[None] % 2 == 0, logits, -jnp.inf)

    settings = {"stop_tokens": (), "logits_processor": even}
    with jax.set_mesh(mesh):
        found = fdq.generate(many, PROMPTS, 4, **settings)
    assert found == fdq.generate(one, PROMPTS, 4, **settings)
    assert not np.any(np.array(found) % 2)


@pytest.mark.slow
def test_static_scales_of_a_cache_follow_their_heads():
    plain = model_of("llama", None)
    statistics = fdq.calibrate(plain, np.arange(64).reshape(4, 16))
    one = fdq.quantize(plain, "W8A16C8-kvchannel", calibration=statistics)
    many = fdq.shard(one, make_mesh(TENSOR))
    cache = many.init_cache(2, 16)
    assert cache.layers[0].k.shape[1] == 8 and one.init_cache(2, 16).layers[0].k.shape[1] == 2
    expected = fdq.generate(one, PROMPTS, 5, stop_tokens=())
    check_tokens(one, fdq.generate(many, PROMPTS, 5, stop_tokens=()), expected)


def test_what_does_not_divide_is_named():
    llama, moe = model_of("llama", "W4A16C8"), model_of("ernie4_5_moe", "W8A8C8")
    for model, sizes, said in (
        (llama, {"tensor": 3}, r"K=1024 over tensor=3 does not divide\. Use another"),
        (moe, {"tensor": 2, "expert": 3}, r"8 experts over expert=3 does not divide\. Use an axis"),
    ):
        with pytest.raises(ValueError, match=said):
            fdq.shard(model, make_mesh(sizes))
    with pytest.raises(ValueError, match="shards of 128 rows, not multiples of 256"):
        fdq.shard(llama, make_mesh(TENSOR), Rules(align=256))
    many = fdq.shard(llama, make_mesh(TENSOR))
    with pytest.raises(ValueError, match="on a mesh already"):
        fdq.shard(many, make_mesh(TENSOR))
    with pytest.raises(ValueError, match="Quantize it first"):
        fdq.quantize(many, "W4A16")
    with pytest.raises(ValueError, match=r"2 heads for 8 devices.*mesh=mesh"):
        fdq.prefill(many, [[1, 2]], fdq.KVCache.init(llama.config, 1, 16))
    with pytest.raises(ValueError, match="3 sequences over data=2 devices.* Decode 4 at once"):
        fdq.KVCache.init(llama.config, 3, 16, mesh=make_mesh({"tensor": 2, "data": 2}))


def test_what_is_of_one_device_is_refused_or_noted():
    one, mesh = model_of("llama", "W4A16C8"), make_mesh({"tensor": 2})
    many = fdq.shard(one, mesh)
    for call in (fdq.calibrate, fdq.lora, fdq.prepare, fdq.unprepare):
        arguments = (np.ones((1, 4), np.int32),) if call is fdq.calibrate else ()
        with pytest.raises(ValueError, match=r"on a mesh"):
            call(many, *arguments)
    notes = fdq.shard(fdq.lora(one, rank=1, targets=("v_proj",)), mesh).placement.notes
    assert notes == ("layers.0.self_attn: whole on every device, qkv_proj is a LoRA",)


def test_the_table_of_a_placement():
    many = fdq.shard(model_of("ernie4_5_moe", "W8A8C8"), make_mesh(EXPERT))
    lines = str(many.placement).splitlines()
    assert lines[0] == "mesh tensor=4, expert=2"
    assert any("qkv_proj" in line and "each KV head on 2 devices" in line for line in lines)
    assert "whole experts over expert=2 x tensor=4" in lines[-1]
