"""HQQ: against its published iteration written in float64 NumPy, and where it stands."""

import dataclasses

import numpy as np
import pytest

import fdq
from fdq.quantizers import quantize_array
from fdq.schemes.scheme import Scheme


def spec_of(name):
    spec = Scheme.parse(name).weight
    assert spec is not None
    return spec


def offsets(w, bits, group):
    """`-scale * zero` of each group: the zero point is optimized, the scale is the range's."""
    groups = w.astype(np.float64).reshape(-1, group, w.shape[1])
    low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
    scale = (high - low) / (2**bits - 1)
    zero, beta, best = -low / scale, 10.0, np.inf
    for _ in range(20):
        q = np.clip(np.round(groups / scale + zero), 0, 2**bits - 1)
        w_r = (q - zero) * scale
        error = np.abs(groups - w_r).mean()
        if error >= best:
            break
        best, kept = error, zero
        size = np.maximum(np.abs(groups - w_r), 1e-30)
        e = np.sign(groups - w_r) * np.maximum(size - size ** (0.7 - 1) / beta, 0)
        zero = np.mean(q - (groups - e) / scale, axis=1, keepdims=True)
        beta *= 1.01
    return (-scale * kept)[:, 0]


def test_offsets_of_the_published_iteration(rng):
    bits = 3
    w = (0.02 * rng.standard_t(5, (128, 32))).astype(np.float32)
    exact = dataclasses.replace(spec_of("W3A16-g64-affine"), scale_dtype="float32")
    q = quantize_array(w, exact, method="hqq")
    # A weight between two levels may go to either, and the offset after it.
    close = np.isclose(np.asarray(q.offset, np.float64), offsets(w, bits, 64), rtol=1e-4)
    assert close.mean() > 0.9

    def error(method):
        other = quantize_array(w, spec_of("W3A16-g64-affine"), method=method)
        return np.square(np.asarray(fdq.dequantize(other)) - w).mean()

    assert error("search") < error("hqq") < 0.97 * error("absmax")
    with pytest.raises(ValueError, match=r"'hqq', which is for integers with an offset"):
        quantize_array(w, spec_of("W4A16-g64"), method="hqq")
