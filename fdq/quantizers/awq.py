"""AWQ: channels that matter more get finer steps, as their weights are made larger.

A channel is divided by `s = rms(x)^alpha` where it is written and its weights are multiplied by s,
alpha from 0 to 0.95 being the one that leaves the least error in what the layers that read the
channels put out, once they are rounded (arXiv 2306.00978). The change is folded into the weights
before, so that nothing is left to do at run time.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdq.calibration.statistics import Calibration
from fdq.formats.qtensor import dequantize
from fdq.models.decoder import Decoder
from fdq.quantizers import channel_scales
from fdq.quantizers.assigned import Assigned
from fdq.quantizers.quantizer import QUANTIZERS, default_of
from fdq.quantizers.rotated import tell
from fdq.quantizers.weight import quantize_array
from fdq.schemes.scheme import WeightSpec

ALPHAS = tuple(i / 20 for i in range(20))


def activation_aware(
    model: Decoder, calibration: Calibration, scheme: Any, *, only: Any = None
) -> tuple[Decoder, Calibration]:
    """The same function with weights that round to `scheme` with less error, and its statistics.

    Args:
      model: a float `fdq.models.Decoder`; it is not changed.
      calibration: what `fdq.calibrate(model, tokens)` returned; with `moments=True` the error is
        that of whole rows, else of each channel by itself.
      scheme: what the model is going to be quantized to, as `fdq.quantize` takes it.
      only: a pattern of the paths of kernels whose rows may be scaled, or several; all.

    Raises:
      TypeError, ValueError: no such model, calibration or scheme.

    Examples:
      >>> model, seen = fdq.activation_aware(model, seen, "W4A16")  # doctest: +SKIP
      >>> q = fdq.quantize(model, "W4A16", method="gptq", calibration=seen)  # doctest: +SKIP
    """
    channel_scales.check("activation_aware", model, calibration)
    rows = Assigned.of(model, scheme).table.quantized
    specs = {row.path: row.scheme.weight for row in rows if row.scheme and row.scheme.weight}
    scaling = channel_scales.Scaling(model, calibration)
    for joint in channel_scales.joints(model, only):
        readers = [path for path in joint.readers if path in specs]
        seen = [scaling.statistic("mean_square", path) for path in joint.readers]
        spread = joint.largest(np.sqrt(np.max([x for x in seen if x is not None], axis=0)))
        if not readers or not spread.any():
            continue
        spread = np.where(spread > 0, spread, spread[spread > 0].min())
        weights = {path: scaling.parameter(path) for path in readers}
        errors = []
        for alpha in ALPHAS:
            scale = _scale(spread, alpha)[joint.channel]
            errors.append(
                sum(
                    _error(weights[path], scale, _moment(scaling, path), specs[path], path)
                    for path in readers
                )
            )
        alpha = ALPHAS[int(np.argmin(errors))]
        if alpha:
            scaling.apply(joint, _scale(spread, alpha))
    tell(scaling.model, "awq")
    return scaling.model, scaling.calibration()


def _scale(spread: np.ndarray, alpha: float) -> np.ndarray:
    scale = spread**alpha
    return (scale / np.sqrt(scale.max() * scale.min())).astype(np.float32)


def _moment(scaling: channel_scales.Scaling, path: str) -> Any:
    whole = scaling.statistic("input_moment", path)
    return scaling.statistic("mean_square", path) if whole is None else whole


def _error(w: np.ndarray, scale: np.ndarray, moment: Any, spec: WeightSpec, path: str) -> float:
    """Squared error of the output of a layer, of experts all together."""
    # Of two alphas the better one is better by a closed form, too, which is found sooner.
    closed = QUANTIZERS["absmax"].unsupported(spec) is None
    quantizer = QUANTIZERS["absmax"] if closed else default_of(spec)
    rows = jnp.asarray(scale).reshape((1,) * (w.ndim - 2) + (-1, 1))
    q = quantize_array(jnp.asarray(w) * rows, spec, method=quantizer.name, path=path)
    return float(_weighted(dequantize(q) / rows - jnp.asarray(w), jnp.asarray(moment)))


@jax.jit
def _weighted(d: jax.Array, moment: jax.Array) -> jax.Array:
    if moment.ndim == 1:
        return jnp.sum(jnp.square(d) * moment.reshape((1,) * (d.ndim - 2) + (-1, 1)))
    return jnp.sum(d * jnp.matmul(moment, d, precision=jax.lax.Precision.HIGHEST))
