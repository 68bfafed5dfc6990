"""Decoding through the kernels, in Mosaic's interpreter, against the same model in XLA."""

import logging

import jax
import numpy as np
import pytest
from flax import nnx

import fdq
from fdq.analysis.planner import weight_table
from fdq.models import Decoder, DecoderConfig, MoEConfig
from fdq.nn.rotary import RotaryConfig
from fdq.ops import implementation
from fdq.ops.kernels import MOSAIC_GPU

STEPS = 4
PROMPTS = np.array([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
LENGTHS = [8, 5]


def config(family):
    """Two layers, 128 wide, heads of 64."""
    moe, experts = None, family == "experts"
    if experts:
        moe = MoEConfig(
            num_experts=64,
            top_k=2,
            intermediate_size=64,
            shared_intermediate_size=128,
            layers=(1,),
            correction_bias=True,
            norm_min=1e-12,
        )
    return DecoderConfig(
        model_type="llama",
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        rms_norm_epsilon=1e-6,
        rotary=RotaryConfig(interleaved=experts),
        qk_norm=family == "dense",
        qkv_bias=True,
        tie_word_embeddings=experts,
        moe=moe,
        dtype="float32",
    )


def decode(model):
    cache = fdq.KVCache.init(model.config, 2, 24, model.cache_spec)
    state = fdq.prefill(model, PROMPTS, cache, lengths=np.array(LENGTHS))
    step, params = fdq.functional(model)

    @jax.jit
    def run(params, state):
        def body(state, _):
            logits, state = step(params, state)
            return state.push(logits.argmax(-1)), logits

        return jax.lax.scan(body, state, None, length=STEPS)

    state, logits = run(params, state)
    return state.generated(), np.asarray(logits)


@pytest.mark.slow
def test_tokens_are_those_of_xla(monkeypatch, caplog):
    model = Decoder(config("experts"), rngs=nnx.Rngs(params=0))
    model = fdq.quantize(model, "W4A16C8-g64")
    wanted_tokens, wanted = decode(model)
    monkeypatch.setenv("FDQ_IMPLEMENTATION", "mosaic_gpu")
    prepared = fdq.prepare(model)
    assert prepared.layers[0].self_attn.qkv_proj.kernel.layout == MOSAIC_GPU
    implementation._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="fdq"):
        tokens, logits = decode(prepared)
    for op in ("matmul", "append", "attention", "grouped_matmul", "route"):
        assert f"{op} runs as 'mosaic_gpu'" in caplog.text
    assert np.abs(wanted).max() > 0.1
    # Greedy tokens are the same wherever the margin between the best two is more than noise.
    top = np.sort(wanted, axis=-1)
    clear = (top[..., -1] - top[..., -2] > 1e-3).T
    for row in range(2):
        for step in range(STEPS):
            if not clear[row, step]:
                break
            assert tokens[row][step] == wanted_tokens[row][step], (row, step)
    assert clear[:, 0].all()
    assert np.abs(logits[0] - wanted[0]).max() < 1e-4 * np.abs(wanted[0]).max()


def test_a_prepared_model_is_counted_and_saved_as_any_other(monkeypatch, tmp_path):
    model = fdq.quantize(Decoder(config("dense"), rngs=nnx.Rngs(params=0)), "W4A16")
    monkeypatch.setenv("FDQ_IMPLEMENTATION", "mosaic_gpu")
    prepared = fdq.prepare(model)
    assert weight_table(prepared).bytes == weight_table(model).bytes
    fdq.save(prepared, tmp_path / "saved")
    loaded = fdq.load(tmp_path / "saved", prepare=False)
    kernel = loaded.layers[1].mlp.down_proj.kernel
    assert kernel.layout == "canonical"
    np.testing.assert_array_equal(
        kernel.codes[...], model.layers[1].mlp.down_proj.kernel.codes[...]
    )
