"""Parts of one's own: a layer whose norms, attention, MLP and router the library does not know."""

import dataclasses
import json
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fdq
from fdq import models, nn
from fdq.models import ATTENTIONS, BLOCKS, MLPS, ROUTERS, Decoder, DecoderConfig, MoEConfig, Part
from fdq.models.parts import GroupedQuery, SoftmaxRouter
from tests.closeness import assert_close
from tests.models.emulation import array, attention, feed_forward, norm, turns


class PostNormLayer(nnx.Module):
    """`x + norm(half(x))` for both halves, as in OLMo 2."""

    def __init__(self, self_attn, mlp, norms):
        self.self_attn, self.mlp = self_attn, mlp
        self.attention_norm, self.mlp_norm = norms

    def __call__(self, x, angles, cache=None, *, start=None):
        y, cache = self.self_attn(x, angles, cache, start=start)
        x = x + self.attention_norm(y)
        return x + self.mlp_norm(self.mlp(x)), cache


@dataclasses.dataclass(frozen=True)
class PostNorm(Part):
    name: ClassVar[str] = "post_norm"

    def build(self, config, layer, *, dtype, rngs):
        return PostNormLayer(
            config.attention.build(config, layer, dtype=dtype, rngs=rngs),
            config.feed_forward(layer).build(config, layer, dtype=dtype, rngs=rngs),
            nnx.List([nn.RMSNorm(config.hidden_size, dtype=dtype) for _ in range(2)]),
        )


class Unrotated(nn.Attention):
    """Attention that does not know where tokens are."""

    def __call__(self, x, angles, cache=None, *, start=None):
        cos, sin = angles
        return super().__call__(x, (jnp.ones_like(cos), jnp.zeros_like(sin)), cache, start=start)


@dataclasses.dataclass(frozen=True)
class SometimesRotated(Part):
    """Rotary positions except in every `every`-th layer, as in SmolLM 3."""

    every: int
    name: ClassVar[str] = "sometimes_rotated"

    def build(self, config, layer, *, dtype, rngs):
        kind = nn.Attention if (layer + 1) % self.every else Unrotated
        sizes = (config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim)
        options = {"interleaved": config.rotary.interleaved, "dtype": dtype, "rngs": rngs}
        return kind(*sizes, sliding_window=config.sliding_window(layer), **options)


class SquaredReLU(nnx.Module):
    def __init__(self, up_proj, down_proj):
        self.up_proj, self.down_proj = up_proj, down_proj

    def __call__(self, x):
        return self.down_proj(jnp.square(jax.nn.relu(self.up_proj(x))))


@dataclasses.dataclass(frozen=True)
class Squared(Part):
    name: ClassVar[str] = "squared_relu"

    def build(self, config, layer, *, dtype, rngs):
        hidden, width = config.hidden_size, config.intermediate_size
        linears = (
            nn.Linear(*n, dtype=dtype, rngs=rngs) for n in ((hidden, width), (width, hidden))
        )
        return SquaredReLU(*linears)


class SigmoidScores(nnx.Module):
    """Sigmoids as weights, scaled, as in DeepSeek-V3."""

    def __init__(self, config, scale, rngs):
        self.linear = nn.Linear(config.hidden_size, config.moe.num_experts, rngs=rngs)
        self.top_k, self.scale = config.moe.top_k, scale

    def __call__(self, x):
        weights, experts = jax.lax.top_k(jax.nn.sigmoid(self.linear(x, out_dtype=jnp.float32)), 2)
        return experts, weights / weights.sum(-1, keepdims=True) * self.scale


@dataclasses.dataclass(frozen=True)
class Sigmoid(Part):
    scale: float = 1.0
    name: ClassVar[str] = "sigmoid"

    def build(self, config, layer, *, dtype, rngs):
        return SigmoidScores(config, self.scale, rngs)


CONFIG = DecoderConfig(
    model_type="toy",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_epsilon=1e-6,
    rotary=nn.RotaryConfig(interleaved=True),
    tie_word_embeddings=True,
    sliding_windows=(3, None, 5),
    block=PostNorm(),
    attention=SometimesRotated(every=2),
    mlp=Squared(),
    moe=MoEConfig(
        num_experts=4, top_k=2, intermediate_size=16, layers=(1, 2), router=Sigmoid(scale=2.5)
    ),
    dtype="float32",
)


@pytest.fixture
def registered():
    with (
        BLOCKS.registered(PostNorm),
        ATTENTIONS.registered(SometimesRotated),
        MLPS.registered(Squared),
        ROUTERS.registered(Sigmoid),
    ):
        yield


