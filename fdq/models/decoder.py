"""The decoder: embeddings, pre-norm layers, a final norm and the output head."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jax.sharding import NamedSharding

from fdq import nn
from fdq.cache.kv_cache import KVCache, LayerScales, layer_specs
from fdq.cache.ring import SPARE
from fdq.models.config import DecoderConfig
from fdq.nn.embedding import check_vocabulary, token_array
from fdq.ops.attention.xla import softcapped
from fdq.ops.placement import mesh_of
from fdq.schemes.recipe import Recipe
from fdq.schemes.scheme import CacheSpec


class Decoder(nnx.Module):
    """A causal language model of any supported family: `model(tokens) -> logits`.

    Paths of its parameters: `embed_tokens.embedding`, `layers.{i}.input_layernorm.scale`,
    `layers.{i}.self_attn.{qkv_proj,o_proj}.kernel`, `layers.{i}.self_attn.{q,k}_norm.scale`,
    `layers.{i}.self_attn.sinks`, `layers.{i}.post_attention_layernorm.scale` (Gemma's also
    `{pre,post}_feedforward_layernorm.scale`), `layers.{i}.mlp.{gate_up_proj,down_proj}.kernel`
    or `layers.{i}.mlp.{router,experts.gate_up_proj,experts.down_proj,
    shared_experts.gate_up_proj,shared_experts.down_proj}.kernel`, `norm.scale` and, unless the
    embeddings are tied, `lm_head.kernel`; a `.bias` beside a kernel where the model has one. Latent
    attention has the kernels that `fdq.nn.LatentAttention` names in place of `qkv_proj`.

    Attributes:
      config: sizes; `config.dtype` is the dtype of activations.
      scheme: name of the scheme that the weights are quantized in, None when they are not.
      recipe_record: how that was decided, as JSON.
      prepared: what was done to the weights before, such as `"rotate,smooth"`; None for nothing.
      tokenizer_path: a tokenizer.json for text prompts, where the checkpoint has one.
      placement: how it lies on a mesh, see `fdq.sharding`; None on one device, and where arrays
        were put on devices by hand. Columns of its fused weights are in the order of devices.
      vocabulary_axes: mesh axes over which logits are cut, in a shard of a model.
    """

    placement: Any = None
    vocabulary_axes: tuple[str, ...] = ()

    def __init__(self, config: DecoderConfig, *, dtype: Any = None, rngs: nnx.Rngs):
        """Random weights, from the stream `params` of `rngs`.

        `dtype` of parameters and activations takes the place of `config.dtype`; the router's
        parameters are float32 in any case.
        """
        if dtype is not None:
            config = config.replace(dtype=jnp.dtype(dtype).name)
        kind = jnp.dtype(config.dtype)
        self.config = config
        self.scheme: str | None = None
        self.recipe_record: str | None = None
        self.prepared: str | None = None
        self.tokenizer_path: str | None = None
        self.embed_tokens = nn.Embedding(
            config.vocab_size, config.hidden_size, dtype=kind, rngs=rngs
        )
        layers = range(config.num_layers)
        self.layers = nnx.List(
            [config.block.build(config, index, dtype=kind, rngs=rngs) for index in layers]
        )
        norm_kind = config.norm_dtype or kind
        self.norm = nn.RMSNorm(config.hidden_size, epsilon=config.rms_norm_epsilon, dtype=norm_kind)
        head = None
        if not config.tie_word_embeddings:
            head = nn.Linear(config.hidden_size, config.vocab_size, dtype=kind, rngs=rngs)
        self.lm_head: Any = nnx.data(head)

    def __call__(
        self,
        tokens: jax.Array | None = None,
        *,
        inputs_embeds: jax.Array | None = None,
        return_hidden_states: bool = False,
    ) -> Any:
        """`tokens [B, L] int` -> logits of each next token, `[B, L, vocab]` float32.

        Without a cache; differentiable.

        Args:
          tokens: [B, L] int.
          inputs_embeds: [B, L, H] float, instead of tokens: what the first layer reads, scaled
            already where the family scales embeddings.
          return_hidden_states: also return what the layers read and made, `[B, L, H]` each:
            `embed_tokens`, `layers.{i}` (its output), `layers.{i}.self_attn` (what attention reads,
            after its norm) and `norm`. In `jax.jit` what nobody uses is not computed.

        Returns:
          The logits, or the pair of them and a dict of hidden states.

        Raises:
          ValueError: neither or both of tokens and embeddings, one of another shape or dtype, or
            tokens outside the vocabulary, as far as values are known.
        """
        if tokens is not None:
            tokens = self._of_vocabulary(tokens)
        given = inputs_embeds if tokens is None else tokens
        if self.placement is not None and given is not None and given.size:
            rows, settings = (tokens, inputs_embeds), (return_hidden_states,)
            out = (("logits", 3), "rows") if return_hidden_states else (("logits", 3),)
            return self.placement.run(self, _logits, rows, settings=settings, out=out)
        with mesh_of(nn.value(self.embed_tokens.embedding), inputs_embeds):
            x = self._embedded(tokens, inputs_embeds)
            b, length, _ = x.shape
            if not b * length:
                return self._of_nothing(x, return_hidden_states)
            positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (b, length))
            states: dict[str, jax.Array] | None = {} if return_hidden_states else None
            hidden, _ = self._layers(x, positions, states=states)
            return (self.head(hidden), states) if return_hidden_states else self.head(hidden)

    def _of_nothing(self, x: jax.Array, return_hidden_states: bool) -> Any:
        """What `__call__` returns of an empty batch or of no tokens, for which nothing runs."""
        logits = jnp.zeros((*x.shape[:-1], self.config.vocab_size), jnp.float32)
        names = ["embed_tokens", "norm"]
        for i, layer in enumerate(self.layers):
            has_norm = hasattr(layer, "input_layernorm")
            names += [f"layers.{i}", *([f"layers.{i}.self_attn"] if has_norm else [])]
        return (logits, dict.fromkeys(names, x)) if return_hidden_states else logits

    def extend(
        self,
        tokens: jax.Array | None,
        cache: KVCache,
        start: jax.Array,
        *,
        lengths: jax.Array | None = None,
        ends: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Runs T more tokens of each sequence and writes their keys and values to the cache.

        Args:
          tokens: [B, T] int.
          cache: holds everything before `start`; its `length` is neither read nor changed.
          start: position of `tokens[:, 0]`: a scalar, or [B] int32. `start + T` must not exceed
            the slots of the cache.
          ends: [B] int32, where the tokens of each sequence end that are to stay in layers that are
            rings, or in blocks; by default all are. Other layers are overwritten from there on.
          lengths: [B] int32, tokens that each sequence has when all of what is being read is, where
            its rotation depends on that (see `fdq.nn.rotary`), or [B, T] those at each token; by
            default up to these tokens.
          inputs_embeds: [B, T, H] float in place of the embeddings of `tokens`, which may be None.

        Returns:
          [B, T, H] final hidden states (see `head`), and the updated cache.
        """
        if self.placement is not None:
            rows = (tokens, cache, jnp.asarray(start), lengths, inputs_embeds, ends)
            return self.placement.run(self, _extended, rows, out=("rows", 1))
        x = self._embedded(tokens if inputs_embeds is None else None, inputs_embeds)
        b, t, _ = x.shape
        first = jnp.broadcast_to(start, (b,)).astype(jnp.int32)
        positions = first[:, None] + jnp.arange(t, dtype=jnp.int32)[None]
        held = cache if ends is None else cache.ending(ends)
        hidden, updated = self._layers(x, positions, held, start, lengths)
        assert updated is not None
        if ends is not None:
            updated = updated.ending(None)
        if cache.reach is not None:
            last = first + t if ends is None else jnp.minimum(first + t, ends)
            updated = dataclasses.replace(updated, reach=jnp.maximum(cache.reach, last))
        return hidden, updated

    def head(self, hidden: jax.Array) -> jax.Array:
        """`hidden [..., H]` from `extend` -> logits `[..., vocab]` float32."""
        if self.placement is not None:
            return self.placement.run(self, _head, (hidden,), out=(("logits", hidden.ndim),))
        with jax.named_scope("lm_head"):
            head = self.embed_tokens.attend if self.lm_head is None else self.lm_head
            logits = head(hidden, out_dtype=jnp.float32)
            if self.config.logit_divisor != 1:
                logits = logits / jnp.float32(self.config.logit_divisor)
            return softcapped(logits, self.config.logit_softcap)

    @property
    def cache_spec(self) -> CacheSpec | None:
        """The KV cache format of the scheme that the model was quantized with; None is C16."""
        if self.recipe_record:
            return Recipe.from_json(self.recipe_record).cache
        return Recipe.parse(self.scheme).cache if self.scheme else None

    @property
    def cache_scales(self) -> list[LayerScales | None] | None:
        """Calibrated KV scales of each layer; None for a model that has none."""
        scales = [layer.self_attn.cache_scales for layer in self.layers]
        return None if all(scale is None for scale in scales) else scales

    def set_cache_scales(self, scales: Sequence[LayerScales | None] | None) -> None:
        """Keeps the KV scales of static formats, one `LayerScales` a layer (or abstract ones).

        They are saved with the model and used by `init_cache`.

        Raises:
          ValueError: scales for another number of layers.
        """
        if scales is None:
            scales = [None] * self.config.num_layers
        if len(scales) != self.config.num_layers:
            raise ValueError(
                f"got KV scales of {len(scales)} layers, expected {self.config.num_layers}"
            )
        for layer, one in zip(self.layers, scales, strict=True):
            layer.self_attn.set_cache_scales(one)

    def init_cache(
        self,
        batch: int,
        max_length: int,
        format: str | CacheSpec | Sequence[str | CacheSpec | None] | None = None,
        *,
        sharding: NamedSharding | None = None,
        spare: int = SPARE,
    ) -> KVCache:
        """An empty KV cache for `batch` sequences of up to `max_length` tokens.

        In the format of the model's scheme, or in another `format`, or one for each layer; with
        the model's calibrated scales. `sharding` and `spare` are as in
        `KVCache.init`.
        """
        format = self.cache_spec if format is None else format
        specs = layer_specs(format, self.config.num_layers)
        static = any(spec is not None and spec.calibrated for spec in specs)
        scales = self.cache_scales if static else None
        settings: dict[str, Any] = {"sharding": sharding}
        if self.placement is not None and sharding is None:
            settings = self.placement.cache_settings
            scales = self.placement.cache_scales(scales)
        settings |= {"scales": scales, "spare": spare}
        return KVCache.init(self.config, batch, max_length, specs, **settings)

    def _of_vocabulary(self, tokens: Any) -> jax.Array:
        """Tokens as an array, checked as far as values are known."""
        if isinstance(tokens, jax.Array) and (
            isinstance(tokens, Tracer) or not tokens.is_fully_addressable
        ):
            return tokens
        found = token_array("tokens", tokens)
        self._shape(found)
        check_vocabulary("tokens", found, self.config.vocab_size)
        return tokens if isinstance(tokens, jax.Array) else jnp.asarray(found, jnp.int32)

    @staticmethod
    def _shape(tokens: Any) -> tuple[int, int]:
        if len(tokens.shape) != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens: expected integers [B, L], found {tokens.dtype} of shape {tokens.shape}."
            )
        return tokens.shape[0], tokens.shape[1]

    def _embedded(self, tokens: Any, inputs_embeds: Any) -> jax.Array:
        if (tokens is None) == (inputs_embeds is None):
            raise ValueError("expected tokens or inputs_embeds, one of the two.")
        dtype = jnp.dtype(self.config.dtype)
        if inputs_embeds is None:
            self._shape(tokens)
            with jax.named_scope("embed_tokens"):
                x, scale = self.embed_tokens(tokens, dtype), self.config.embedding_scale
                return x if scale == 1 else x * jnp.asarray(scale, dtype)
        shape, width = getattr(inputs_embeds, "shape", ()), self.config.hidden_size
        kind = getattr(inputs_embeds, "dtype", None)
        if len(shape) != 3 or shape[-1] != width or not jnp.issubdtype(kind or int, jnp.floating):
            raise ValueError(
                f"inputs_embeds: expected an array of floats [B, L, {width}], found "
                f"{kind or type(inputs_embeds).__name__} of shape {shape}."
            )
        return inputs_embeds.astype(dtype)

    def _layers(
        self,
        x: jax.Array,
        positions: jax.Array,
        cache: KVCache | None = None,
        start: jax.Array | None = None,
        lengths: jax.Array | None = None,
        states: dict[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        config = self.config
        kept: dict[str, jax.Array] = {} if states is None else states
        kinds = [config.rotary_of(index) for index in range(len(self.layers))]
        angles = {
            one: nn.rotary_angles(positions, one, config.head_dim, lengths=lengths)
            for one in dict.fromkeys(kinds)
        }
        kept["embed_tokens"] = x
        # Unrolled: each weight is an argument of its own, and slicing stacked weights copies.
        stored = []
        for index, layer in enumerate(self.layers):
            one = None if cache is None else cache.layers[index]
            norm = getattr(layer, "input_layernorm", None)
            if states is not None and norm is not None:
                states[f"layers.{index}.self_attn"] = norm(x)
            with jax.named_scope(f"layers.{index}"):
                x, one = layer(x, angles[kinds[index]], one, start=start)
            kept[f"layers.{index}"] = x
            stored.append(one)
        if cache is not None:
            cache = dataclasses.replace(cache, layers=tuple(stored))
        with jax.named_scope("norm"):
            x = kept["norm"] = self.norm(x)
        return x, cache


# What a placement runs with the model that each device has.


def _logits(model: Decoder, tokens: Any, embeds: Any, return_hidden_states: bool) -> Any:
    return model(tokens, inputs_embeds=embeds, return_hidden_states=return_hidden_states)


def _extended(
    model: Decoder, tokens: Any, cache: KVCache, start: Any, lengths: Any, embeds: Any, ends: Any
) -> tuple[jax.Array, KVCache]:
    return model.extend(tokens, cache, start, lengths=lengths, ends=ends, inputs_embeds=embeds)


def _head(model: Decoder, hidden: jax.Array) -> jax.Array:
    return model.head(hidden)


def abstract(config: DecoderConfig, dtype: Any = None) -> Decoder:
    """The decoder with `jax.ShapeDtypeStruct` in place of arrays, whatever its size.

    Of layers that are alike one is traced, and copied: a trace of each takes 10 ms.
    """
    if dtype is not None:
        config = config.replace(dtype=jnp.dtype(dtype).name)
    bare = config.replace(num_layers=0)
    model = nnx.eval_shape(lambda: Decoder(bare, rngs=nnx.Rngs(params=0)))
    made: dict[Any, nnx.Module] = {}
    layers = []
    for layer in range(config.num_layers):
        kind = _kind_of(config, layer)
        if kind not in made:
            made[kind] = abstract_layer(config, layer)
        graphdef, state = nnx.split(made[kind])
        # Weights of its own: one that two layers have counts once.
        own = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state)
        layers.append(nnx.merge(graphdef, own))
    model.config, model.layers = config, nnx.List(layers)
    return model


def _kind_of(config: DecoderConfig, layer: int) -> Any:
    """Equal for layers that are the same module: the parts of fdq tell them by their windows."""
    parts = (config.block, config.attention, config.feed_forward(layer))
    if not all(type(part).__module__.startswith("fdq.models.") for part in parts):
        return layer  # parts that are somebody's own may differ in what is no parameter
    return config.block.layer_kind(config, layer), config.sliding_window(layer)


def abstract_layer(config: DecoderConfig, layer: int) -> nnx.Module:
    """One layer of `abstract(config)`."""
    dtype = jnp.dtype(config.dtype)
    return nnx.eval_shape(
        lambda: config.block.build(config, layer, dtype=dtype, rngs=nnx.Rngs(params=0))
    )
