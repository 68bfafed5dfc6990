"""What writes a checkpoint refuses, before anything else, a destination that is no local path."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from fdq_checkpoints.readers.local_directory import local_destination


def local[F: Callable[..., Any]](function: F, argument: str) -> F:
    """The function, which raises CheckpointError where that argument is an address."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(*args, **kwargs).arguments
        local_destination(given.get(argument, ""))
        return function(*args, **kwargs)

    return call  # pyright: ignore[reportReturnType]
