"""Reads what a config.json says of rotary positions, with transformers' order of precedence."""

import math
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from fdq.nn.rotary import ROPE_TYPES, RotaryConfig

if TYPE_CHECKING:
    from fdq.models.config_reader import ConfigReader

_ORIGINAL = "original_max_position_embeddings"
_LONGEST = "max_position_embeddings"
# Parameters of some type; transformers only warns of those that mean nothing to the type at hand.
_KNOWN = (
    "attention_factor", "beta_fast", "beta_slow", "factor", "high_freq_factor", "long_factor",
    "low_freq_factor", "mscale", "mscale_all_dim", _ORIGINAL, "short_factor", "truncate",
)  # fmt: skip


def is_number(value: Any) -> bool:
    """Whether it is a finite number that a float can hold; JSON has integers of any length."""
    largest = sys.float_info.max
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and -largest <= value <= largest


class _Parameters:
    """The rope parameters of a config: those of `rope_scaling` where it is there and not empty."""

    def __init__(self, reader: "ConfigReader"):
        parameters, scaling = map(reader.mapping, ("rope_parameters", "rope_scaling"))
        self.reader = reader
        self.values = dict(scaling or parameters)

    def number(self, key: str, *, default: float | None = None) -> float:
        """A positive number, which must be there where there is no default."""
        silent = self.values.get(key) is None and default is not None
        return self._positive(key, default if silent else self._present(key))

    def optional(self, key: str, *, zero: bool = False) -> float | None:
        """A positive number, or None where there is none; with `zero` 0 stands for none too."""
        found = self.values.get(key)
        none = found is None or (zero and found == 0 and not isinstance(found, bool))
        return None if none else self._positive(key, found)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of positive numbers."""
        found = self._present(key)
        if not isinstance(found, list | tuple):
            raise self._wrong(key, "a list of numbers", found)
        return tuple(self._positive(key, one) for one in found)

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false."""
        found = self.values.get(key, default)
        if not isinstance(found, bool):
            raise self._wrong(key, "true or false", found)
        return found

    def longest(self) -> int:
        """The context that the config is for."""
        return self.reader.integer(_LONGEST, least=1)

    def original(self) -> int:
        """The original context: said beside the parameters or among them, or else `longest`."""
        if self.reader.get(_ORIGINAL, default=None) is not None:
            return self.reader.integer(_ORIGINAL, least=1)
        if self.values.get(_ORIGINAL) is None and self.reader.get(_LONGEST, default=None):
            return self.longest()
        found = self._present(_ORIGINAL)
        if not isinstance(found, int) or self._positive(_ORIGINAL, found) < 1:
            raise self._wrong(_ORIGINAL, "an integer", found)
        return found

    def stretch(self) -> dict[str, Any]:
        """`factor` and the original context; where no factor is said, the contexts' ratio."""
        original = self.original()
        ratio = None if self.values.get("factor") is not None else self.longest() / original
        return {"original_max_position": original, "factor": self.number("factor", default=ratio)}

    def _present(self, key: str) -> Any:
        if self.values.get(key) is None:
            raise ValueError(f"{self.reader.family} config: rope parameters lack {key}")
        return self.values[key]

    def _positive(self, key: str, found: Any) -> float:
        if not is_number(found) or found <= 0:
            raise self._wrong(key, "a positive number", found)
        return float(found)

    def _wrong(self, key: str, expected: str, found: Any) -> ValueError:
        return self.reader.wrong((f"{key} of the rope parameters",), expected, found)


def _default(given: _Parameters) -> dict[str, Any]:
    return {}


def _linear(given: _Parameters) -> dict[str, Any]:
    return {"factor": given.number("factor")}


def _dynamic(given: _Parameters) -> dict[str, Any]:
    """The context that it stretches is the config's own, whatever original one is said."""
    return {"factor": given.number("factor"), "original_max_position": given.longest()}


