"""What an exporter is: it says what it would write of a model, or why it cannot, and writes it."""

import abc
import dataclasses
import pathlib
from typing import Any, Protocol

from fdq.registry import Registry
from fdq_checkpoints.export.origin import Origin
from fdq_checkpoints.stream import Progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a caller may choose.

    Attributes:
      dtype: of weights that are decoded; None is that of the model's activations.
      shard_bytes: the most bytes of tensors in a file, where a format has several; one tensor may
        be larger.
    """

    dtype: Any = None
    shard_bytes: int = 5 * 10**9


class Plan(abc.ABC):
    """What an exporter is going to write; all that can be refused was refused before.

    Attributes:
      nbytes: about how much.
      notes: what whoever reads the files should know, a line each.
      formats: how many tensors are stored in which way, for people.
    """

    nbytes: int
    notes: tuple[str, ...] = ()
    formats: dict[str, int]

    @abc.abstractmethod
    def write(self, folder: pathlib.Path, progress: Progress | None) -> None:
        """Writes all files into an empty folder, a tensor of the model at a time."""


class Exporter(Protocol):
    """One layout of files; a member of `EXPORTERS`, which users may add to."""

    @property
    def name(self) -> str:
        """What `to=` and `--to` call it."""
        ...

    def plan(self, origin: Origin, options: Options) -> Plan:
        """What would be written; reads no weights.

        Raises:
          CheckpointError: names the first tensor that the layout cannot hold exactly, its format,
            and which exporter would hold it.
        """
        ...

    def wrote(self, file: pathlib.Path) -> bool:
        """Whether a file is one that it may have written: only such are overwritten."""
        ...


EXPORTERS: Registry[Exporter] = Registry("exporter")
"""By the name that `to=` takes."""
