"""What is done to a decoder before its weights are quantized, by name: `PREPARATIONS`.

Each gives a model that is the same function (`fdq.rotated`, `fdq.smoothed`,
`fdq.activation_aware`), so that what is stored is a model like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fdq.calibration.statistics import Calibration
from fdq.models.decoder import Decoder
from fdq.quantizers.awq import activation_aware
from fdq.quantizers.rotated import rotated
from fdq.quantizers.smooth import smoothed

PREPARATIONS = ("rotate", "smooth", "awq")


def check_preparations(names: Sequence[str]) -> None:
    """ValueError for a name that is none, for one that is there twice, and for another order."""
    for name in names:
        if name not in PREPARATIONS:
            raise ValueError(
                f"There is no preparation {name!r}; use one of {', '.join(PREPARATIONS)}."
            )
    if sorted(set(names), key=PREPARATIONS.index) != list(names):
        raise ValueError(
            f"Preparations {', '.join(names)}: expected each once, in the order of "
            f"{', '.join(PREPARATIONS)}."
        )


def prepared(
    model: Decoder,
    names: Sequence[str],
    scheme: Any,
    calibrate: Callable[[Decoder], Calibration] | None,
) -> tuple[Decoder, Calibration | None]:
    """The model after all of `names`, and the statistics of it.

    `calibrate` runs a model over sample tokens; once, after a rotation, which makes other channels.
    It may be None where nothing needs statistics.
    """
    check_preparations(names)
    if "rotate" in names:
        model = rotated(model)
    seen = None if calibrate is None else calibrate(model)
    for name in names:
        if name == "rotate":
            continue
        if seen is None:
            raise ValueError(f"Preparation {name!r} needs calibration.")
        if name == "smooth":
            model, seen = smoothed(model, seen, scheme)
        else:
            model, seen = activation_aware(model, seen, scheme)
    return model, seen
