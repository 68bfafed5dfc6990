"""What a decoder is built from: sizes, rotary positions, and the parts of its layers."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from fdq.models.parts import (
    ATTENTIONS,
    BLOCKS,
    MLPS,
    ROUTERS,
    GroupedQuery,
    MoEConfig,
    Part,
    PreNorm,
    SoftmaxRouter,
    SwiGLU,
)
from fdq.nn.rotary import RotaryConfig
from fdq.registry import Registry

# Fields that hold a part: the kinds that it may be of, and the one that is meant without a name.
_PARTS: dict[str, tuple[Registry[type[Part]], type[Part]]] = {
    "block": (BLOCKS, PreNorm),
    "attention": (ATTENTIONS, GroupedQuery),
    "mlp": (MLPS, SwiGLU),
    "moe": (MLPS, MoEConfig),
    "router": (ROUTERS, SoftmaxRouter),
}

# What few rotations have: stored only where it is not the usual.
_STRETCHES = (
    "partial_factor", "attention_factor", "beta_fast", "beta_slow", "truncate", "short_factor",
    "long_factor",
)  # fmt: skip
# Likewise of few decoders.
_RARE = (
    *("sliding_windows", "local_rotary", "embedding_scale", "norm_dtype", "logit_softcap"),
    *("unrotated_layers", "logit_divisor"),
    *_PARTS,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder: by default pre-norm, with grouped-query attention and SwiGLU.

    Attributes:
      model_type: the family, as Hugging Face names it.
      vocab_size, hidden_size, intermediate_size, num_layers: sizes; `intermediate_size` is that
        of the dense layers.
      num_heads, num_kv_heads, head_dim: attention; `num_heads * head_dim` need not be
        `hidden_size`.
      rms_norm_epsilon: of every norm.
      norm_dtype: of every norm's scale; None for `dtype`.
      rotary: how positions turn into angles.
      local_rotary: the same in layers with a sliding window, where that is another (Gemma 3).
      unrotated_layers: those whose queries and keys are not rotated at all (SmolLM3).
      max_position: tokens the model was made for; not enforced.
      tie_word_embeddings: the output head is the embedding table.
      embedding_scale: what the embeddings of tokens are multiplied by, in `dtype` (Gemma).
      logit_divisor: logits are divided by it (Granite).
      logit_softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2); None leaves them.
      qkv_bias, output_bias, mlp_bias: which linear layers have a bias; `output_bias` is that of
        the attention's output projection.
      qk_norm: RMSNorm over head_dim of queries and keys (Qwen3).
      sliding_windows: for each layer how many tokens a query sees, its own included; None sees
        all before it, and () stands for None in every layer.
      block, attention, mlp: the parts that layers are put together from, see `fdq.models.parts`.
      moe: the layers with experts, or None: their part in place of `mlp`.
      bos_token_id, eos_token_ids, pad_token_id: special tokens, where the config names them.
      dtype: of parameters and activations: `float32`, `bfloat16` or `float16`.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_epsilon: float
    rotary: RotaryConfig
    max_position: int = 131072
    tie_word_embeddings: bool = False
    norm_dtype: str | None = None
    local_rotary: RotaryConfig | None = None
    unrotated_layers: tuple[int, ...] = ()
    embedding_scale: float = 1.0
    logit_divisor: float = 1.0
    logit_softcap: float | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    block: Part = dataclasses.field(default=PreNorm())
    attention: Part = dataclasses.field(default=GroupedQuery())
    mlp: Part = dataclasses.field(default=SwiGLU())
    moe: MoEConfig | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    dtype: str = "bfloat16"

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads (={self.num_heads}) must be divisible by "
                f"num_kv_heads (={self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim (={self.head_dim}) must be even")
        self.rotary.rotated(self.head_dim)
        if self.local_rotary is not None:
            self.local_rotary.rotated(self.head_dim)
            if self.local_rotary.by_length:
                raise ValueError(
                    f"local_rotary: rope_type {self.local_rotary.rope_type!r} depends on the "
                    "length of a sequence, which is not supported in sliding windows"
                )
            if self.local_rotary.interleaved != self.rotary.interleaved:
                raise ValueError("local_rotary and rotary must both be interleaved, or neither")
        if self.sliding_windows and len(self.sliding_windows) < self.num_layers:
            raise ValueError(
                f"sliding_windows has {len(self.sliding_windows)} entries, expected one for each "
                f"of {self.num_layers} layers"
            )
        if any(window is not None and window < 1 for window in self.sliding_windows):
            raise ValueError(f"sliding_windows (={self.sliding_windows}) must be positive or None")
        for name, found in (("dtype", self.dtype), ("norm_dtype", self.norm_dtype or self.dtype)):
            if found not in ("float32", "bfloat16", "float16"):
                raise ValueError(f"{name} {found!r}: expected float32, bfloat16 or float16")

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def sliding_window(self, layer: int) -> int | None:
        """The sliding window of a layer, in tokens; None sees all."""
        return self.sliding_windows[layer] if self.sliding_windows else None

    def rotary_of(self, layer: int) -> RotaryConfig:
        """How positions turn into angles in a layer."""
        if layer in self.unrotated_layers:
            return RotaryConfig(rope_type="none", interleaved=self.rotary.interleaved)
        local = self.local_rotary if self.sliding_window(layer) is not None else None
        return self.rotary if local is None else local

    def feed_forward(self, layer: int) -> Part:
        """The part of a layer that follows its attention: `moe` or `mlp`."""
        return self.moe if self.moe is not None and layer in self.moe.layers else self.mlp

    def stored(self, layer: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Heads and channels of what a cache has of a token in a layer: keys and values."""
        return self.attention.stored(self, layer)

    def ring_window(self, layer: int) -> int | None:
        """The window of a layer whose cache keeps little more than it sees; None keeps all."""
        return self.attention.ring_window(self, layer)

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts, lists, numbers and strings: what a manifest stores.

        Parts, windows and what stretches a context are left out where they are the usual ones (no
        `moe`, no windows).
        """
        return _stored(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The config that `to_dict` was called on.

        Raises:
          ValueError: unknown or missing fields, named; a part that no registry has.
        """
        rotaries = {"rotary": fields.get("rotary"), "local_rotary": fields.get("local_rotary")}
        for key, found in rotaries.items():
            if found is not None or key == "rotary":
                rotaries[key] = _construct(RotaryConfig, key, found)
        return _construct(cls, "config", {**fields, **rotaries})


