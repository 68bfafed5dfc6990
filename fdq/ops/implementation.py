"""Ops and their implementations: how one is chosen, while tracing.

An op has one meaning and several implementations of it, which agree up to rounding. They are
objects in a tuple, the preferred one first; the last is plain XLA and can do everything.
"""

from __future__ import annotations

import abc
import functools
import logging
import os
from typing import Any

from fdq.registry import Registry

_LOGGER = logging.getLogger("fdq")
_OPS: list[Op[Any]] = []


class Implementation[A](abc.ABC):
    """One way to compute an op from a dataclass of its arguments; `name` is for users to ask."""

    name: str

    def skipped(self) -> str | None:
        """Why it is not looked at on this device unless asked for by name; imports nothing."""
        return None

    def unsupported(self, arguments: A) -> str | None:
        """Why it cannot compute this, in one line; None if it can."""
        return None

    def declined(self, arguments: A) -> str | None:
        """Why another is better here (measured to be slower, failed its self-check); or None."""
        return None

    @abc.abstractmethod
    def __call__(self, arguments: A) -> Any:
        """Computes the op."""


class Op[A]:
    """The implementations of one op, and its name for messages."""

    def __init__(self, name: str, *implementations: Implementation[A]):
        self.name = name
        self.implementations: Registry[Implementation[A]] = Registry(f"{name} implementation")
        for one in implementations:
            self.implementations.register(one)
        _OPS.append(self)

    def choose(self, arguments: A, implementation: str | None = None) -> Implementation[A]:
        """Which implementation computes this: one by name, or what suits the device.

        Where None is named FDQ_IMPLEMENTATION in the environment is read, while tracing. It stands
        for a whole program: what its choice cannot do, another does, and a name that only other
        ops know counts as none. An unknown name is a ValueError, a named one that cannot compute
        this a NotImplementedError with all reasons.
        """
        name = implementation or self._requested()
        known = tuple(self.implementations.values())
        if name is not None and name not in self.implementations:
            source = "implementation" if implementation else "FDQ_IMPLEMENTATION"
            options = ", ".join(map(repr, reversed(list(self.implementations))))
            raise ValueError(
                f"{self.name}: unknown {source} {name!r}; use one of {options}, or None."
            )
        reasons = {}
        for one in known if name is None else (self.implementations[name],):
            reason = (None if name else one.skipped()) or one.unsupported(arguments)
            reason = reason or (None if name else one.declined(arguments))
            if reason is None:
                _log_once(self.name, one.name, "; ".join(reasons.values()) or "preferred")
                return one
            reasons[one.name] = reason
        if implementation is None:  # FDQ_IMPLEMENTATION names one that cannot
            for one in known:
                fits = one.name not in reasons and one.skipped() is None
                if fits and (one.unsupported(arguments) or one.declined(arguments)) is None:
                    _log_once(self.name, one.name, "; ".join(reasons.values()))
                    return one
        others = [one for one in known if one.name != name]
        able = [repr(one.name) for one in others if one.unsupported(arguments) is None]
        reasons |= {one.name: one.unsupported(arguments) or "can" for one in others}
        listed = "; ".join(f"{key}: {why}" for key, why in reasons.items())
        raise NotImplementedError(
            f"{self.name}[{name}]: {reasons[str(name)]}; use implementation=None"
            f"{' or ' + ' or '.join(able) if able else ''}. ({listed})"
        )

    def _requested(self) -> str | None:
        name = requested()
        if name in self.implementations or not any(name in op.implementations for op in _OPS):
            return name
        return None


def requested() -> str | None:
    """The implementation that FDQ_IMPLEMENTATION asks for, or None."""
    return os.environ.get("FDQ_IMPLEMENTATION") or None


@functools.cache
def _log_once(op: str, name: str, reason: str) -> None:
    _LOGGER.info("%s runs as %r: %s", op, name, reason)
