"""`fdq convert --prepare`: a model that is changed before it is quantized, in memory as a whole."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from fdq.calibration.observation import calibrate
from fdq.calibration.statistics import Calibration
from fdq.cli import console
from fdq.models.decoder import Decoder
from fdq.quantizers.preparation import check_preparations, prepared
from fdq.quantizers.quantization import quantize
from fdq.schemes.recipe import Recipe


def say_of_experts(calibration: Calibration) -> None:
    """Names experts whose statistics are mostly those of the others."""
    for path, few in calibration.rarely_picked.items():
        seen = ", ".join(f"{expert} ({count})" for expert, count in few.items())
        console.err.print(
            f"{path}: few tokens picked experts {seen}; they borrow from the others.",
            markup=False,
        )


def convert_prepared(
    source: pathlib.Path,
    destination: pathlib.Path,
    recipe: Recipe,
    names: Sequence[str],
    *,
    tokens: Any,
    moments: dict[str, Any],
    method: str | None,
    compat: str | None,
    dtype: Any,
    overwrite: bool,
    quiet: bool,
) -> Any:
    """Prepares, quantizes and saves; returns what `fdq_checkpoints.inspect` says of it.

    `tokens(model)` are those to calibrate on; `moments` are arguments of `calibrate`.
    """
    from fdq.storage import load, save
    from fdq_checkpoints import inspect, saving
    from fdq_checkpoints.sources import open_source

    check_preparations(names)
    with open_source(source) as opened:
        name = opened.name
    model = load(source, dtype=dtype, prepare=False)
    if not isinstance(model, Decoder):
        raise ValueError(f"--prepare {names[0]}: {source} holds no model, whose layers it changes.")
    needs = recipe.needs_calibration or any(moments.values()) or list(names) != ["rotate"]

    def seen(model: Decoder) -> Calibration:
        with console.err.status("Calibrating ..."):
            calibration = calibrate(model, tokens(model), **moments)
        if not quiet:
            say_of_experts(calibration)
        return calibration

    model, calibration = prepared(model, names, recipe, seen if needs else None)
    q = quantize(
        model,
        recipe,
        method=method,
        compat=compat,
        calibration=calibration,
        donate=True,
        verbose=True,
    )
    digest = None if calibration is None else calibration.digest
    record = {"source": name, "method": method, "compat": compat, "calibration": digest}
    record |= saving.text_seen(calibration)
    save(q, destination, overwrite=overwrite, provenance=record)
    return inspect(destination)
