"""Models in NumPy and float64, which quantize activations by definition."""

import ml_dtypes
import numpy as np

import fdq
from fdq import nn
from fdq.nn.rotary import inverse_frequencies


def array(variable):
    held = nn.value(variable)
    return np.asarray(fdq.dequantize(held) if isinstance(held, fdq.QTensor) else held, np.float64)


def rounded(x, spec):
    """x with one scale a token, in int8 or float8 e4m3."""
    if spec is None:
        return x
    assert spec.granularity == "token"
    bound = {"int8": 127, "float8_e4m3": 448}[spec.format]
    scale = np.abs(x).max(-1, keepdims=True) / bound
    codes = np.clip(x / scale, -bound, bound)
    if spec.format == "int8":
        return np.rint(codes) * scale
    return codes.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


def linear(layer, x, expert=None):
    kernel = array(layer.kernel)
    x = rounded(x, layer.activation)
    if expert is None:
        return x @ kernel
    return np.einsum("btk,btkn->btn", x, kernel[expert])


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def norm(layer, x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + layer.epsilon) * array(layer.scale)


def feed_forward(layer, x, expert=None):
    gate, up = np.split(linear(layer.gate_up_proj, x, expert), 2, -1)
    return linear(layer.down_proj, gate / (1 + np.exp(-gate)) * up, expert)


def mixture(layer, x):
    router = layer.router
    p = softmax(x @ array(router.kernel))
    order = np.argsort(-(p + array(router.correction_bias)), axis=-1, kind="stable")
    chosen = order[..., : router.top_k]
    weights = np.take_along_axis(p, chosen, -1)
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), router.norm_min)
    y = feed_forward(layer.shared_experts, x)
    for i in range(router.top_k):
        y = y + weights[..., i : i + 1] * feed_forward(layer.experts, x, chosen[..., i])
    return y


def attention(layer, x, turn):
    b, t, _ = x.shape
    heads, kv_heads, d = layer.num_heads, layer.num_kv_heads, layer.head_dim
    qkv = linear(layer.qkv_proj, x).reshape(b, t, -1, d)
    q, k, v = np.split(qkv, (heads, heads + kv_heads), axis=2)

    def rotated(y):  # interleaved: pairs are complex numbers
        pairs = (y[..., ::2] + 1j * y[..., 1::2]) * turn[None, :, None]
        return np.stack([pairs.real, pairs.imag], axis=-1).reshape(y.shape)

    k, v = (np.repeat(a, heads // kv_heads, axis=2) for a in (rotated(k), v))
    scores = np.einsum("bthd,bshd->bhts", rotated(q), k) * d**-0.5
    visible = np.tril(np.ones((t, t), bool))
    if layer.sliding_window is not None:
        visible &= ~np.tril(visible, -layer.sliding_window)
    p = softmax(np.where(visible, scores, -np.inf))
    return linear(layer.o_proj, np.einsum("bhts,bshd->bthd", p, v).reshape(b, t, -1))


def turns(config, count):
    """What rotates the pairs of each position: complex [count, head_dim / 2]."""
    frequencies = inverse_frequencies(config.rotary, config.head_dim).astype(np.float64)
    return np.exp(1j * np.arange(count)[:, None] * frequencies)


def emulated(model, tokens):
    """Logits [B, T, vocab] of an ERNIE-4.5 mixture of experts with tied embeddings."""
    config, table = model.config, array(model.embed_tokens.embedding)
    turn = turns(config, tokens.shape[1])
    x = table[tokens]
    for layer in model.layers:
        x = x + attention(layer.self_attn, norm(layer.input_layernorm, x), turn)
        half = mixture if isinstance(layer.mlp, nn.MoE) else feed_forward
        x = x + half(layer.mlp, norm(layer.post_attention_layernorm, x))
    return norm(model.norm, x) @ table.T
