"""One of two processes that save a model whose weights are spread over both.

python two_processes.py INDEX PORT DIRECTORY
"""

import pathlib
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")


def main(index: int, port: str, folder: pathlib.Path) -> None:
    """Saves, saves in vain, and loads."""
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
    import fdq
    from tests.checkpoints import builders

    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def sharding(path, array):
        last = "x" if len(array.shape) > 1 and array.shape[-1] % 4 == 0 else None
        return NamedSharding(mesh, PartitionSpec(*[None] * (len(array.shape) - 1), last))

    model = fdq.load(builders.MODELS / "qwen3", "W8A16", sharding=sharding)
    fdq.save(model, folder / "model")
    print("saved")
    try:
        fdq.save(model, folder / "model")
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
    back = fdq.load(folder / "model", sharding=sharding)
    same = [
        np.array_equal(a.data, b.data)
        for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(model), strict=True)
        for a, b in zip(x.addressable_shards, y.addressable_shards, strict=True)
    ]
    print(f"loaded {all(same)}")
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3]))
