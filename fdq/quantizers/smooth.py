"""SmoothQuant: outlier channels of activations are made smaller, and their weights larger.

A channel is divided by `s = max|x|^alpha / max|w|^(1 - alpha)` where it is written and its weights
are multiplied by s (arXiv 2211.10438), so that neither 8-bit activations nor 8-bit weights have to
reach far for a few channels. With `exact` s is the nearest power of two, by which
floats are multiplied without rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fdq.calibration.statistics import Calibration
from fdq.models.decoder import Decoder
from fdq.quantizers import channel_scales
from fdq.quantizers.rotated import tell

ALPHA = 0.6
"""Between 0.5, as published, and what models of harder outliers take."""


def smoothed(
    model: Decoder,
    calibration: Calibration,
    *,
    alpha: float = ALPHA,
    exact: bool = False,
    only: Any = None,
) -> tuple[Decoder, Calibration]:
    """The same function with smoother activations, and the statistics of it.

    Args:
      model: a float `fdq.models.Decoder`; it is not changed.
      calibration: what `fdq.calibrate(model, tokens)` returned.
      alpha: how much of the outliers goes to the weights, 0 to 1.
      exact: whether the model is to be the same to the last bit; otherwise weights are rounded to
        their dtype once more.
      only: a pattern of the paths of kernels that are to read smoother rows, or several; all.

    Raises:
      TypeError, ValueError: no such model or calibration, or an alpha that is out of range.

    Examples:
      >>> model, seen = fdq.smoothed(model, fdq.calibrate(model, tokens))  # doctest: +SKIP
      >>> q = fdq.quantize(model, "W8A8-static", calibration=seen)  # doctest: +SKIP
    """
    channel_scales.check("smoothed", model, calibration)
    if not 0 <= alpha <= 1:
        raise ValueError(f"smoothed: expected alpha from 0 to 1, found {alpha}.")
    scaling = channel_scales.Scaling(model, calibration)
    for joint in channel_scales.joints(model, only):
        seen = [scaling.statistic("absmax", path) for path in joint.readers]
        rows = np.max([x for x in seen if x is not None], axis=0)
        weights = [np.abs(scaling.parameter(path)) for path in joint.readers if _is_weight(path)]
        of_weights = [joint.largest(w.max(axis=(*range(w.ndim - 2), -1))) for w in weights]
        largest, of_weight = joint.largest(rows), np.max(of_weights, axis=0)
        if not (np.isfinite(largest).all() and np.isfinite(of_weight).all()):
            raise ValueError(
                f"smoothed: weights or the absmax of {joint.readers[0]} are not finite; the model "
                "overflows on the calibration text."
            )
        good = (largest > 0) & (of_weight > 0)
        largest, of_weight = np.where(good, largest, 1), np.where(good, of_weight, 1)
        scale = largest**alpha / of_weight ** (1 - alpha)
        # Channels as a whole are no larger or smaller than before.
        scale = scale / np.exp(np.mean(np.log(scale[good]))) if good.any() else scale
        scale = np.where(good, scale, 1)
        scaling.apply(joint, channel_scales.rounded(scale) if exact else scale)
    tell(scaling.model, "smooth")
    return scaling.model, scaling.calibration()


def _is_weight(path: str) -> bool:
    """Routers stay float32: their weights may be as large as they like."""
    return not path.endswith("router.kernel")