def emulated(model, tokens):
    def half(layer, x):
        if isinstance(layer, SquaredReLU):
            up = x @ array(layer.up_proj.kernel)
            return np.maximum(up, 0) ** 2 @ array(layer.down_proj.kernel)
        scores = 1 / (1 + np.exp(-x @ array(layer.router.linear.kernel)))
        chosen = np.argsort(-scores, axis=-1, kind="stable")[..., :2]
        weights = np.take_along_axis(scores, chosen, -1)
        weights = 2.5 * weights / weights.sum(-1, keepdims=True)
        outputs = (feed_forward(layer.experts, x, chosen[..., i]) for i in range(2))
        return sum(weights[..., i : i + 1] * y for i, y in enumerate(outputs))

    table, turn = array(model.embed_tokens.embedding), turns(model.config, tokens.shape[1])
    x = table[tokens]
    for index, layer in enumerate(model.layers):
        one = turn if index != 1 else np.ones_like(turn)
        x = x + norm(layer.attention_norm, attention(layer.self_attn, x, one))
        x = x + norm(layer.mlp_norm, half(layer.mlp, x))
    return norm(model.norm, x) @ table.T


def test_a_layer_of_foreign_parts_computes_what_they_say_and_generates(rng):
    model = Decoder(CONFIG, rngs=nnx.Rngs(params=1))
    tokens = rng.integers(0, 64, (2, 12)).astype(np.int32)
    logits = emulated(model, tokens)
    assert_close(jax.jit(lambda model: model(tokens))(model), logits, of_largest=1e-5)
    longer = fdq.generate(model, tokens.tolist(), max_new_tokens=4, stop_tokens=())
    for more in range(4):
        grown = np.concatenate([tokens, np.array(longer)[:, :more]], axis=1)
        np.testing.assert_array_equal(
            emulated(model, grown)[:, -1].argmax(-1), np.array(longer)[:, more]
        )


def test_a_model_of_foreign_parts_is_quantized_saved_and_loaded(tmp_path, registered):
    model = fdq.quantize(Decoder(CONFIG, rngs=nnx.Rngs(params=1)), "W8A16C8")
    kernel = model.layers[0].mlp.up_proj.kernel
    assert isinstance(kernel, fdq.QTensor) and kernel.shape == (32, 48)
    fdq.save(model, tmp_path / "saved")
    loaded = fdq.load(tmp_path / "saved", prepare=False)
    assert loaded.config == CONFIG
    assert jax.tree.structure(loaded) == jax.tree.structure(model)
    jax.tree.map(np.testing.assert_array_equal, loaded, model)


def test_parts_are_stored_by_name_with_what_only_they_know(registered):
    stored = json.loads(json.dumps(CONFIG.to_dict()))
    assert stored["block"] == {"name": "post_norm"}
    assert stored["attention"] == {"name": "sometimes_rotated", "every": 2}
    assert stored["moe"]["router"] == {"name": "sigmoid", "scale": 2.5}
    assert "name" not in stored["moe"]
    read = DecoderConfig.from_dict
    assert read(stored) == CONFIG and hash(read(stored)) == hash(CONFIG)
    with pytest.raises(ValueError, match=r"model attention: unknown fields \[\], missing.*every"):
        read(stored | {"attention": {"name": "sometimes_rotated"}})
    with pytest.raises(ValueError, match=r"model mlp: unknown fields \['width'\]"):
        read(stored | {"mlp": {"name": "squared_relu", "width": 3}})


def test_a_part_that_nobody_registered_is_named():
    with pytest.raises(ValueError, match="Unknown block 'post_norm'. .*Known: pre_norm."):
        DecoderConfig.from_dict(CONFIG.to_dict())


def test_usual_parts_and_windows_are_not_stored():
    """So that what was stored before there were others stays what it was, and is read as it was."""
    for config in models.CONFIGS.values():
        stored = config.to_dict()
        assert DecoderConfig.from_dict(stored | {"moe": stored.get("moe")}) == config
        if config.model_type in ("gemma2", "gemma3_text", "gpt_oss"):
            continue  # which are made of other parts
        assert not {"block", "mlp", "sliding_windows"} & stored.keys()
        usual = config.attention == GroupedQuery()
        assert usual is ("attention" not in stored) is (config.num_kv_heads > 1)
        usual = config.moe is None or config.moe.router == SoftmaxRouter()
        assert usual is ("router" not in stored.get("moe", {}))
        new = {"local_rotary", "embedding_scale", "norm_dtype", "logit_softcap"}
        assert not new & stored.keys()
    assert CONFIG.to_dict()["sliding_windows"] == [3, None, 5]
