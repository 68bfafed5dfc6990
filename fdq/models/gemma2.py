"""Gemma 2: norms around both halves, scales that are stored less 1, scores and logits capped."""

from typing import Any

from fdq.models import config_writer
from fdq.models.config import DecoderConfig
from fdq.models.config_reader import FULL, SLIDING, ConfigReader
from fdq.models.family import Family, Rule
from fdq.models.parts import GeGLU, GroupedQuery, Sandwich

_NORMS = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
    "post_feedforward_layernorm", "self_attn.q_norm", "self_attn.k_norm",
)  # fmt: skip

TENSOR_NAMES = (
    Rule("norm.scale", ("model.norm.weight",), "plus_one"),
    *(
        Rule(f"layers.{{i}}.{norm}.scale", (f"model.layers.{{i}}.{norm}.weight",), "plus_one")
        for norm in _NORMS
    ),
)
"""Of Gemma 2 and 3."""


def read_base(reader: ConfigReader, pattern: int) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common; one of `pattern` layers sees everything."""
    reader.usual(head_dim=256, sliding_window=4096)
    reader.usual(bos_token_id=2, eos_token_id=1, pad_token_id=0)
    gelu = ("hidden_activation", "gelu_pytorch_tanh")
    fields = reader.base(epsilon=1e-6, tie=True, activation=gelu)
    layers = range(fields["num_layers"])
    windows = reader.window_by_layer([SLIDING if (i + 1) % pattern else FULL for i in layers])
    bias = reader.flag("attention_bias", default=False)
    scalar = reader.integer("query_pre_attn_scalar", default=256, least=1)
    return fields | {
        "qkv_bias": bias,
        "output_bias": bias,
        "norm_dtype": "float32",
        "embedding_scale": fields["hidden_size"] ** 0.5,
        "sliding_windows": windows,
        "block": Sandwich(),
        "attention": GroupedQuery(
            scale=scalar**-0.5, softcap=_softcap(reader, "attn_logit_softcapping")
        ),
        "mlp": GeGLU(),
        "logit_softcap": _softcap(reader, "final_logit_softcapping"),
    }


def write_base(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of `read_base`; a key that is silent would mean what Gemma usually has."""
    attention = config_writer.part(config, "attention", GroupedQuery)
    scale = config.head_dim**-0.5 if attention.scale is None else attention.scale
    return {
        **config_writer.tokens(config),
        **config_writer.window_by_layer(config),
        "attention_bias": config.qkv_bias,
        "query_pre_attn_scalar": round(scale**-2),
        "attn_logit_softcapping": attention.softcap,
        "final_logit_softcapping": config.logit_softcap,
    }


def _softcap(reader: ConfigReader, key: str) -> float | None:
    """A number above 0; null is none."""
    if reader.get(key, default=None) is None:
        return None
    found = reader.number(key)
    if not found:
        raise reader.wrong((key,), "a positive number", found)
    return found


def _read(reader: ConfigReader) -> DecoderConfig:
    reader.usual(num_key_value_heads=4, max_position_embeddings=8192)
    reader.usual(final_logit_softcapping=30.0, attn_logit_softcapping=50.0)
    fields = read_base(reader, pattern=2)
    return DecoderConfig(**fields, rotary=reader.rotary(theta=10000.0))


FAMILY = Family(
    name="gemma2",
    read=_read,
    tensor_names=TENSOR_NAMES,
    architecture="Gemma2ForCausalLM",
    write=write_base,
)
