"""Compiles a product for a GPU and prints what Mosaic infers of its shared memory.

`python shared_memory_program.py GPU DIRECTORY KERNEL`, a key of `PRODUCTS`: in a process of its
own, for the directory that Mosaic dumps into is read once.
"""

import functools
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
from canonical_weights import CASES, random_weight
from jax.experimental import topologies

from pallas_kernels.aot.gpu_targets import find
from pallas_kernels.matmul.float8_blocks import float8_blocks
from pallas_kernels.matmul.matrix_vector import matrix_vector


def weight(storage: str, k: int):
    """One of the cases, by its name."""
    return random_weight(next(case for case in CASES if str(case) == storage), k, 640)[0]


def eight_rows():
    """Times int4 in groups of 128: a step reads 4 of the 16 units of a segment."""
    return matrix_vector, (jnp.zeros((8, 1024), jnp.float16), weight("int4-group-128", 1024))


def rows_of_float8():
    """Each warp group reads its half of the rows' scales."""
    x, scale = jnp.zeros((128, 1024), jnp.float8_e4m3fn), jnp.zeros((128, 8), jnp.float32)
    blocks = weight("float8_e4m3-block-(128, 128)", 1024)
    return functools.partial(float8_blocks, dtype=jnp.bfloat16), (x, scale, blocks)


PRODUCTS = {"eight rows": eight_rows, "rows of float8": rows_of_float8}


def main(gpu: str, directory: pathlib.Path, kernel: str) -> None:
    """Compiles one."""
    device = topologies.get_topology_desc(
        platform="cuda", target_config=find(gpu).target_config(), topology="1x1x1"
    ).devices[0]
    os.environ |= {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_TO": str(directory)}
    product, arguments = PRODUCTS[kernel]()
    where = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), arguments
    )
    with jax.default_device(device):
        jax.jit(product).lower(*arguments).compile()
    (inferred,) = directory.glob("*after_layout_inference*")
    print("\n".join(line for line in inferred.read_text().splitlines() if "slice_smem" in line))


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3])
