"""Shapes of parameters, which recipes are matched with."""

import jax
import jax.numpy as jnp


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def moe_params(layers=3, dense_layers=1):
    """Shapes of an ERNIE-4.5-MoE, under fdq's own names."""

    def layer(index):
        mlp = {
            "gate_up_proj": {"kernel": struct(128, 512)},
            "down_proj": {"kernel": struct(256, 128)},
        }
        if index >= dense_layers:
            mlp = {
                "router": {"kernel": struct(128, 4, dtype=jnp.float32)},
                "experts": {
                    "gate_up_proj": {"kernel": struct(4, 128, 256)},
                    "down_proj": {"kernel": struct(4, 128, 128)},
                },
                "shared_experts": mlp,
            }
        return {
            "input_layernorm": {"scale": struct(128)},
            "self_attn": {
                "qkv_proj": {"kernel": struct(128, 256)},
                "o_proj": {"kernel": struct(128, 128)},
            },
            "mlp": mlp,
        }

    return {
        "embed_tokens": {"embedding": struct(512, 128)},
        "layers": [layer(i) for i in range(layers)],
        "norm": {"scale": struct(128)},
        "lm_head": {"kernel": struct(128, 512)},
    }
