"""Round to nearest: parameters by a closed form, then every weight to its nearest level."""

from __future__ import annotations

import jax

from fdq.formats import FORMATS, Arrays, ScaledFormat
from fdq.schemes.scheme import WeightSpec


def round_to_nearest(w: jax.Array, spec: WeightSpec, method: str) -> Arrays:
    """Quantizes a float32 weight ``[..., K, N]``.

    Args:
      w: the weight.
      spec: how it is stored.
      method: one of the format's closed forms, such as ``"absmax"``.

    Returns:
      The arrays of the format, by field name of ``QTensor``.
    """
    format = FORMATS[spec.format]
    parameters = format.fit(w, spec, method)
    if isinstance(format, ScaledFormat):
        parameters = format.finish(parameters, spec)
    return format.encode(w, spec, parameters)
