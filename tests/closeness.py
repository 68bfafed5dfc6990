"""How far two arrays are apart: one metric, one report, for every test."""

import numpy as np


def assert_close(actual, expected, *, of_largest: float, what: str = "result") -> None:
    """Asserts max |actual - expected| <= of_largest * max |expected|, in float64.

    Also asserts that the reference is not zero everywhere: comparing zeros with zeros proves
    nothing.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what}: {actual.shape} against {expected.shape}"
    largest = np.max(np.abs(expected))
    assert np.isfinite(expected).all() and largest > 0, (
        f"{what}: the reference is zero or not finite"
    )
    assert np.isfinite(actual).all(), f"{what}: {np.sum(~np.isfinite(actual))} values not finite"
    error = np.abs(actual - expected)
    worst = np.unravel_index(np.argmax(error), error.shape)
    violations = int(np.sum(error > of_largest * largest))
    assert violations == 0, (
        f"{what}: {violations} of {error.size} differ by more than {of_largest:g} of {largest:g}; "
        f"worst at {worst}: {actual[worst]:.9g} against {expected[worst]:.9g}"
        f" (relative difference {difference(actual, expected):.3g}, shape {actual.shape})"
    )


def error(actual, expected) -> float:
    """max |actual - expected| / max |expected| in float64; the reference must not be zero."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{actual.shape} against {expected.shape}"
    largest = np.max(np.abs(expected))
    assert largest > 0, "the reference is zero: comparing with it proves nothing"
    return float(np.max(np.abs(actual - expected)) / largest)


def difference(actual, expected) -> float:
    """1 - 2<x, y> / (|x|^2 + |y|^2) in float64: 0 when equal, scale-free."""
    x, y = np.asarray(actual, np.float64).ravel(), np.asarray(expected, np.float64).ravel()
    norm = x @ x + y @ y
    assert norm > 0, "both arrays are zero: comparing them proves nothing"
    return float(1 - 2 * (x @ y) / norm)


def relative_error(actual, expected) -> float:
    """|actual - expected| / |expected|, of Euclidean norms; the reference must not be small."""
    assert np.linalg.norm(expected) > 1
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
