"""Rotation of a decoder's residual stream and values: outlier channels are spread over all.

An orthogonal Q is folded into the weights offline (QuaRot, arXiv 2404.00456; SpinQuant's R1 and R2,
arXiv 2405.16406), so that the model is the same function and costs the same at run time: what
writes to the residual stream (embeddings, output projections) is multiplied by Q, what reads it by
its transpose, and RMS norms do not see the difference once their scales are folded into what
follows them. Values and the output projection's rows are turned head by head. Tied embeddings
become an output head of their own, as the scale of the last norm is folded into one of both only.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdq import nn
from fdq.models.decoder import Decoder
from fdq.models.parts import DecoderLayer
from fdq.nn.parameters import value

LARGEST_FACTOR = 512
"""Of a size, its odd factor at most: that much is turned by a dense matrix."""


@dataclasses.dataclass(frozen=True)
class Rotation:
    """A random orthogonal matrix of `size` rows: of signs, Hadamard and, for odd factors, dense.

    With `size = m 2^k`, m odd: `diag(signs) (O_m x H_{2^k})`, H the Hadamard matrix over the root
    of its size, O_m from the QR decomposition of normal numbers.
    """

    size: int
    seed: int = 0

    def __post_init__(self):
        if self.odd > LARGEST_FACTOR:
            raise ValueError(
                f"A rotation of {self.size} channels: the odd factor {self.odd} is above "
                f"{LARGEST_FACTOR}, which is turned by a dense matrix. Leave this model unrotated."
            )

    @property
    def odd(self) -> int:
        """The largest odd factor of the size."""
        return self.size // (self.size & -self.size)

    @functools.cached_property
    def signs(self) -> np.ndarray:
        """float32 `[size]` of 1 and -1."""
        rng = np.random.default_rng([self.size, self.seed])
        return rng.choice(np.array([-1, 1], np.float32), self.size)

    @functools.cached_property
    def factor(self) -> np.ndarray:
        """O_m, float32 `[m, m]`."""
        rng = np.random.default_rng([self.odd, self.seed, 1])
        q, r = np.linalg.qr(rng.standard_normal((self.odd, self.odd)))
        return (q * np.sign(np.diagonal(r))).astype(np.float32)

    def __call__(self, x: Any, axis: int = -1) -> jax.Array:
        """`x Q` along an axis, float32."""
        x = jnp.moveaxis(jnp.asarray(x).astype(jnp.float32), axis, -1)
        turned = _turned(x, jnp.asarray(self.signs), jnp.asarray(self.factor))
        return jnp.moveaxis(turned, -1, axis)


@jax.jit
def _turned(x: jax.Array, signs: jax.Array, factor: jax.Array) -> jax.Array:
    *lead, size = x.shape
    m = factor.shape[0]
    y = (x * jnp.broadcast_to(signs, x.shape)).reshape(*lead, m, size // m)
    y = jnp.einsum("...mh,mn->...nh", y, factor, precision=jax.lax.Precision.HIGHEST)
    length = 1
    while length < size // m:
        pairs = y.reshape(*lead, m, -1, 2, length)
        y = jnp.stack(
            [pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], axis=-2
        )
        length *= 2
    return y.reshape(x.shape) * jnp.float32((size // m) ** -0.5)


def rotated(model: Decoder, *, seed: int = 0) -> Decoder:
    """A model that is the same function, of rotated weights; `model` is not changed.

    Statistics of the original say nothing about it: calibrate what this returns. Weights keep their
    dtype, so of bfloat16 ones the function is the same but for their rounding.

    Args:
      model: a float decoder of pre-norm layers with grouped-query attention.
      seed: of the signs, and of dense factors.

    Raises:
      TypeError: no `fdq.models.Decoder`.
      ValueError: a model that is quantized or on a mesh, has norms after its halves or another
        attention, or sizes with a large odd factor; the message says which.
    """
    check_float(model, "rotated")
    for number, layer in enumerate(model.layers):
        if type(layer) is not DecoderLayer or type(layer.self_attn) is not nn.Attention:
            raise ValueError(
                f"layers.{number}: a {type(layer).__name__} with {type(layer.self_attn).__name__} "
                "cannot be rotated; pre-norm layers with fdq.nn.Attention can."
            )
        _halves(layer.mlp, f"layers.{number}.mlp")
    turn = Rotation(model.config.hidden_size, seed)
    result = nnx.clone(model)
    if result.lm_head is None:
        result.config = result.config.replace(tie_word_embeddings=False)
        kernel = value(result.embed_tokens.embedding).T
        head = nnx.eval_shape(lambda: nn.Linear(*kernel.shape, rngs=nnx.Rngs(0)))
        head.kernel = nnx.data(nnx.Param(kernel))
        result.lm_head = nnx.data(head)
    _set(result.embed_tokens, "embedding", turn)
    for layer in result.layers:
        attention, mlp = layer.self_attn, layer.mlp
        _read(layer.input_layernorm, [attention.qkv_proj], turn)
        _turn_values(attention, seed)
        _write(attention.o_proj, turn)
        readers, writers = _halves(mlp)
        _read(layer.post_attention_layernorm, readers, turn)
        for writer in writers:
            _write(writer, turn)
    _read(result.norm, [result.lm_head], turn)
    tell(result, "rotate")
    return result


def tell(model: Decoder, name: str) -> None:
    """Notes on the model that its weights are no longer those of the original."""
    model.prepared = name if model.prepared is None else f"{model.prepared},{name}"


def check_float(model: Any, what: str) -> None:
    """TypeError or ValueError where a model's weights cannot be changed by hand."""
    if not isinstance(model, Decoder):
        raise TypeError(f"{what}: expected an fdq.models.Decoder, found {type(model).__name__}.")
    if model.scheme is not None:
        raise ValueError(f"{what}: the model is quantized ({model.scheme}); give the float one.")
    if model.placement is not None:
        raise ValueError(f"{what}: the model is on a mesh; fdq.unshard it first.")


