"""SmoothQuant: outlier channels of activations are made smaller, and their weights larger.

A channel is divided by s where it is written and its weights are multiplied by s (arXiv
2211.10438), so that neither 8-bit activations nor 8-bit weights have to reach far for a few
channels. Steps of a token and of a column are as large as these are, so that what either costs is
near to `sum(x^2 / s^2) * sum(s^2 w^2)` over channels, x and w their root mean squares: least where
`s = sqrt(x / w)` (Cauchy and Schwarz). A static step reaches as far as any token ever did, and
there `s = max|x|^alpha / max|w|^(1 - alpha)`, as published. With `exact` s is the nearest power of
two, by which floats are multiplied without rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fdq.calibration.statistics import Calibration
from fdq.models.decoder import Decoder
from fdq.quantizers import channel_scales
from fdq.quantizers.assigned import Assigned
from fdq.quantizers.rotated import tell

ALPHA = 0.5
STATIC_ALPHA = 0.6
"""Between 0.5, as published, and what models of harder outliers take."""


def smoothed(
    model: Decoder,
    calibration: Calibration,
    scheme: Any = None,
    *,
    alpha: float | None = None,
    exact: bool = False,
    only: Any = None,
) -> tuple[Decoder, Calibration]:
    """The same function with smoother activations, and the statistics of it.

    Args:
      model: a float `fdq.models.Decoder`; it is not changed.
      calibration: what `fdq.calibrate(model, tokens)` returned.
      scheme: what the model is going to be quantized to, as `fdq.quantize` takes it, for which
        activations are static; by default none are.
      alpha: how much of the outliers goes to the weights, 0 to 1; by default 0.5, and 0.6 where
        activations are static.
      exact: whether the model is to be the same to the last bit; otherwise weights are rounded to
        their dtype once more.
      only: a pattern of the paths of kernels that are to read smoother rows, or several; all.

    Raises:
      TypeError, ValueError: no such model, calibration or scheme, or an alpha out of range.

    Examples:
      >>> seen = fdq.calibrate(model, tokens)  # doctest: +SKIP
      >>> model, seen = fdq.smoothed(model, seen, "W8A8-static")  # doctest: +SKIP
      >>> q = fdq.quantize(model, "W8A8-static", calibration=seen)  # doctest: +SKIP
    """
    channel_scales.check("smoothed", model, calibration)
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"smoothed: expected alpha from 0 to 1, found {alpha}.")
    static = set() if scheme is None else _static(model, scheme)
    scaling = channel_scales.Scaling(model, calibration)
    for joint in channel_scales.joints(model, only):
        is_static = not static.isdisjoint(joint.readers)
        of_rows, of_weight = (_largest if is_static else _usual)(scaling, joint)
        if not (np.isfinite(of_rows).all() and np.isfinite(of_weight).all()):
            raise ValueError(
                f"smoothed: weights or the statistics of {joint.readers[0]} are not finite; the "
                "model overflows on the calibration text."
            )
        good = (of_rows > 0) & (of_weight > 0)
        of_rows, of_weight = np.where(good, of_rows, 1), np.where(good, of_weight, 1)
        share = alpha if alpha is not None else STATIC_ALPHA if is_static else ALPHA
        scale = of_rows**share / of_weight ** (1 - share)
        # Channels as a whole are no larger or smaller than before.
        scale = scale / np.exp(np.mean(np.log(scale[good]))) if good.any() else scale
        scale = np.where(good, scale, 1)
        scaling.apply(joint, channel_scales.rounded(scale) if exact else scale)
    tell(scaling.model, "smooth")
    return scaling.model, scaling.calibration()


def _largest(scaling: channel_scales.Scaling, joint: channel_scales.Joint) -> Any:
    """Of each channel the largest value of rows, and the largest weight."""
    weights = [np.abs(w).max(axis=(*range(w.ndim - 2), -1)) for w in _weights(scaling, joint)]
    return joint.largest(_seen(scaling, joint, "absmax")), joint.largest(np.max(weights, axis=0))


def _usual(scaling: channel_scales.Scaling, joint: channel_scales.Joint) -> Any:
    """Of each channel the root mean square of rows, and of weights."""
    weights = [np.square(w).mean(axis=(*range(w.ndim - 2), -1)) for w in _weights(scaling, joint)]
    squares = _seen(scaling, joint, "mean_square"), np.mean(weights, axis=0)
    return tuple(np.sqrt(joint.largest(x)) for x in squares)


def _seen(scaling: channel_scales.Scaling, joint: channel_scales.Joint, name: str) -> np.ndarray:
    """A statistic `[K]`, the largest of all readers."""
    seen = [scaling.statistic(name, path) for path in joint.readers]
    return np.max([x for x in seen if x is not None], axis=0)


def _weights(scaling: channel_scales.Scaling, joint: channel_scales.Joint) -> list[np.ndarray]:
    return [scaling.parameter(path) for path in joint.readers if _is_weight(path)]


def _static(model: Decoder, scheme: Any) -> set[str]:
    """Paths of the kernels whose rows are going to have static scales."""
    rows = Assigned.of(model, scheme).table.quantized
    activations = {row.path: row.scheme.activation for row in rows if row.scheme}
    return {path for path, spec in activations.items() if spec and not spec.dynamic}


def _is_weight(path: str) -> bool:
    """Routers stay float32: their weights may be as large as they like."""
    return not path.endswith("router.kernel")