def _yarn(given: _Parameters) -> dict[str, Any]:
    """A factor that is null, not one that is missing, is the contexts' ratio."""
    if "factor" not in given.values:
        given.number("factor")
    fields = given.stretch()
    factor, attention_factor = fields["factor"], given.optional("attention_factor")
    mscale, of_all = (given.optional(key, zero=True) for key in ("mscale", "mscale_all_dim"))
    if attention_factor is None and mscale and of_all and factor > 1:
        # DeepSeek's way to say it.
        scale, scale_of_all = (yarn_magnitude(m, factor) for m in (mscale, of_all))
        attention_factor = scale / scale_of_all
    betas = {key: given.optional(key, zero=True) for key in ("beta_fast", "beta_slow")}
    fields |= {key: found for key, found in betas.items() if found is not None}
    truncate = given.flag("truncate", default=True)
    return {**fields, "attention_factor": attention_factor, "truncate": truncate}


def _longrope(given: _Parameters) -> dict[str, Any]:
    return {
        **given.stretch(),
        "attention_factor": given.optional("attention_factor"),
        "short_factor": given.numbers("short_factor"),
        "long_factor": given.numbers("long_factor"),
    }


def _llama3(given: _Parameters) -> dict[str, Any]:
    fields: dict[str, Any] = {
        key: given.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor")
    }
    return {**fields, "original_max_position": given.original()}


_TYPES: dict[str, Callable[[_Parameters], dict[str, Any]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}


def yarn_magnitude(mscale: float, factor: float) -> float:
    """What DeepSeek makes of `mscale` where a context is stretched by a factor above 1."""
    return 0.1 * mscale * math.log(factor) + 1


def score_factor(reader: "ConfigReader", rotary: RotaryConfig) -> float:
    """What DeepSeek multiplies scores by besides: 1, or of a stretched context by `mscale_all_dim`.

    `rotary` is what `read_rotary` read. Families that do not say so have nothing of the kind.
    """
    of_all = _Parameters(reader).optional("mscale_all_dim", zero=True)
    if of_all is None or rotary.rope_type == "default" or rotary.factor <= 1:
        return 1.0
    return yarn_magnitude(of_all, rotary.factor) ** 2


def read_rotary(
    reader: "ConfigReader",
    *,
    theta: float,
    interleaved: bool,
    partial: bool,
    types: Mapping[str, str] | None,
) -> RotaryConfig:
    """See `ConfigReader.rotary`."""
    given = _Parameters(reader)
    spelled = given.values.get("rope_type") or given.values.get("type") or "default"
    types = {name: name for name in ROPE_TYPES} if types is None else types
    if not isinstance(spelled, str) or spelled not in types:
        raise ValueError(
            f"{reader.family} config: rope_type {spelled!r:.200} is not supported; supported are "
            + ", ".join(map(repr, types))
        )
    rope_type = types[spelled]
    top_theta = reader.number("rope_theta", default=theta)
    fields = {"theta": given.number("rope_theta", default=top_theta), **_TYPES[rope_type](given)}
    # One that is said among the parameters counts, if another is said beside them.
    beside = reader.number("partial_rotary_factor", default=1.0)
    share = given.number("partial_rotary_factor", default=beside)
    if share != 1 and not partial:
        raise ValueError(
            f"{reader.family} config: partial_rotary_factor={share} is not supported: this family "
            "rotates whole heads, in transformers too. Remove it if that is what is meant"
        )
    read = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_KNOWN}
    unknown = [key for key, found in given.values.items() if found is not None and key not in read]
    if unknown:
        raise ValueError(
            f"{reader.family} config: rope parameters {sorted(unknown)} are unknown for "
            f"rope_type {rope_type!r:.200}"
        )
    # What the original context is said to be means nothing to the types that do not read it.
    reader.neutral(_ORIGINAL)
    return RotaryConfig(
        rope_type=rope_type, interleaved=interleaved, partial_factor=share, **fields
    )
