"""SmolLM3: Llama, some of whose layers do not rotate positions."""

from typing import Any

from fdq.models.config import DecoderConfig
from fdq.models.config_reader import ConfigReader
from fdq.models.family import Family


def _read(reader: ConfigReader) -> DecoderConfig:
    """`no_rope_layers` has a 1 for each layer that rotates; by default each fourth does not."""
    reader.usual(num_key_value_heads=4, max_position_embeddings=32768)
    reader.usual(pad_token_id=128004, bos_token_id=128000, eos_token_id=128001)
    fields = reader.base(epsilon=1e-6, tie=True)
    bias = reader.flag("attention_bias", default=False)
    layers = range(fields["num_layers"])
    every = reader.integer("no_rope_layer_interval", default=4, least=1)
    usual = [int((layer + 1) % every != 0) for layer in layers]
    rotates = reader.integers("no_rope_layers", default=usual)
    if len(rotates) < len(layers) or not set(rotates) <= {0, 1}:
        raise reader.wrong(("no_rope_layers",), f"0 or 1 for each of {len(layers)} layers", rotates)
    mlp_bias = reader.flag("mlp_bias", default=False)
    rotary = reader.rotary(theta=2000000.0)
    reader.full_attention()
    return DecoderConfig(
        **fields,
        rotary=rotary,
        unrotated_layers=tuple(layer for layer in layers if not rotates[layer]),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=mlp_bias,
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    layers = range(config.num_layers)
    return {
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "no_rope_layers": [int(layer not in config.unrotated_layers) for layer in layers],
    }


FAMILY = Family(name="smollm3", read=_read, architecture="SmolLM3ForCausalLM", write=_write)
