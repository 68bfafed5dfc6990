"""The weights that every product is tested with: each format, each kind of scale."""

import functools

import jax.numpy as jnp
import numpy as np

from fdq.quantizers import quantize_array
from fdq.schemes.scheme import WeightSpec


def _group(format, size, scale_dtype="bfloat16", **kw):
    return WeightSpec(
        format=format, granularity="group", group_size=size, scale_dtype=scale_dtype, **kw
    )


SPECS = {
    "int8 channel": WeightSpec(format="int8"),
    "int8 tensor": WeightSpec(format="int8", granularity="tensor"),
    "int8 group integer": _group("int8", 32, zero_point="integer"),
    "int4 channel": WeightSpec(format="int4"),
    "int4 group": _group("int4", 64),
    "int4 group integer": _group("int4", 32, zero_point="integer"),
    "int3 group": _group("int3", 64),
    "int2 group half": _group("int2", 32, zero_point="half"),
    "float8_e4m3 channel": WeightSpec(format="float8_e4m3"),
    "float8_e4m3 block": WeightSpec(
        format="float8_e4m3", granularity="block", block_size=(128, 128)
    ),
    "float8_e5m2 channel": WeightSpec(format="float8_e5m2"),
    "nf4 group": _group("nf4", 64),
    "nf4 double": _group("nf4", 64, "float32", double_quantization=True),
    "mxfp4": _group("mxfp4", 32, "float8_e8m0fnu"),
    "mxfp8": _group("mxfp8", 32, "float8_e8m0fnu"),
    "nvfp4": _group("nvfp4", 16, "float8_e4m3fn"),
    "cc2": _group("cc2", 64, "uint4"),
}


@functools.cache
def weight(name, k=256, n=512):
    """A quantized ``[k, n]`` weight; the same one in every test."""
    rng = np.random.default_rng(k * 1000 + n)
    w = jnp.asarray(rng.standard_normal((k, n)), jnp.float32)
    method = None if name == "cc2" else "absmax"
    return quantize_array(w, SPECS[name], method=method)


def error(y, reference):
    """The largest difference, relative to the largest reference value (which must not be zero)."""
    reference = np.asarray(reference, np.float64)
    assert np.abs(reference).max() > 0
    return np.abs(np.asarray(y, np.float64) - reference).max() / np.abs(reference).max()
