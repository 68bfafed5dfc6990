"""Rows and decoded weights of products, and how far results may be from them."""

import functools

import jax.numpy as jnp
import numpy as np

from fdq.formats.qtensor import dequantize
from tests.formats.cases import quantized

TOLERANCE = 5e-6


@functools.cache
def decoded(name, k=256, n=512):
    return np.asarray(dequantize(quantized(name, k, n)), np.float64)


def rows(rng, m, k=256):
    return jnp.asarray(rng.standard_normal((m, k)), jnp.float32)
