"""Channels of a decoder that can be made smaller where they are written and larger where read.

A norm's scale divided by s, channel by channel, and the rows of what reads its output multiplied by
s: the model is the same function. So it is of values and the output projection, and of the linear
half of a gated MLP and the projection down. Which s suits quantization is up to
`fdq.quantizers.smooth` and `fdq.quantizers.awq`; what is changed here is the model and what
calibration knows of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdq import nn
from fdq.calibration.statistics import Calibration
from fdq.models.decoder import Decoder
from fdq.models.granite import ScaledLayer
from fdq.models.parts import DecoderLayer, SandwichLayer
from fdq.nn.parameters import value
from fdq.ops.gates import geglu, swiglu
from fdq.quantizers.rotated import check_float
from fdq.schemes.path_pattern import compiled


@dataclasses.dataclass(frozen=True)
class Joint:
    """Channels between layers.

    Attributes:
      path: of what writes them, or of the layer that the writer is a part of.
      readers: paths of kernels `[..., K, N]` whose rows they are.
      writers: paths of a norm's scale, or of a kernel and its bias.
      start: first of the channels on the last axis of writers, which they are to the end of.
      channel: of each row of a reader the channel that it reads, int `[K]`.
    """

    path: str
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    start: int
    channel: np.ndarray

    @property
    def size(self) -> int:
        """Channels, of which several rows may read one."""
        return int(self.channel.max()) + 1

    def largest(self, of_rows: np.ndarray) -> np.ndarray:
        """Of each channel the largest number of its rows: `[K]` -> `[size]`."""
        out = np.zeros(self.size, np.float32)
        np.maximum.at(out, self.channel, of_rows.astype(np.float32))
        return out


def joints(model: Decoder, only: Any = None) -> Iterator[Joint]:
    """The joints of a model; `only` is a pattern, or several, that one of its readers matches."""
    patterns = (only,) if isinstance(only, str) else only
    wanted = None if patterns is None else [compiled(pattern) for pattern in patterns]
    for number, layer in enumerate(model.layers):
        for joint in _of_layer(layer, f"layers.{number}"):
            if wanted is None or any(w.match(path) for w in wanted for path in joint.readers):
                yield joint


def _of_layer(layer: Any, path: str) -> Iterator[Joint]:
    if type(layer) not in (DecoderLayer, SandwichLayer, ScaledLayer):
        raise ValueError(
            f"{path}: channels of a {type(layer).__name__} cannot be scaled, as nothing is known "
            "of what reads them; those of pre-norm and sandwich layers can."
        )
    attention, mlp = layer.self_attn, layer.mlp
    if type(attention) is nn.Attention:
        own = f"{path}.self_attn"
        yield _after_norm(layer, path, "input_layernorm", [f"{own}.qkv_proj.kernel"])
        heads, kv, size = attention.num_heads, attention.num_kv_heads, attention.head_dim
        of_head = np.arange(kv).repeat(heads // kv)
        channel = (of_head[:, None] * size + np.arange(size)).reshape(-1)
        yield Joint(
            f"{own}.v",
            (f"{own}.o_proj.kernel",),
            _with_bias(attention.qkv_proj, f"{own}.qkv_proj"),
            (heads + kv) * size,
            channel,
        )
    own = f"{path}.mlp"
    before = "pre_feedforward_layernorm"
    norm = before if hasattr(layer, before) else "post_attention_layernorm"
    if type(mlp) is nn.MLP:
        yield _after_norm(layer, path, norm, [f"{own}.gate_up_proj.kernel"])
        yield from _gated(mlp, own)
    elif type(mlp) is nn.MoE and type(mlp.router) is nn.Router:
        readers = [f"{own}.experts.gate_up_proj.kernel"]
        if mlp.shared_experts is not None:
            readers.append(f"{own}.shared_experts.gate_up_proj.kernel")
        yield _after_norm(layer, path, norm, [*readers, f"{own}.router.kernel"])
        yield from _gated(mlp.experts, f"{own}.experts")
        if mlp.shared_experts is not None:
            yield from _gated(mlp.shared_experts, f"{own}.shared_experts")


def _after_norm(layer: Any, path: str, norm: str, readers: list[str]) -> Joint:
    size = value(getattr(layer, norm).scale).shape[0]
    return Joint(f"{path}.{norm}", tuple(readers), (f"{path}.{norm}.scale",), 0, np.arange(size))


def _gated(half: Any, path: str) -> Iterator[Joint]:
    """Of an MLP, or experts, whose gate is linear in what it multiplies."""
    if half.gate in (swiglu, geglu):
        size = value(half.down_proj.kernel).shape[-2]
        writers = _with_bias(half.gate_up_proj, f"{path}.gate_up_proj")
        yield Joint(f"{path}.up", (f"{path}.down_proj.kernel",), writers, size, np.arange(size))


def _with_bias(layer: Any, path: str) -> tuple[str, ...]:
    return (f"{path}.kernel",) if layer.bias is None else (f"{path}.kernel", f"{path}.bias")


class Scaling:
    """A clone of a model whose channels are being scaled, and its statistics."""

    def __init__(self, model: Decoder, calibration: Calibration):
        self.model = nnx.clone(model)
        self._statistics = {k: dict(v) for k, v in calibration.statistics.items()}
        self._cache, self._calibration = list(calibration.cache), calibration

    def parameter(self, path: str) -> np.ndarray:
        """float32, on the host."""
        owner, name = _owner(self.model, path)
        return np.asarray(value(getattr(owner, name))).astype(np.float32)

    def statistic(self, name: str, path: str) -> Any:
        """Of a kernel as it is now; None where it was not seen."""
        return self._statistics[name].get(path)

    def apply(self, joint: Joint, scale: np.ndarray) -> None:
        """Multiplies the rows of readers by `scale` `[channels]`, and divides what writes them.

        The scale of a norm is divided by what can be stored, so that the product stays as it was.
        """
        if joint.start == 0:
            old = self.parameter(joint.writers[0])
            kept = value(getattr(*_owner(self.model, joint.writers[0]))).dtype
            new = (old / scale).astype(kept).astype(np.float32)
            scale = np.where(new != 0, old / np.where(new != 0, new, 1), scale).astype(np.float32)
        rows = scale[joint.channel].astype(np.float32)
        for path in joint.readers:
            self._multiply(path, rows[:, None])
            self._change("absmax", path, 1.0 / rows)
            self._change("mean_square", path, rows**-2.0)
            self._change("input_moment", path, 1.0 / rows, is_moment=True)
        for path in joint.writers:
            width = self.parameter(path).shape[-1]
            columns = np.ones(width, np.float32)
            columns[joint.start :] = scale
            self._multiply(path, 1.0 / columns)
            self._change("output_moment", path, columns, is_moment=True)
        if joint.path.endswith(".self_attn.v"):
            self._scale_values(int(joint.path.split(".")[1]), scale)

    def calibration(self) -> Calibration:
        """Statistics of the model as it is now."""
        return dataclasses.replace(self._calibration, **self._statistics, cache=tuple(self._cache))

    def _multiply(self, path: str, factor: np.ndarray) -> None:
        owner, name = _owner(self.model, path)
        dtype = value(getattr(owner, name)).dtype
        new = (self.parameter(path) * factor).astype(dtype)
        # Another Variable: clones share theirs.
        setattr(owner, name, nnx.data(nnx.Param(jnp.asarray(new))))

    def _change(self, name: str, path: str, factor: np.ndarray, *, is_moment: bool = False) -> None:
        """By channel; of a matrix of second moments rows and columns."""
        seen = self._statistics[name]
        if path in seen:
            whole = np.outer(factor, factor) if is_moment else factor
            seen[path] = (seen[path] * whole).astype(np.float32)

    def _scale_values(self, layer: int, scale: np.ndarray) -> None:
        if layer < len(self._cache):
            seen = self._cache[layer]
            of_heads = scale.reshape(seen.v_min.shape)
            self._cache[layer] = dataclasses.replace(
                seen, v_min=seen.v_min / of_heads, v_max=seen.v_max / of_heads
            )


def rounded(scale: np.ndarray) -> np.ndarray:
    """To powers of two, by which floats of any dtype are multiplied exactly; 1 for what is none."""
    good = np.isfinite(scale) & (scale > 0)
    exponent = np.round(np.log2(np.where(good, scale, 1.0)))
    return np.exp2(np.clip(exponent, -12, 12)).astype(np.float32)


def check(what: str, model: Any, calibration: Any) -> None:
    """TypeError or ValueError where there is nothing that could be scaled by."""
    check_float(model, what)
    if not isinstance(calibration, Calibration):
        raise TypeError(
            f"{what}: expected what fdq.calibrate(model, tokens) returns, found a "
            f"{type(calibration).__name__}."
        )
    paths = [path for joint in joints(model) for path in joint.readers]
    if not paths:
        raise ValueError(f"{what}: the model has no layers whose channels can be scaled.")
    for path in paths:
        if path.endswith("router.kernel"):
            continue
        size = value(getattr(*_owner(model, path))).shape[-2]
        found = calibration.absmax.get(path)
        if found is None or found.shape != (size,):
            shape = "nothing" if found is None else f"shape {list(found.shape)}"
            raise ValueError(
                f"{what}: expected the absmax of {path}, [{size}], found {shape}: these are "
                "statistics of another model."
            )


def _owner(model: Any, path: str) -> tuple[Any, str]:
    *parts, name = path.split(".")
    node = model
    for part in parts:
        node = node[int(part)] if part.isdigit() else getattr(node, part)
    return node, name
