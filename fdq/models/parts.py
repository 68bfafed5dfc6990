"""The parts that a layer is put together from: what a config names, and what builds the modules.

A part is a frozen dataclass. Its class has the name that a stored config calls it by, its fields
are what only this part needs to know, and `build` makes the module; sizes and whatever else the
layers of a model share it reads from the `DecoderConfig`. Another attention, feed-forward half,
router or order of norms is a class of its own in the table of its kind, and a field of the config
holds one: `ATTENTIONS.register(Latent)`, `DecoderConfig(..., attention=Latent(rank=512))`.
"""

import abc
import dataclasses
from collections.abc import Hashable
from typing import Any, ClassVar, override

import jax
from flax import nnx

from fdq import nn
from fdq.cache.kv_cache import LayerCache
from fdq.nn.handing_on import hand_on
from fdq.nn.norm import normed
from fdq.ops.gates import ClampedSwiGLU, Gate, geglu, swiglu
from fdq.registry import Registry


class Part(abc.ABC):
    """One part of a layer; hashable, so that a config may be static in `jax.jit`."""

    name: ClassVar[str]

    @abc.abstractmethod
    def build(self, config: Any, layer: int, *, dtype: Any, rngs: nnx.Rngs) -> Any:
        """The module, with random weights.

        Args:
          config: the `DecoderConfig`.
          layer: index of the layer: parts may differ from layer to layer.
          dtype: of parameters and activations.
          rngs: a stream `params`.
        """

    def layer_kind(self, config: Any, layer: int) -> Hashable:
        """Layers for which this is equal have parameters of equal shapes, so one stands for all.

        By default each layer is a kind of its own, which is right for every part.
        """
        del config
        return layer

    def stored(self, config: Any, layer: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of an attention: heads and channels of the two halves that a cache has of a token."""
        del layer
        keys = config.num_kv_heads, config.head_dim
        return keys, keys

    def ring_window(self, config: Any, layer: int) -> int | None:
        """Of an attention that can do with a ring: the window that one is made for; else None."""
        del config, layer
        return None


@dataclasses.dataclass(frozen=True)
class GroupedQuery(Part):
    """Grouped-query attention with rotary positions, in a layer's sliding window or without.

    The module is called as `attention(x, angles, cache, start=)`, see `fdq.nn.Attention`.

    Attributes:
      scale: multiplies the scores; None for `head_dim ** -0.5`.
      sinks: whether each head has a learned score beside those of the tokens (gpt-oss).
      softcap: of the scores, see `fdq.attention`; None for none (Gemma 2).
    """

    name = "grouped_query"

    scale: float | None = None
    sinks: bool = False
    softcap: float | None = None

    @override
    def build(self, config: Any, layer: int, *, dtype: Any, rngs: nnx.Rngs) -> nn.Attention:
        return nn.Attention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            interleaved=config.rotary.interleaved,
            qkv_bias=config.qkv_bias,
            output_bias=config.output_bias,
            qk_norm_epsilon=config.rms_norm_epsilon if config.qk_norm else None,
            norm_dtype=config.norm_dtype,
            sinks=self.sinks,
            scale=self.scale,
            softcap=self.softcap,
            sliding_window=config.sliding_window(layer),
            dtype=dtype,
            rngs=rngs,
        )

    @override
    def layer_kind(self, config: Any, layer: int) -> Hashable:
        return self

    @override
    def ring_window(self, config: Any, layer: int) -> int | None:
        return config.sliding_window(layer)


@dataclasses.dataclass(frozen=True)
class SwiGLU(Part):
    """A dense MLP of `config.intermediate_size`; the module is called as `mlp(x)`."""

    name = "swiglu"
    gate: ClassVar[Gate] = staticmethod(swiglu)

    @override
    def build(self, config: Any, layer: int, *, dtype: Any, rngs: nnx.Rngs) -> nn.MLP:
        return nn.MLP(
            config.hidden_size,
            config.intermediate_size,
            use_bias=config.mlp_bias,
            gate=self.gate,
            dtype=dtype,
            rngs=rngs,
        )

    @override
    def layer_kind(self, config: Any, layer: int) -> Hashable:
        return self


class GeGLU(SwiGLU):
    """As `SwiGLU`, with a GELU for its SiLU."""

    name = "geglu"
    gate = staticmethod(geglu)


def router_of(config: Any, **options: Any) -> nn.Router:
    """A router of a model's experts; `options` are what its kind adds, and `rngs`."""
    moe = config.moe
    return nn.Router(
        config.hidden_size,
        moe.num_experts,
        top_k=moe.top_k,
        normalize=moe.normalize,
        norm_min=moe.norm_min,
        correction_bias=moe.correction_bias,
        **options,
    )


@dataclasses.dataclass(frozen=True)
class SoftmaxRouter(Part):
    """Picks by softmax; the module is called as `router(rows)` and gives experts and weights.

    With `bias` its product has one.
    """

    name = "softmax"

    bias: bool = False

    @override
    def build(self, config: Any, layer: int, *, dtype: Any, rngs: nnx.Rngs) -> nn.Router:
        return router_of(config, use_bias=self.bias, rngs=rngs)

    @override
    def layer_kind(self, config: Any, layer: int) -> Hashable:
        return self


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig(Part):
    """The mixture-of-experts layers of a decoder; their module is called as `mlp(x)`.

    Attributes:
      num_experts: routed experts per layer.
      top_k: experts that a token goes to.
      intermediate_size: width of one expert.
      layers: indices of the layers that have experts; the others have a dense MLP.
      shared_intermediate_size: width of all shared experts together; 0 for none.
      normalize, norm_min, correction_bias: see `fdq.ops.route.api.route`.
      router: how a token's experts are picked.
    """

    name = "mixture"

    num_experts: int
    top_k: int
    intermediate_size: int
    layers: tuple[int, ...]
    shared_intermediate_size: int = 0
    normalize: bool = True
    norm_min: float = 0.0
    correction_bias: bool = False
    router: Part = SoftmaxRouter()

    def __post_init__(self):
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"experts of a token: expected 1 to {self.num_experts}, the number of experts, "
                f"found {self.top_k}"
            )

    @override
    def build(self, config: Any, layer: int, *, dtype: Any, rngs: nnx.Rngs) -> nn.MoE:
        hidden, width = config.hidden_size, self.shared_intermediate_size
        return nn.MoE(
            self.router.build(config, layer, dtype=dtype, rngs=rngs),
            nn.Experts(
                self.num_experts,
                hidden,
                self.intermediate_size,
                **self.expert_settings(),
                dtype=dtype,
                rngs=rngs,
            ),
            nn.MLP(hidden, width, dtype=dtype, rngs=rngs) if width else None,
        )

    def expert_settings(self) -> dict[str, Any]:
        """What else `nn.Experts` are made with: by default they are SwiGLU without biases."""
        return {}

    @override
    def layer_kind(self, config: Any, layer: int) -> Hashable:
        return self, self.router.layer_kind(config, layer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClampedMoE(MoEConfig):
    """Experts with biases and a clamped SwiGLU (gpt-oss).

    Attributes:
      alpha, limit: see `fdq.ops.gates.ClampedSwiGLU`.
    """

    name = "clamped_mixture"

    alpha: float
    limit: float

    @override
    def expert_settings(self) -> dict[str, Any]:
        return {"use_bias": True, "gate": ClampedSwiGLU(alpha=self.alpha, limit=self.limit)}


class DecoderLayer(nnx.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`.

    Attributes:
      input_layernorm, post_attention_layernorm: the norms of the two halves.
      self_attn: `nn.Attention`, or what is called like it.
      mlp: `nn.MLP`, `nn.MoE`, or what is called like them.
    """

    def __init__(
        self,
        *,
        input_layernorm: nn.RMSNorm,
        self_attn: Any,
        post_attention_layernorm: nn.RMSNorm,
        mlp: Any,
    ):
        self.input_layernorm = input_layernorm
        self.self_attn = self_attn
        self.post_attention_layernorm = post_attention_layernorm
        self.mlp = mlp

    def __call__(
        self,
        x: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        cache: LayerCache | None = None,
        *,
        start: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """`x [B, T, H]` -> the same shape, and the updated cache; see `fdq.nn.Attention`."""
        with jax.named_scope("self_attn"):
            rows = normed(self.input_layernorm, x)
            y, cache = hand_on(self.self_attn, rows, angles, cache, start=start)
            x = x + y
        with jax.named_scope("mlp"):
            return x + hand_on(self.mlp, normed(self.post_attention_layernorm, x)), cache


@dataclasses.dataclass(frozen=True)
class PreNorm(Part):
    """A layer that normalizes what its halves read: `x + half(norm(x))` for both.

    The module is called as `layer(x, angles, cache, layer=, start=)`, see `DecoderLayer`.
    """

    name = "pre_norm"

    @override
    def build(self, config: Any, layer: int, *, dtype: Any, rngs: nnx.Rngs) -> DecoderLayer:
        norms = ("input_layernorm", "post_attention_layernorm")
        return DecoderLayer(**half_modules(config, layer, norms, dtype, rngs))

    @override
    def layer_kind(self, config: Any, layer: int) -> Hashable:
        halves = (config.attention, config.feed_forward(layer))
        return self, *(half.layer_kind(config, layer) for half in halves)


def half_modules(
    config: Any, layer: int, norms: tuple[str, ...], dtype: Any, rngs: nnx.Rngs
) -> dict[str, Any]:
    """The two halves of a layer by name, and norms of the hidden size."""
    settings = {"epsilon": config.rms_norm_epsilon, "dtype": config.norm_dtype or dtype}
    return {
        "self_attn": config.attention.build(config, layer, dtype=dtype, rngs=rngs),
        "mlp": config.feed_forward(layer).build(config, layer, dtype=dtype, rngs=rngs),
        **{name: nn.RMSNorm(config.hidden_size, **settings) for name in norms},
    }


class SandwichLayer(nnx.Module):
    """`x + norm(attention(norm(x)))`, then `x + norm(mlp(norm(x)))`, each norm another.

    Attributes:
      input_layernorm, post_attention_layernorm: around the attention.
      pre_feedforward_layernorm, post_feedforward_layernorm: around the MLP.
      self_attn, mlp: as in `DecoderLayer`.
    """

    def __init__(
        self,
        *,
        input_layernorm: nn.RMSNorm,
        self_attn: Any,
        post_attention_layernorm: nn.RMSNorm,
        pre_feedforward_layernorm: nn.RMSNorm,
        mlp: Any,
        post_feedforward_layernorm: nn.RMSNorm,
    ):
        self.input_layernorm = input_layernorm
        self.self_attn = self_attn
        self.post_attention_layernorm = post_attention_layernorm
        self.pre_feedforward_layernorm = pre_feedforward_layernorm
        self.mlp = mlp
        self.post_feedforward_layernorm = post_feedforward_layernorm

    def __call__(
        self,
        x: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        cache: LayerCache | None = None,
        *,
        start: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """`x [B, T, H]` -> the same shape, and the updated cache; see `fdq.nn.Attention`."""
        with jax.named_scope("self_attn"):
            rows = normed(self.input_layernorm, x)
            y, cache = hand_on(self.self_attn, rows, angles, cache, start=start)
            x = x + self.post_attention_layernorm(y)
        with jax.named_scope("mlp"):
            y = hand_on(self.mlp, normed(self.pre_feedforward_layernorm, x))
            return x + self.post_feedforward_layernorm(y), cache


class Sandwich(PreNorm):
    """A layer that normalizes what its halves read and what they give (Gemma 2 and 3).

    The module is called as `layer(x, angles, cache, start=)`, see `SandwichLayer`.
    """

    name = "sandwich"

    @override
    def build(self, config: Any, layer: int, *, dtype: Any, rngs: nnx.Rngs) -> Any:
        around_attention = ("input_layernorm", "post_attention_layernorm")
        around_mlp = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
        norms = (*around_attention, *around_mlp)
        return SandwichLayer(**half_modules(config, layer, norms, dtype, rngs))


BLOCKS: Registry[type[Part]] = Registry("block", PreNorm, Sandwich)
"""Orders of norms and residuals, by name."""

ATTENTIONS: Registry[type[Part]] = Registry("attention", GroupedQuery)
"""Kinds of attention, by name."""

MLPS: Registry[type[Part]] = Registry("MLP", SwiGLU, GeGLU, MoEConfig, ClampedMoE)
"""Kinds of feed-forward halves, dense ones and mixtures, by name."""

ROUTERS: Registry[type[Part]] = Registry("router", SoftmaxRouter)
"""Kinds of routers, by name."""