def _halves(mlp: Any, path: str = "mlp") -> tuple[list[Any], list[Any]]:
    """Of a feed-forward half what reads the residual stream, and what writes to it."""
    if type(mlp) is nn.MLP:
        return [mlp.gate_up_proj], [mlp.down_proj]
    if type(mlp) is not nn.MoE or type(mlp.router) is not nn.Router:
        found = type(mlp).__name__
        found += f" with {type(mlp.router).__name__}" if isinstance(mlp, nn.MoE) else ""
        raise ValueError(
            f"{path}: a {found} cannot be rotated; fdq.nn.MLP, and MoE with fdq.nn.Router, can."
        )
    readers, writers = [mlp.router, mlp.experts.gate_up_proj], [mlp.experts.down_proj]
    if mlp.shared_experts is not None:
        readers.append(mlp.shared_experts.gate_up_proj)
        writers.append(mlp.shared_experts.down_proj)
    return readers, writers


def _set(owner: Any, name: str, change: Callable[[jax.Array], jax.Array]) -> None:
    """A parameter changed in float32 and rounded to its dtype; another one: clones share them."""
    old = value(getattr(owner, name))
    new = change(old.astype(jnp.float32)).astype(old.dtype)
    setattr(owner, name, nnx.data(nnx.Param(new)))


def _read(norm: Any, readers: list[Any], turn: Rotation) -> None:
    scale = value(norm.scale).astype(jnp.float32)

    def change(kernel: jax.Array) -> jax.Array:
        column = scale.reshape((1,) * (kernel.ndim - 2) + (-1, 1))
        return turn(kernel * column, axis=-2)

    for reader in readers:
        _set(reader, "kernel", change)
    _set(norm, "scale", jnp.ones_like)


def _write(writer: Any, turn: Rotation) -> None:
    _set(writer, "kernel", turn)
    if writer.bias is not None:
        _set(writer, "bias", turn)


def _turn_values(attention: nn.Attention, seed: int) -> None:
    """Values of a head by one rotation, and the rows of the output projection that read them."""
    size = attention.head_dim
    turn, width = Rotation(size, seed + 1), attention.num_kv_heads * size

    def columns(a: jax.Array) -> jax.Array:
        values = a[..., -width:].reshape(*a.shape[:-1], -1, size)
        return jnp.concatenate([a[..., :-width], turn(values).reshape(*a.shape[:-1], width)], -1)

    def rows(a: jax.Array) -> jax.Array:
        return turn(a.reshape(-1, size, a.shape[1]), axis=1).reshape(a.shape)

    _set(attention.qkv_proj, "kernel", columns)
    if attention.qkv_proj.bias is not None:
        _set(attention.qkv_proj, "bias", columns)
    _set(attention.o_proj, "kernel", rows)