def _stored(obj: Any) -> Any:
    """What a manifest stores of a config, of a part, and of any other field of them."""
    if not dataclasses.is_dataclass(obj):
        return list(obj) if isinstance(obj, tuple) else obj
    fields = {}
    for field in dataclasses.fields(obj):
        found = getattr(obj, field.name)
        new = isinstance(obj, RotaryConfig) and field.name in _STRETCHES
        if (new or field.name in _RARE) and found == field.default:
            continue
        fields[field.name] = _stored(found)
        if field.name in _PARTS and found.name != _PARTS[field.name][1].name:
            fields[field.name]["name"] = found.name
    return fields


def _construct(cls: Any, name: str, fields: Any) -> Any:
    if not isinstance(fields, Mapping):
        raise ValueError(f"model {name}: expected a mapping, got {type(fields).__name__}")
    fields = {key: tuple(x) if isinstance(x, list) else x for key, x in fields.items()}
    for key, (kinds, usual) in _PARTS.items():
        if fields.get(key) is not None:
            part = dict(fields[key])
            kind = kinds[part.pop("name", usual.name)]
            fields[key] = _construct(kind, key, part)
    known = {field.name: field.default for field in dataclasses.fields(cls)}
    needed = {key for key, default in known.items() if default is dataclasses.MISSING}
    unknown, missing = sorted(set(fields) - set(known)), sorted(needed - set(fields))
    if unknown or missing:
        raise ValueError(f"model {name}: unknown fields {unknown}, missing fields {missing}")
    return cls(**fields)
