"""Several processes that save together (`jax.distributed`).

Checksums are of whole arrays, so each process gathers them, one tensor at a time. Orbax has a
protocol of its own, in which all take part; what is written without it process 0 writes.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from fdq_checkpoints import tree_paths
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.tree_paths import Tensor

Directory = contextlib.AbstractContextManager[pathlib.Path]


def is_first() -> bool:
    """Whether this process writes what is not left to Orbax."""
    return jax.process_index() == 0


@contextlib.contextmanager
def directory_of_first(
    enter: Callable[[], Directory], folder: pathlib.Path
) -> Iterator[pathlib.Path]:
    """A context that process 0 enters for all, which makes `folder`; what it raises, all raise."""
    if jax.process_count() == 1:
        with enter():
            yield folder
        return
    stack, error = contextlib.ExitStack(), None
    if is_first():
        try:
            stack.enter_context(enter())
        except Exception as raised:
            error = raised
    agree(error)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: made by process 0, and not seen by process {jax.process_index()}. Save to "
            "a disk that all processes share."
        )
    try:
        with stack:
            yield folder
    except Exception as raised:
        if not is_first():
            raise
        error = raised
    agree(error)


def agree(error: Exception | None = None) -> None:
    """Waits for all processes; raises the error of process 0, elsewhere that there was one."""
    if jax.process_count() == 1:
        return
    succeeded = bool(multihost_utils.broadcast_one_to_all(np.int32(error is None)))
    if error is not None:
        raise error
    if not succeeded:
        raise CheckpointError("save: process 0, which writes, could not; its own error says why.")


def agree_all(check: Callable[[], None]) -> None:
    """Runs `check` in every process, and raises in all of them where it raised in one."""
    error = None
    try:
        check()
    except Exception as raised:
        error = raised
    failed = multihost_utils.process_allgather(np.int32(error is not None))
    if error is not None:
        raise error
    if np.any(failed):
        first = int(np.argmax(np.asarray(failed)))
        raise CheckpointError(f"load: process {first} found a problem; its own error says which.")


def gathered(tensor: Tensor) -> Tensor:
    """A tensor of which this process may have a part only, whole."""
    if jax.process_count() == 1:
        return tensor
    whole = tree_paths.map_arrays(lambda _, array: _whole(array), tensor)
    return dataclasses.replace(tensor, value=whole)


def _whole(array: jax.Array) -> jax.Array | np.ndarray:
    if not isinstance(array, jax.Array) or jnp.issubdtype(array.dtype, jax.dtypes.extended):
        return array
    if array.is_fully_addressable or array.is_fully_replicated:
        return array
    return multihost_utils.process_allgather(array, tiled=True)
