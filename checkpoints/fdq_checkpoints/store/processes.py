"""Several processes that save together (`jax.distributed`).

Checksums are of whole arrays, so each process gathers them, one tensor at a time. Orbax has a
protocol of its own, in which all take part; what is written without it process 0 writes.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from fdq.processes import whole
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
    stack = contextlib.ExitStack()
    checked(lambda: stack.enter_context(enter()) if is_first() else None, folder)
    checked(lambda: _check_seen(folder), folder)
    error = None
    try:
        with stack:
            yield folder
    except Exception as raised:
        error = raised
    agree_all(error, folder)


def _check_seen(folder: pathlib.Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: made by process 0, and not seen by process {jax.process_index()}. Save to "
            "a disk that all processes share."
        )


def agree_all(error: Exception | None, folder: pathlib.Path) -> None:
    """Waits for all processes, and raises in all of them where one has an error; its own first.

    `folder` is what the others say that it was about.
    """
    failed = [error is not None]
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.int32(failed[0])).tolist()
    if error is not None:
        raise error
    if any(failed):
        which = f"process {failed.index(True)} of {len(failed)}"
        raise CheckpointError(f"{folder}: {which} failed; its own error says why.")


def checked[Made](make: Callable[[], Made], folder: pathlib.Path) -> Made:
    """What `make` gives in this process; raises in all processes where it raised in one."""
    made, error = None, None
    try:
        made = make()
    except Exception as raised:
        error = raised
    agree_all(error, folder)
    return cast(Made, made)


def in_step[Item](items: Iterable[Item], folder: pathlib.Path) -> Iterator[Item]:
    """Each item once all processes have made it; raises in all where one could not."""
    iterator, end = iter(items), object()
    while (item := checked(lambda: next(iterator, end), folder)) is not end:
        yield cast(Item, item)


def gathered(tensor: Tensor) -> Tensor:
    """A tensor of which this process may have a part only, whole."""
    if jax.process_count() == 1:
        return tensor
    value = tree_paths.map_arrays(lambda _, array: _whole(array), tensor)
    return dataclasses.replace(tensor, value=value)


def _whole(array: jax.Array) -> jax.Array | np.ndarray:
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.extended):
        return array
    return whole(array)
