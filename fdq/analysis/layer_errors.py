"""What quantization changed in each layer: of its weights, and of what it makes of its inputs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdq.calibration.observation import calibrate
from fdq.calibration.statistics import Calibration
from fdq.formats.qtensor import QuantizedWeight, dequantize
from fdq.nn.parameters import split
from fdq.ops.preparation import unprepare

ROWS = 8
"""Of text that inputs are taken from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerError:
    """One quantized weight beside the original's.

    Attributes:
      path: of the kernel.
      format: of its codes.
      bits_per_weight: scales included.
      weight_sqnr: signal to quantization noise of the weights, dB.
      output_sqnr: that of `x @ w` for the inputs that the original has, dB; None where no inputs
        were seen.
      weight_outlier: largest weight over the root mean square of all.
      input_outlier: largest input over the root mean square of all inputs; None as above.
      outlier_channels: inputs whose largest magnitude is above 6 of these root mean squares.
      starved: experts that saw fewer tokens than they have inputs.
    """

    path: str
    format: str
    bits_per_weight: float
    weight_sqnr: float
    output_sqnr: float | None
    weight_outlier: float
    input_outlier: float | None
    outlier_channels: int | None
    starved: int = 0


def layer_errors(model: nnx.Module, original: nnx.Module, tokens: Any) -> tuple[LayerError, ...]:
    """Of each quantized weight of `model`, in the order of its tree.

    Args:
      model: quantized, with the tree of `original`.
      original: floats.
      tokens: `[N, L]` rows of text, for the inputs of layers; a few are enough.

    Raises:
      ValueError: a weight of another shape than the original's, or none there; a model on a mesh;
        weights that were rotated or scaled before they were quantized.
    """
    for one in (model, original):
        if getattr(one, "placement", None) is not None:
            raise ValueError("layer_errors: a model is on a mesh; fdq.unshard it first.")
    mine, theirs = (getattr(one, "prepared", None) for one in (model, original))
    if mine != theirs:
        raise ValueError(
            f"layer_errors: the model's weights were changed before quantization ({mine}), the "
            f"original's otherwise ({theirs}). Compare with what was quantized."
        )
    seen = calibrate(original, tokens, moments=True)
    theirs = _flat(split(unprepare(original))[1])
    found = []
    for path, q in _flat(split(unprepare(model))[1]).items():
        if not isinstance(q, QuantizedWeight):
            continue
        w = theirs.get(path)
        if w is None or isinstance(w, QuantizedWeight) or tuple(w.shape) != tuple(q.shape):
            have = "nothing" if w is None else f"{list(w.shape)}"
            raise ValueError(
                f"{path}: {list(q.shape)} in the model and {have} in floats in the original; "
                "compare a model with the one that it was made from."
            )
        found.append(_error(path, q, w, seen))
    return tuple(found)


def _error(path: str, q: QuantizedWeight, w: Any, seen: Calibration) -> LayerError:
    moment = seen.input_moment.get(path)
    figures = _figures(w, q, None if moment is None else jnp.asarray(moment))
    signal, noise, largest, out_signal, out_noise = map(float, figures)
    outlier = channels = None
    if path in seen.absmax:
        absmax, mean_square = seen.absmax[path], seen.mean_square[path]
        size = math.sqrt(float(np.mean(mean_square))) or 1.0
        outlier, channels = float(absmax.max()) / size, int((absmax > 6 * size).sum())
    return LayerError(
        path=path,
        format=str(q.spec),
        bits_per_weight=q.bits_per_weight,
        weight_sqnr=_decibels(signal, noise),
        output_sqnr=None if moment is None else _decibels(out_signal, out_noise),
        weight_outlier=largest / (math.sqrt(signal / max(1, w.size)) or 1.0),
        input_outlier=outlier,
        outlier_channels=channels,
        starved=len(seen.rarely_picked.get(path, {})),
    )


@jax.jit
def _figures(w: jax.Array, q: QuantizedWeight, moment: jax.Array | None) -> tuple[jax.Array, ...]:
    """Energies of weights and error, the largest weight, and energies of both at the outputs."""
    w = w.astype(jnp.float32)
    d = dequantize(q) - w
    zero = jnp.zeros((), jnp.float32)
    outputs = (zero, zero)
    if moment is not None:
        outputs = tuple(jnp.einsum("...kn,...kl,...ln->", a, moment, a) for a in (w, d))
    return jnp.sum(w * w), jnp.sum(d * d), jnp.max(jnp.abs(w)), *outputs


def _decibels(signal: float, noise: float) -> float:
    if noise <= 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def _flat(params: Any) -> dict[str, Any]:
    def is_weight(x: Any) -> bool:
        return isinstance(x, QuantizedWeight)

    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_weight)[0]
    return {".".join(str(entry.key) for entry in keys): leaf for keys, leaf in leaves}
