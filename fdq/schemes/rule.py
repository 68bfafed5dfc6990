"""One rule of a recipe: a pattern of paths, and what becomes of the tensors that it covers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from fdq.schemes import path_pattern
from fdq.schemes.kinds import QUANTIZERS
from fdq.schemes.scheme import Scheme

_OPTIONS: dict[str, Any] = {"quantizer": None, "contract": None, "stacked": 0}


@dataclasses.dataclass(frozen=True)
class Rule:
    """What one pattern of paths gets; a `required` rule that quantizes nothing is an error.

    `scheme`, or its name, has no cache, which is no matter of single tensors; None leaves what
    matches as it is. `quantizer` chooses the codes; None leaves it to `method=`, or by bits.
    `contract` are the axes that a product sums over, of kernels that are not `[..., K, N]`: `(0,)`
    or `0` of an attention kernel `[D, H, d]`, `(0, 1)` of `[H, d, D]`, `1` of a weight `[out, in]`;
    the first `stacked` axes (layers, experts) have a matrix each.
    """

    pattern: str
    scheme: Scheme | None = None
    required: bool = True
    quantizer: str | None = None
    contract: tuple[int, ...] | None = None
    stacked: int = 0

    def __post_init__(self):
        path_pattern.compiled(self.pattern)
        scheme = scheme_or_none(self.scheme)
        if scheme is not None and scheme.cache is not None:
            raise ValueError(
                f"Rule {self.pattern!r}: {scheme} has a cache format, but there is one cache for "
                "the whole model. Put it into the scheme of '*', or pass Recipe(..., cache='C8')."
            )
        object.__setattr__(self, "scheme", None if scheme == Scheme() else scheme)
        check_quantizer(f"Rule {self.pattern!r}", self.scheme, self.quantizer)
        object.__setattr__(self, "contract", _read_axes(self.pattern, self.contract, self.stacked))


def read_rule(rule: Any) -> tuple[Any, ...]:
    """The fields of a `Rule`, from one or from a pair or triple."""
    if isinstance(rule, Rule):
        return tuple(getattr(rule, field.name) for field in dataclasses.fields(Rule))
    fields = list(rule) if isinstance(rule, (tuple, list)) else []
    options = {} if len(fields) == 2 else fields[2] if len(fields) == 3 else None
    if not isinstance(options, Mapping) or set(options) - set(_OPTIONS):
        raise ValueError(
            "A rule is a pair (pattern, scheme), such as ('*.experts', 'W4A16'), and may have "
            f"dict(quantizer=name) after it, and contract=axes, stacked=n in it; got {rule!r}."
        )
    given = (options.get(name, default) for name, default in _OPTIONS.items())
    return fields[0], scheme_or_none(fields[1]), True, *given


def _read_axes(pattern: str, contract: Any, stacked: Any) -> tuple[int, ...] | None:
    """Axes of a rule: one, or several."""
    axes = (contract,) if isinstance(contract, int | np.integer) else contract
    axes = tuple(axes) if isinstance(axes, (tuple, list)) else axes
    if isinstance(axes, tuple):
        axes = tuple(int(axis) if isinstance(axis, np.integer) else axis for axis in axes)
    stacked = int(stacked) if isinstance(stacked, np.integer) else stacked
    good = axes is None or (axes and all(type(axis) is int for axis in axes))
    if not good or type(stacked) is not int or stacked < 0 or (stacked and axes is None):
        raise ValueError(
            f"Rule {pattern!r}: contract={contract!r}, stacked={stacked!r}; expected the axes that "
            "are contracted, such as contract=1 or contract=(0, 1), and with them how many axes "
            "before are a stack."
        )
    return axes


def options_of(rule: Rule) -> dict[str, Any]:
    """What a rule says besides, as JSON has it; empty for most."""
    found = {
        name: getattr(rule, name)
        for name, default in _OPTIONS.items()
        if getattr(rule, name) != default
    }
    return {name: list(x) if isinstance(x, tuple) else x for name, x in found.items()}


def check_quantizer(what: str, scheme: Scheme | None, name: str | None) -> None:
    """Raises ValueError where nothing is quantized, or by a quantizer that there is not."""
    if name is None:
        return
    try:
        QUANTIZERS[name]
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    if scheme is None or scheme.weight is None:
        raise ValueError(f"{what}: quantizer={name!r}, but no weight is quantized.")


def quantizer_field(name: str | None) -> dict[str, str]:
    """Left out where there is none, so that recipes without one read as they always did."""
    return {} if name is None else {"quantizer": name}


def scheme_or_none(name: Any, compat: str | None = None) -> Scheme | None:
    """`Scheme.parse` of what may be None."""
    return None if name is None else Scheme.parse(name, compat=compat)
