"""One of two processes that save a model whose weights are spread over both.

python two_processes.py INDEX PORT DIRECTORY
"""

import pathlib
import sys
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")


def main(index: int, port: str, folder: pathlib.Path) -> None:
    """Saves, saves in vain, loads; converts and loads what is wrong, all of it or here only."""
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
    import fdq
    from fdq_checkpoints import stream
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

    def tried(what: str, act: Callable[[], object]) -> None:
        try:
            act()
            print(f"{what}: done")
        except Exception as error:
            print(f"{what}: {type(error).__name__}: {error}")

    sources, out = folder / "sources", folder / "out"
    tried("nan", lambda: fdq.convert(sources / "nan", out, "W8A16"))
    tried("itself", lambda: fdq.convert(folder / "model", folder / "model", None, overwrite=True))
    done = stream.Job._done

    def fails_here(job, tensor, part):
        if index == 1 and tensor.path[-2] == "down_proj":
            raise MemoryError("no room here")
        return done(job, tensor, part)

    stream.Job._done = fails_here
    tried("one", lambda: fdq.convert(builders.MODELS / "qwen3", out, "W8A16"))
    mesh = fdq.sharding.make_mesh({"data": 4})
    tried("first", lambda: fdq.load(sources / "first", mesh=mesh))
    tried("unchecked", lambda: fdq.load(sources / "first", mesh=mesh, verify=False))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3]))
