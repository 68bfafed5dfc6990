"""What a decoder is built from: sizes, rotary positions, experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fdq.nn.rotary import RotaryConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The mixture-of-experts layers of a decoder.

    Attributes:
      num_experts: routed experts per layer.
      top_k: experts that a token goes to.
      intermediate_size: width of one expert.
      layers: indices of the layers that have experts; the others have a dense MLP.
      shared_intermediate_size: width of all shared experts together; 0 for none.
      normalize, norm_min, correction_bias: see `fdq.nn.router.route`.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    layers: tuple[int, ...]
    shared_intermediate_size: int = 0
    normalize: bool = True
    norm_min: float = 0.0
    correction_bias: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A pre-norm decoder with grouped-query attention and SwiGLU.

    Attributes:
      model_type: the family, as Hugging Face names it.
      vocab_size, hidden_size, intermediate_size, num_layers: sizes; `intermediate_size` is that
        of the dense layers.
      num_heads, num_kv_heads, head_dim: attention; `num_heads * head_dim` need not be
        `hidden_size`.
      rms_norm_epsilon: of every norm.
      rotary: how positions turn into angles.
      max_position: tokens the model was made for; not enforced.
      tie_word_embeddings: the output head is the embedding table.
      qkv_bias, output_bias, mlp_bias: which linear layers have a bias; `output_bias` is that of
        the attention's output projection.
      qk_norm: RMSNorm over head_dim of queries and keys (Qwen3).
      moe: the layers with experts, or None.
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
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
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
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype {self.dtype!r}: expected float32, bfloat16 or float16")

    def replace(self, **changes: Any) -> DecoderConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts, lists, numbers and strings: what a manifest stores."""
        return dataclasses.asdict(self) | {"eos_token_ids": list(self.eos_token_ids)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> DecoderConfig:
        """The config that `to_dict` was called on.

        Raises:
          ValueError: unknown or missing fields, named.
        """
        fields = dict(fields)
        fields["eos_token_ids"] = tuple(fields.get("eos_token_ids", ()))
        fields["rotary"] = _construct(RotaryConfig, "rotary", fields.get("rotary"))
        if fields.get("moe") is not None:
            moe = dict(fields["moe"])
            moe["layers"] = tuple(moe.get("layers", ()))
            fields["moe"] = _construct(MoEConfig, "moe", moe)
        return _construct(cls, "config", fields)


def _construct(cls: Any, name: str, fields: Any) -> Any:
    if not isinstance(fields, Mapping):
        raise ValueError(f"model {name}: expected a mapping, got {type(fields).__name__}")
    known = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(fields) - set(known))
    missing = sorted(
        key
        for key, field in known.items()
        if field.default is dataclasses.MISSING and key not in fields
    )
    if unknown or missing:
        raise ValueError(f"model {name}: unknown fields {unknown}, missing fields {missing}")
    return cls(**fields)
