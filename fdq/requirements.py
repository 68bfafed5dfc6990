"""What `import fdq` needs, looked at before anything else is imported.

An older jax or flax fails much later, in words that nobody understands; a newer one is refused by
the installer too. A fresh clone on the path has seen no installer.
"""

import importlib.metadata
import re
import sys

PYTHON = (3, 12)
NEEDED = {"jax": ">=0.11.2,<0.13", "flax": ">=0.12.10"}
"""Versions as in pyproject.toml."""


def problem() -> str | None:
    """What is installed, what is needed and what to run, in one line; None where all is well."""
    if sys.version_info < PYTHON:
        found = ".".join(map(str, sys.version_info[:3]))
        return f"fdq needs Python {'.'.join(map(str, PYTHON))} or newer; this is Python {found}."
    found = {name: installed(name) for name in NEEDED}
    if all(suits(version, NEEDED[name]) for name, version in found.items()):
        return None
    has = " and ".join(f"{name} {version or '(none)'}" for name, version in found.items())
    needed = " and ".join(name + range for name, range in NEEDED.items())
    quoted = " ".join(f"'{name}{range}'" for name, range in NEEDED.items())
    again = ", then restart Python (in a notebook: its kernel)" if "jax" in sys.modules else ""
    return f"fdq needs {needed}; found {has}. Run: pip install {quoted}{again}"


def installed(name: str) -> str | None:
    """The version of a package: of the one imported already, else of the one that would be."""
    version = getattr(sys.modules.get(name), "__version__", None)
    if version is None:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None
    return version


def suits(version: str | None, range: str) -> bool:
    """Whether a version is in a range such as `>=0.11.2,<0.13`."""
    if version is None:
        return False
    for bound in range.split(","):
        at_least = bound.startswith(">=")
        if (_numbers(version) >= _numbers(bound)) != at_least:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    """`"0.12.0.1"` -> (0, 12, 0, 1): up to what is no number, such as `rc1` or `dev2026`."""
    found = re.match(r"[<>=]*(\d+(?:\.\d+)*)", version)
    return tuple(map(int, found[1].split("."))) if found else ()


if (_problem := problem()) is not None:
    raise ImportError(_problem)
