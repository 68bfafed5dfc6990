"""One of several processes, or the only one, that convert, load, save and decode on one mesh.

python process.py INDEX COUNT PORT DIRECTORY MESH

Prints one JSON object. Four devices are there in all; the mesh is over them.
"""

import json
import pathlib
import sys

import jax
import numpy as np

INDEX, COUNT, PORT = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4 // COUNT)
if COUNT > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{PORT}", num_processes=COUNT, process_id=INDEX)

import tensorstore  # noqa: E402

import fdq  # noqa: E402
from fdq import processes  # noqa: E402
from fdq.sharding import parse_mesh  # noqa: E402
from fdq_checkpoints.store import orbax_store, restore  # noqa: E402

# As with the tensors of a large model: all that is cut is in pieces, and read in parts.
orbax_store.PIECE_BYTES, restore.MIN_PART_BYTES, restore.MIN_BATCH_BYTES = 2**12, 0, 2**17


held_on_host = {"now": 0, "peak": 0}


def local(array) -> int:
    """Bytes of it that this process has, replicas too."""
    shards = getattr(array, "addressable_shards", None)
    return array.nbytes if shards is None else sum(shard.data.nbytes for shard in shards)


def counted(read):
    """What has been read stays; what is read is there twice until it is where it belongs."""

    def call(reader, names, shardings=None):
        found = read(reader, names, shardings)
        size = sum(map(local, found.values()))
        held_on_host["peak"] = max(held_on_host["peak"], held_on_host["now"] + 2 * size)
        held_on_host["now"] += size
        return found

    return call


def bytes_read() -> int:
    """From files, by whatever library, since the process began."""
    name = "/tensorstore/kvstore/file/bytes_read"
    found = tensorstore.experimental_collect_matching_metrics(name)
    return sum(int(value.get("value", 0)) for one in found for value in one["values"])


def held(model) -> dict[str, int]:
    """Bytes of the weights that this process has, once and on all of its devices."""
    leaves = jax.tree.leaves(model)
    once = [
        {str(part.index): part.data.nbytes for part in leaf.addressable_shards} for leaf in leaves
    ]
    layer = sum(leaf.nbytes for leaf in jax.tree.leaves(model.layers[0]))
    return {
        "on_devices": sum(map(local, leaves)),
        "share": sum(sum(parts.values()) for parts in once),
        "layer": layer,
        "all": sum(leaf.nbytes for leaf in leaves),
    }


def logits_of(model, steps: int) -> np.ndarray:
    """[steps, 2, V] of greedy decoding from two prompts."""
    fns = fdq.functional(model)
    step = jax.jit(fns.step)
    state = fdq.prefill(model, [[3, 1, 4], [1, 5, 9]], model.init_cache(2, 16))
    found = []
    for _ in range(steps):
        logits, state = step(fns.params, state)
        found.append(processes.on_host(logits))
        state = state.push(found[-1].argmax(-1))
    return np.stack(found)


def main(folder: pathlib.Path, text: str) -> None:
    """Converts a float checkpoint, loads what it made on a mesh, saves that, and decodes."""
    mesh, own = parse_mesh(text), folder / f"of {COUNT}"
    if not (own / "converted").exists():
        fdq.convert(folder / "float", own / "converted", "W8A16")
    before = bytes_read()
    orbax_store.TreeReader.read = counted(orbax_store.TreeReader.read)
    model = fdq.load(own / "converted", mesh=mesh, verify=False)
    said = {"read": bytes_read() - before, "peak": held_on_host["peak"], **held(model)}
    fdq.save(model, own / "saved")
    try:
        fdq.load(folder / "damaged", mesh=mesh)
        said["damaged"] = "loaded"
    except Exception as error:
        said["damaged"] = f"{type(error).__name__}: {error}"
    said["tokens"] = fdq.generate(model, [[3, 1, 4], [1, 5, 9]], 4, stop_tokens=())
    found = logits_of(model, 3)
    if INDEX == 0:
        np.save(own / "logits.npy", found)
    print(json.dumps(said))
    if COUNT > 1:
        jax.distributed.shutdown()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[4]), sys.argv[5])
