"""A file that is read by `pread`: pages of a memory map would count as the process's memory."""

import os
from typing import Self

import numpy as np

from fdq_checkpoints.errors import CheckpointError

_ALIGNMENT = 64
_READ_BYTES = 64 * 2**20  # one system call; Linux reads at most 2 GiB at a time


class OpenFile:
    """A file whose header is looked at as it is opened (`_open`); a context manager."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        # Without O_NONBLOCK, opening a FIFO would wait for a writer.
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be opened ({error.strerror}).") from error
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        """Reads the header; CheckpointError says what is wrong with it."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; reading afterwards fails."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read_bytes(self, start: int, stop: int, what: str) -> np.ndarray:
        """Bytes `[start, stop)` of the file, uint8; `what` they are, for errors."""
        # JAX takes what is aligned as it is, and copies other arrays.
        raw = np.empty(stop - start + _ALIGNMENT, np.uint8)
        data = raw[-raw.ctypes.data % _ALIGNMENT :][: stop - start]
        view = memoryview(data)
        done = 0
        while done < len(view):
            part = view[done : done + _READ_BYTES]
            count = os.preadv(self._fd, [part], start + done)
            if count == 0:
                raise CheckpointError(
                    f"{self.path}: {what}: the file became shorter while it was read."
                )
            done += count
        return data
