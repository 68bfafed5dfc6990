"""DeepSeek and GLM as a user has them: pure functions, quantized decoding, configs, checkpoints."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import fdq
from fdq import nn
from fdq.decoding.state import DecodeState
from fdq.models import CONFIGS, from_huggingface
from fdq.models.scored_router import ScoredRouter
from fdq.ops.route.scoring import Scoring
from fdq.ops.route.xla import choose_experts
from fdq_checkpoints import CheckpointError, load
from tests.checkpoints import builders
from tests.closeness import difference
from tests.models import oracles


@pytest.mark.slow
def test_pure_functions_go_on_and_back_over_a_cache_of_latents():
    """A draft is verified, forgotten, and another one taken, as without a cache."""
    model, expected = oracles.oracle("deepseek_v3")
    ids, wanted = np.asarray(expected["input_ids"]), expected["logits"]
    made = fdq.functional(model)
    extend, step = jax.jit(made.extend), jax.jit(made.step)
    state = fdq.prefill(model, ids[:, :8], fdq.KVCache.init(model.config, 2, 32))
    draft = np.asarray([[9, 8, 7, 6], [5, 4, 3, 2]], np.int32)
    _, ahead = extend(made.params, draft, state)
    back = ahead.rollback(8)
    assert ahead.length.tolist() == [12, 12] and back.length.tolist() == [8, 8]
    logits, state = extend(made.params, ids[:, 8:12], back)
    np.testing.assert_allclose(logits, wanted[:, 7:11], atol=1e-4, rtol=0)
    for position in range(12, 15):
        logits, state = step(made.params, state)
        np.testing.assert_allclose(logits, wanted[:, position - 1], atol=1e-4, rtol=0)
        state = state.push(ids[:, position])


@pytest.mark.slow
@pytest.mark.longest
def test_quantized_decoding_is_close_to_the_same_weights_without_a_cache():
    """A chunk multiplies latents by a decoded kernel, the pass without a cache has its product."""
    model, expected = oracles.oracle("deepseek_v3_plain")
    ids = np.asarray(expected["input_ids"])[:, :16]
    quantized = fdq.quantize(model, "W4A16C8-g8")
    assert isinstance(quantized.layers[0].self_attn.kv_b_proj.kernel, fdq.QTensor)
    whole = np.asarray(jax.jit(lambda m, t: m(t))(quantized, ids))
    made = fdq.functional(quantized)
    extend = jax.jit(made.extend)

    def decoded(format):
        cache = quantized.init_cache(2, 32, format)
        state = DecodeState.start(jnp.asarray(ids[:, :1]), jnp.ones((2,), jnp.int32), cache)
        return np.asarray(extend(made.params, ids[:, 1:], state)[0])

    np.testing.assert_allclose(decoded("C16"), whole[:, :15], atol=2e-4, rtol=0)
    # Of most positions: where it changes which expert is chosen, much else changes too.
    pairs = zip(decoded(None)[0], whole[0, :15], strict=True)
    assert 0 < np.median([difference(one, other) for one, other in pairs]) < 2e-3
    pairs = zip(whole[0], expected["logits"][0], strict=False)
    assert np.median([difference(one, other) for one, other in pairs]) < 0.1


def routed(logits, bias, top_k, scoring, normalize):
    """The definition, a token at a time."""
    experts, weights = [], []
    for row in logits:
        scores = 1 / (1 + np.exp(-row))
        if scoring.function == "softmax":
            scores = np.exp(row) / np.exp(row).sum()
        biased = (scores + bias).reshape(scoring.groups, -1)
        best = np.sort(biased, axis=1)[:, -scoring.best_of_group :].sum(1)
        kept = np.argsort(-best)[: scoring.top_groups]
        biased = np.where(np.isin(np.arange(scoring.groups), kept)[:, None], biased, -np.inf)
        chosen = np.argsort(-biased.ravel())[:top_k]
        found = scores[chosen]
        experts.append(chosen)
        weights.append(scoring.scale * (found / found.sum() if normalize else found))
    return np.array(experts), np.array(weights)


@pytest.mark.parametrize(
    "scoring",
    [
        Scoring(function="sigmoid", groups=4, top_groups=2, scale=2.5),
        Scoring(function="sigmoid"),
        Scoring(groups=6, top_groups=3, best_of_group=1, scale=16.0),
        Scoring(groups=12, top_groups=4),  # groups of one expert
    ],
    ids=str,
)
def test_experts_are_those_of_the_best_groups(scoring, rng):
    logits = rng.standard_normal((30, 12)).astype(np.float32)
    bias = (0.4 * rng.standard_normal(12)).astype(np.float32)
    for normalize in (True, False):
        options = {"top_k": 3, "normalize": normalize, "scoring": scoring}
        experts, weights = choose_experts(jnp.asarray(logits), jnp.asarray(bias), **options)
        wanted, expected = routed(logits, bias, 3, scoring, normalize)
        np.testing.assert_array_equal(experts, wanted)
        np.testing.assert_allclose(weights, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"function": "tanh"}, "'tanh' is unknown; use 'softmax' or 'sigmoid'"),
        ({"groups": 2, "top_groups": 3}, r"top_groups \(=3\) must be 1 to groups \(=2\)"),
        ({"best_of_group": 0}, r"best_of_group \(=0\) must be 1 or more"),
    ],
)
def test_scores_that_are_none_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ScoredRouter(**fields)


def test_experts_that_do_not_fall_into_groups_are_refused():
    with pytest.raises(ValueError, match="8 experts do not fall into 3 groups alike"):
        changed("deepseek_v3", n_group=3)
    with pytest.raises(ValueError, match="1 groups of 2 experts have fewer than the 3"):
        changed("deepseek_v3", topk_group=1)
    with pytest.raises(ValueError, match="expected 1 to 4, the number of experts, found 5"):
        nn.Router(8, 4, top_k=5, rngs=nnx.Rngs(params=0))


def changed(name, **changes):
    return from_huggingface({**oracles.read_config(name), **changes})


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax' is not supported"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method='greedy' is not supported"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "must be that of attention heads, 4, got 2"),
        ("deepseek_v3", {"head_dim": 64}, "head_dim=64 is not supported; expected 8"),
        ("deepseek_v3", {"index_topk": 2048}, r"does not know: \{'index_topk': 2048\}"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=True is not supported"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc' is not supported"),
        (
            "glm4_moe",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0}},
            "partial_rotary_factor of the rope parameters must be a positive number, got 0",
        ),
    ],
)
def test_what_is_another_model_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        changed(name, **changes)


def test_what_published_configs_say_is_what_was_read():
    v3 = CONFIGS["deepseek-v3"]
    assert v3.moe.layers == tuple(range(3, 61)) and v3.moe.shared_intermediate_size == 2048
    router = ScoredRouter(function="sigmoid", groups=8, top_groups=4, scale=2.5)
    assert v3.moe.router == router and v3.moe.correction_bias
    assert (v3.num_kv_heads, v3.head_dim) == (1, 64)
    assert v3.attention.scale == pytest.approx(192**-0.5 * (0.1 * np.log(40) + 1) ** 2)
    assert v3.rotary.attention_factor == 1 and v3.rotary.interleaved
    lite = CONFIGS["deepseek-v2-lite"]
    assert lite.attention.query_rank is None and lite.moe.router == ScoredRouter()
    air = CONFIGS["glm-4.5-air"]
    assert air.rotary.partial_factor == 0.5 and air.qkv_bias and not air.output_bias
    assert changed("deepseek_v3", moe_layer_freq=2).moe.layers == (2,)
    table = fdq.match_table(fdq.models.abstract(v3.replace(num_layers=4)), "W4A16C8")
    assert "layers.{0..3}.self_attn.kv_a_proj_with_mqa.kernel" in str(table)


BLOCK = 16


def in_blocks(weight, rng):
    """Random codes of e4m3 and scales of blocks `[16, 16]`, the last ones partial; the weight."""
    n, k = weight.shape
    codes = rng.standard_normal((n, k)).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.05, 0.2, (-(-n // BLOCK), -(-k // BLOCK))).astype(np.float32)
    wide = np.repeat(np.repeat(scale, BLOCK, 0), BLOCK, 1)[:n, :k]
    return codes, scale, codes.astype(np.float32) * wide


@pytest.fixture
def float8(tmp_path, rng):
    """A release in blocks of float8 with a layer more than it has, and the same in floats."""
    tensors = builders.model("deepseek_v3_plain", tmp_path / "codes")
    builders.model("deepseek_v3_plain", tmp_path / "floats")
    for name, array in list(tensors.items()):
        if name.startswith("model.layers.1."):
            tensors[name.replace("layers.1.", "layers.2.")] = array
    tensors["model.layers.2.eh_proj.weight"] = np.zeros((32, 64), np.float32)
    tensors["model.layers.2.shared_head.head.weight"] = np.zeros((96, 32), np.float32)
    stored, floats = {}, {}
    for name, array in tensors.items():
        module, _, end = name.rpartition(".")
        if end == "weight" and module.endswith(("_proj", "_proj_with_mqa")):
            codes, scale, weight = in_blocks(array, rng)
            stored |= {name: codes, f"{module}.weight_scale_inv": scale}
            floats[name] = weight
        else:
            stored[name] = floats[name] = array
    builders.write(tmp_path / "codes" / "model.safetensors", stored)
    floats = {name: a for name, a in floats.items() if "layers.2." not in name}
    builders.write(tmp_path / "floats" / "model.safetensors", floats)
    config = {"quant_method": "fp8", "weight_block_size": [BLOCK] * 2, "fmt": "e4m3"}
    builders.edit_config(tmp_path / "codes", quantization_config=config)
    return tmp_path / "codes", load(tmp_path / "floats")


def test_a_release_in_blocks_of_float8_is_read_without_loss(float8):
    folder, twin = float8
    model = fdq.load(folder, prepare=False)
    paths = ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    for mine, theirs in zip(model.layers, twin.layers, strict=True):
        for name in paths:
            found, wanted = (getattr(one.self_attn, name).kernel for one in (mine, theirs))
            assert isinstance(found, fdq.QTensor), name
            np.testing.assert_array_equal(fdq.dequantize(found), wanted[...])
    kernel = model.layers[0].self_attn.kv_a_proj_with_mqa.kernel
    assert kernel.shape == (32, 24) and kernel.scale.shape == (2, 2)  # 24 columns: 1.5 blocks
    found = model.layers[1].mlp.experts.gate_up_proj.kernel
    wanted = twin.layers[1].mlp.experts.gate_up_proj.kernel[...]
    np.testing.assert_array_equal(fdq.dequantize(found), wanted)
    assert model.layers[0].self_attn.o_proj.activation.format == "float8_e4m3"


def test_layers_beyond_the_last_are_left_out_where_the_config_says_that_they_are_there(float8):
    folder, _ = float8
    builders.edit_config(folder, num_nextn_predict_layers=0)
    with pytest.raises(CheckpointError, match=r"model.layers.2.*is not part of a deepseek_v3"):
        load(folder)
    builders.edit_config(folder, num_nextn_predict_layers=2**40)
    with pytest.raises(CheckpointError, match="num_nextn_predict_layers"):
        load(folder)


def test_a_saved_model_is_what_it_was(tmp_path):
    model = fdq.quantize(oracles.oracle("deepseek_v2")[0], "W8A16C8-g8")
    fdq.save(model, tmp_path / "saved")
    loaded = fdq.load(tmp_path / "saved", prepare=False)
    assert loaded.config == model.config and loaded.config.to_dict()["attention"]["rank"] == 16
    jax.tree.map(np.testing.assert_array_equal, loaded, model)
