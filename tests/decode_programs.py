"""Writes the PTX of a kernel that does nothing but decode; a process of its own.

    python decode_programs.py GPU DIRECTORY FORMAT ...

puts it into ``DIRECTORY/FORMAT.ptx``. Such a kernel reads int32 words ``[words, 512]``, then one
float32 ``[1, 512]`` for each constant of a column, and writes the float32 rows ``[rows, 512]``.
"""

import os
import pathlib
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from pallas_kernels.aot.gpu_targets import find
from pallas_kernels.mosaic.launch import launch, runs_interpreted
from pallas_kernels.weights.formats import WORD_FORMATS

COLUMNS = 512


def decode(format, words, *constants):
    """Every row of one unit of each column."""

    def body(words_ref, *refs):
        *constant_refs, out_ref = refs
        # The compiled kernel has its pointers in the order of their first use.
        words = [words_ref[i, :] for i in range(format.words)]
        columns = [ref[0, :] for ref in constant_refs]
        for row, value in enumerate(format.decode(words, columns, runs_interpreted())):
            out_ref[row, :] = value

    body.__name__ = format.name  # the compiler keeps kernels that it has seen
    out = jax.ShapeDtypeStruct((format.rows, COLUMNS), jnp.float32)
    return launch(body, (words, *constants), out_type=out, grid=(1,), grid_names=("block",))


def main(gpu: str, directory: pathlib.Path, names: list[str]) -> None:
    """Compiles one format after the other."""
    device = topologies.get_topology_desc(
        platform="cuda", target_config=find(gpu).target_config(), topology="1x1x1"
    ).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    dump = directory / "dump"
    dump.mkdir()
    # Read once, at the first compile.
    os.environ |= {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_TO": str(dump)}
    for name in names:
        format = WORD_FORMATS[name]
        shapes = [((format.words, COLUMNS), jnp.int32)]
        shapes += [((1, COLUMNS), jnp.float32)] * len(format.columns)
        arguments = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]
        with jax.default_device(device):
            run = jax.jit(lambda *arrays, format=format: decode(format, *arrays))
            run.lower(*arguments).compile()
        (ptx,) = {path.read_text() for path in dump.glob("*.ptx")}
        (directory / f"{name}.ptx").write_text(ptx)
        for path in dump.iterdir():
            path.unlink()


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3:])
