"""Reads the fixtures of tests/oracles/formats."""

import functools
import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).parents[1] / "oracles" / "formats"


@functools.cache
def _file(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return dict(arrays)


def fixture(file: str, prefix: str) -> dict[str, np.ndarray]:
    """The arrays of ``file`` whose key starts with ``prefix/``, by the rest of the key."""
    found = {
        key.removeprefix(f"{prefix}/"): a
        for key, a in _file(file).items()
        if key.startswith(f"{prefix}/")
    }
    assert found, f"{file} has nothing under {prefix}"
    return found


def array(file: str, key: str) -> np.ndarray:
    """One array of ``file``."""
    return _file(file)[key]
