"""Which cases of a long table run by default: enough for all that is in it to be seen once.

The others are `slow`: `pytest --slow` runs the table whole, as `.ci/run` does.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import pytest

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
longest = functools.partial(pytest.param, marks=(pytest.mark.slow, pytest.mark.longest))


def covering(cases: Iterable[Any], facets: Callable[[Any], Sequence[Any]]) -> list[Any]:
    """All cases for `parametrize`; slow are those whose every facet an earlier one has.

    `facets` of a case are what it stands for: its format, its granularity. A case that brings a new
    value of any of them is not slow.
    """
    seen: set[Any] = set()
    parameters = []
    for case in cases:
        new = set(enumerate(facets(case))) - seen
        seen |= new
        values = case if isinstance(case, tuple) else (case,)
        parameters.append(pytest.param(*values, marks=() if new else pytest.mark.slow))
    return parameters


def slow_but(kept: Collection[str], cases: Iterable[Any]) -> list[Any]:
    """All cases for `parametrize`; slow are those whose `str` is not among `kept`."""
    return [case if str(case) in kept else slow(case) for case in cases]
