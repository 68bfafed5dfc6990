"""Checks the shapes and dtypes that public functions announce, in every call that a test makes.

`check_calls` has to run before the packages are imported. A function is checked if it is public
and one of its annotations says a shape; those inside it, and private ones, are left alone, so that
kernels trace as fast as without.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import re
import sys
import types

import beartype
import jaxtyping

PACKAGES = ("pallas_kernels", "fdq", "fdq_checkpoints")
CHECKED: set[str] = set()  # dotted names of the functions that are checked in this process

_SAYS_A_SHAPE = re.compile(r"\b(Bool|Float|Int|Num|Shaped)\[")


def check_calls() -> None:
    """Makes modules of the three packages that are imported from now on check their calls."""
    sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] not in PACKAGES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(fullname, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module):
        super().exec_module(module)
        for holder in (module, *(v for v in vars(module).values() if isinstance(v, type))):
            if holder is not module and holder.__module__ != module.__name__:
                continue
            for name, value in list(vars(holder).items()):
                if isinstance(value, types.FunctionType) and _is_checked(name, value, module):
                    setattr(holder, name, _checked(value))
                    CHECKED.add(f"{module.__name__}.{value.__qualname__}")


def _checked(function: types.FunctionType):
    checked = jaxtyping.jaxtyped(function, typechecker=beartype.beartype)

    @functools.wraps(function)
    def call(*args, **kwargs):
        try:
            return checked(*args, **kwargs)
        except jaxtyping.TypeCheckError:
            function(*args, **kwargs)  # what it refuses itself gets its own message
            raise

    return call


def _is_checked(name: str, function: types.FunctionType, module: types.ModuleType) -> bool:
    public = not name.startswith("_") or name == "__call__"
    words = map(str, function.__annotations__.values())
    here = function.__module__ == module.__name__
    return public and here and any(_SAYS_A_SHAPE.search(word) for word in words)
