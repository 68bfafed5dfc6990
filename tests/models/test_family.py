"""A family of one's own: one `Family`, registered, and nothing else of the library is touched."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fdq
from fdq.models import CONFIGS, FAMILIES, DecoderConfig, Family, from_huggingface
from fdq.models.family import Rule
from tests.models import oracles


def read(reader):
    fields = reader.base(epsilon=1e-6, tie=False)
    reader.must_be("wool", "long")
    reader.full_attention()
    return DecoderConfig(**fields, rotary=reader.rotary(theta=10000.0), qk_norm=True)


ALPACA = Family(
    name="alpaca",
    read=read,
    configs={"alpaca-1b": CONFIGS["qwen3-0.6b"].replace(model_type="alpaca")},
    tensor_names=(Rule("layers.{i}.self_attn.k_norm.scale", ("model.layers.{i}.k_ln.weight",)),),
)


@pytest.fixture
def checkpoint(tmp_path):
    """The oracle `qwen3` under the names of the family above."""
    config = oracles.read_config("qwen3") | {"model_type": "alpaca", "wool": "long"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(oracles.ORACLES / "qwen3" / "model.safetensors")
    renamed = {name.replace("self_attn.k_norm", "k_ln"): a for name, a in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    return tmp_path


def test_a_registered_family_is_loaded_saved_and_generates(checkpoint, tmp_path):
    model, expected = oracles.oracle("qwen3")
    with FAMILIES.registered(ALPACA):
        loaded = fdq.load(checkpoint)
        assert loaded.config == model.config.replace(model_type="alpaca")
        prompt = expected["prompt_short"].tolist()
        tokens = fdq.generate(loaded, prompt, max_new_tokens=16, stop_tokens=())
        assert tokens == expected["greedy_short"].tolist()
        fdq.save(fdq.load(checkpoint, scheme="W8A16"), tmp_path / "saved")
    restored = fdq.load(tmp_path / "saved")  # a saved model needs its config, not its family
    assert restored.config == loaded.config
    kernel, original = (m.layers[0].mlp.down_proj.kernel for m in (restored, model))
    np.testing.assert_allclose(fdq.dequantize(kernel), original, rtol=0, atol=0.01)


def test_what_its_reader_does_not_know_is_refused():
    config = oracles.read_config("qwen3") | {"model_type": "alpaca"}
    with pytest.raises(ValueError, match="'alpaca' is not supported; supported are ernie4_5, "):
        from_huggingface(config)
    with FAMILIES.registered(ALPACA):
        with pytest.raises(ValueError, match="wool='short' is not supported; expected 'long'"):
            from_huggingface(config | {"wool": "short"})
        with pytest.raises(ValueError, match=r"does not know: \{'horns': 2\}"):
            from_huggingface(config | {"horns": 2})


def test_its_published_models_are_there_by_name():
    assert "alpaca-1b" not in CONFIGS
    with FAMILIES.registered(ALPACA):
        assert list(CONFIGS)[-1] == "alpaca-1b"
        plan = fdq.plan("alpaca-1b", "W4A16")
    assert plan.weights == fdq.plan("qwen3-0.6b", "W4A16").weights
