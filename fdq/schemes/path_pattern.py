"""Globs over parameter paths such as `layers.3.mlp.experts.down_proj.kernel`.

`*` is any run of characters, dots included, `?` one character, `[ab]` one of a set,
`{0..6}` a whole number in a range, `{q,k,v}` one of several words. A pattern covers what it
matches and everything below: `layers.0` covers `layers.0.mlp.down_proj.kernel` and not
`layers.01` or `layers.0x`.
"""

import functools
import re
from collections.abc import Iterable
from typing import Any, Literal

Reach = Literal["leaf", "module", "ancestor"]


def path_keys(entries: Iterable[Any]) -> tuple[Any, ...]:
    """The dict keys, list indices and attribute names in a key path of `jax.tree_util`."""

    def key(entry: Any) -> Any:
        attributes = ("key", "idx", "name")
        return next((getattr(entry, a) for a in attributes if hasattr(entry, a)), str(entry))

    return tuple(map(key, entries))


@functools.lru_cache(maxsize=1024)
def compiled(pattern: str) -> re.Pattern[str]:
    """The regular expression of a glob; ValueError where it cannot be read."""
    if not isinstance(pattern, str) or not pattern.strip():
        raise ValueError(
            f"A rule needs a pattern such as 'layers.0' or '*.experts', got {pattern!r}."
        )
    parts, at = [], 0
    while at < len(pattern):
        char = pattern[at]
        at += 1
        if char in "*?":
            parts.append(".*" if char == "*" else ".")
        elif char in "[{":
            end = pattern.find("]" if char == "[" else "}", at)
            if end <= at:
                raise ValueError(f"Pattern {pattern!r}: {char!r} is not closed, or is empty.")
            inside = pattern[at:end]
            parts.append(_set(inside) if char == "[" else _alternatives(inside, pattern))
            at = end + 1
        else:
            parts.append(re.escape(char))
    return re.compile("".join(parts))


def _set(inside: str) -> str:
    negated = inside[0] == "!"
    return f"[{'^' * negated}{re.escape(inside[negated:]).replace(r'\-', '-')}]"


def _alternatives(inside: str, pattern: str) -> str:
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if numbers is None:
        return f"(?:{'|'.join(map(re.escape, inside.split(',')))})"
    first, last = int(numbers[1]), int(numbers[2])
    if last < first:
        raise ValueError(f"Pattern {pattern!r}: the range {{{inside}}} is empty.")
    return f"(?:{'|'.join(map(str, range(first, last + 1)))})"


def reach(pattern: str, path: str) -> Reach | None:
    """Whether a pattern matches a leaf, the module that holds it, or something above; None: none.

    Example:
      >>> [reach(p, "mlp.up.kernel") for p in ("*.kernel", "mlp.up", "mlp", "up")]
      ['leaf', 'module', 'ancestor', None]
    """
    regex = compiled(pattern)
    if regex.fullmatch(path):
        return "leaf"
    components = path.split(".")
    for depth in range(len(components) - 1, 0, -1):
        if regex.fullmatch(".".join(components[:depth])):
            return "module" if depth == len(components) - 1 else "ancestor"
    return None


def names(pattern: str, path: str) -> bool:
    """Whether a pattern singles out this leaf or its module, not just a subtree around it.

    That is how a rule asks for what is not quantized by default: its last component must have
    letters or digits of its own (`*.conv` and `blocks.*.w_in` do, `blocks.*` does not).
    """
    last = re.split(r"\.(?![^{]*\})", pattern)[-1]
    return reach(pattern, path) in ("leaf", "module") and re.search(r"[^\W_]", last) is not None
