"""Compiles a product of float8 rows for a GPU, without Triton, and prints whom XLA calls for it.

`python float8_program.py GPU SCHEME ACTIVATION`. On a card XLA times cuBLAS against Triton, which
nothing here can do: without Triton it shows whether the product is one that cuBLAS takes in float8.
"""

import functools
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies

import fdq
from fdq import ops
from pallas_kernels.aot.gpu_targets import find


def main(gpu: str, scheme: str, activation: str) -> None:
    """256 rows times a weight of 1024 x 640."""
    device = topologies.get_topology_desc(
        platform="cuda", target_config=find(gpu).target_config(), topology="1x1x1"
    ).devices[0]
    where = jax.sharding.SingleDeviceSharding(device)
    with jax.default_device(device):
        q = jax.eval_shape(lambda: ops.prepare(fdq.quantize(jnp.zeros((1024, 640)), scheme), "gpu"))
        arguments = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where),
            (jax.ShapeDtypeStruct((256, 1024), jnp.bfloat16), q),
        )
        lowered = jax.jit(functools.partial(fdq.matmul, activation=activation)).lower(*arguments)
    compiled = lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False})
    print("\n".join(re.findall(r'custom_call_target="([^"]+)"', compiled.as_text() or "")))


if __name__ == "__main__":
    main(*sys.argv[1:])
