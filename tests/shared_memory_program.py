"""Compiles a product of eight rows for a GPU and prints what Mosaic infers of its shared memory.

`python shared_memory_program.py GPU DIRECTORY`: in a process of its own, for the directory that
Mosaic dumps into is read once.
"""

import os
import pathlib
import sys

import jax
import jax.numpy as jnp
from canonical_weights import CASES, random_weight
from jax.experimental import topologies

from pallas_kernels.aot.gpu_targets import find
from pallas_kernels.matmul.matrix_vector import matrix_vector


def main(gpu: str, directory: pathlib.Path) -> None:
    """Eight rows times int4 in groups of 128: a step reads 4 of the 16 units of a segment."""
    device = topologies.get_topology_desc(
        platform="cuda", target_config=find(gpu).target_config(), topology="1x1x1"
    ).devices[0]
    os.environ |= {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_TO": str(directory)}
    w, _ = random_weight(next(case for case in CASES if str(case) == "int4-group-128"), 1024, 640)
    where = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where),
        (jnp.zeros((8, 1024), jnp.float16), w),
    )
    with jax.default_device(device):
        jax.jit(matrix_vector).lower(*arguments).compile()
    (inferred,) = directory.glob("*after_layout_inference*")
    print("\n".join(line for line in inferred.read_text().splitlines() if "slice_smem" in line))


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]))
