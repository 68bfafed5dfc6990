"""What is known of the inputs of layers, by path: for quantizers, and for static activations."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdq.calibration.statistics import Calibration
from fdq.quantizers.quantizer import pick, statistic_shape
from fdq.schemes import assignment
from fdq.schemes.assignment import Leaf
from fdq.schemes.recipe import Recipe
from fdq.schemes.scheme import Scheme


@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """Statistics of one call of `quantize`; `calibration` is what they come from, if it was one.

    `by_name`: name of a statistic -> path of a kernel or its module -> array (mostly `[..., K]`).
    `ranges`: path -> absmax of the input, a number or by channel; None where nothing was given.
    """

    by_name: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    ranges: Mapping[str, Any] | None = None
    calibration: Calibration | None = None

    @classmethod
    def of(
        cls, leaves: Sequence[Leaf], *, importance: Any = None, calibration: Any = None
    ) -> LayerInputs:
        """From the arguments of `quantize`; refused where they are not about these leaves."""
        whole = calibration if isinstance(calibration, Calibration) else None
        by_name = {} if whole is None else dict(whole.statistics)
        ranges = _by_path("calibration", calibration, leaves, "absmax")
        guide = _by_path("importance", importance, leaves, "mean_square")
        if guide is not None:
            by_name["mean_square"] = guide
        return cls(by_name, ranges, whole)

    def statistics(self, paths: Sequence[str], index: int | None = None) -> dict[str, Any]:
        """By name those of the tensor that any of `paths` leads to; of one matrix of its stack."""
        found = {name: _at(values, paths) for name, values in self.by_name.items()}
        return {
            name: value if index is None or np.ndim(value) <= _ndim(name) else value[index]
            for name, value in found.items()
            if value is not None
        }

    def activation_scale(
        self, scheme: Scheme, paths: list[str], shape: tuple[int, ...], abstract: bool
    ) -> Any:
        """float32 scale of a static activation, one for each leading axis; None if dynamic.

        `paths` lead to a weight of `shape` `[..., K, N]`. Of an `abstract` one without statistics
        the scale is a `jax.ShapeDtypeStruct`.
        """
        spec, path, lead = scheme.activation, paths[0], shape[:-2]
        if spec is None or spec.dynamic:
            return None
        if abstract and self.ranges is None:
            return jax.ShapeDtypeStruct(lead, jnp.float32)
        seen = self.ranges
        found = None if seen is None else _at(seen, paths)
        if found is None:
            lacks = f" (there is one of {', '.join(sorted(seen)[:3])} ...)" if seen else ""
            raise ValueError(
                f"{path}: {scheme} needs the calibrated range of its input{lacks}. Pass "
                "calibration=fdq.calibrate(model, tokens), use dynamic activations (drop "
                "'-static'), or leave this tensor out by a rule."
            )
        try:
            absmax = np.asarray(found, np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: the absmax of its input is no number: {error}.") from None
        if absmax.shape in ((shape[-2],), (*lead, shape[-2])):  # per channel
            absmax = absmax.max(axis=-1)
        if absmax.shape not in ((), lead):
            raise ValueError(
                f"{path}: expected the absmax of its input as one number, by channel [{shape[-2]}] "
                f"or by layer {list(lead)}, found shape {list(absmax.shape)}."
            )
        if not (np.isfinite(absmax) & (absmax >= 0)).all():
            raise ValueError(f"{path}: the absmax of its input is {absmax}; expected numbers >= 0.")
        if not absmax.any():
            raise ValueError(
                f"{path}: its input was 0 throughout calibration, which says nothing about its "
                "range. Calibrate on other samples, use dynamic activations (drop '-static'), or "
                "leave this tensor out by a rule."
            )
        # Of a stack of experts some may have seen nothing: they take the widest range there is.
        scale = np.where(absmax > 0, absmax, absmax.max()) / np.float32(spec.bound)
        if not (scale >= np.finfo(np.float32).tiny).all():
            raise ValueError(f"{path}: the absmax of its input is {absmax}, too small for a scale.")
        return jnp.asarray(np.broadcast_to(scale, lead), jnp.float32)


def moments_for(recipe: Recipe, method: str | None = None) -> dict[str, Any]:
    """Arguments of `calibrate` by which it gathers what the quantizers of a recipe use.

    `method` stands where the recipe names none, as in `quantize`.
    """
    pairs = [(recipe.default, recipe.quantizer)]
    pairs += [(rule.scheme, rule.quantizer) for rule in recipe.rules]
    wanted: set[str] = set()
    for scheme, name in pairs:
        if scheme is not None and scheme.weight is not None:
            with contextlib.suppress(ValueError):  # told with its path where a tensor gets it
                wanted |= set(pick(scheme.weight, name or method).statistics)
    return {"moments": "input_moment" in wanted, "output_moments": "output_moment" in wanted}


def _by_path(
    argument: str, values: Any, leaves: Sequence[Leaf], statistic: str
) -> Mapping[str, Any] | None:
    """One statistic of inputs by path, from a Calibration or a mapping whose paths must exist."""
    if values is None:
        return None
    paths = [path for leaf in leaves for path in (leaf.path, *leaf.aliases)]
    known = {*paths, *(path.rpartition(".")[0] for path in paths)}
    if isinstance(values, Calibration):
        seen = values.statistics[statistic]
        if not known & seen.keys():
            raise ValueError(
                f"{argument}: these are the statistics of another model, of {', '.join(seen)[:200]}"
                f" ...; this one has {', '.join(paths)[:200]} ..."
            )
        return seen
    if not isinstance(values, Mapping):
        raise TypeError(
            f"{argument}= is what fdq.calibrate(model, tokens) returns, or a mapping from paths; "
            f"got {type(values).__name__}. Sample tokens go to fdq.calibrate."
        )
    for path in values:
        if path not in known:
            near = ", ".join(assignment.nearest(path, paths)) or "(no tensors)"
            raise ValueError(f"{argument}: there is no tensor {path!r}. Nearest paths: {near}.")
    return values


def _ndim(statistic: str) -> int:
    """Axes of a statistic of one matrix."""
    return len(statistic_shape(statistic, (0, 0)))


def _at(values: Mapping[str, Any], paths: Sequence[str]) -> Any:
    """The entry of a tensor, under a path of its own or of its module; None without one."""
    for path in paths:
        for key in (path, path.rpartition(".")[0]):
            if key in values:
                return values[key]
    return None
