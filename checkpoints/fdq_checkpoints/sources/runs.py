"""Which checkpoint is meant by the directory of a run, or of one of its steps."""

import logging
import os
import pathlib
import re

from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.readers.local_directory import local_directory
from fdq_checkpoints.store import manifest, orbax_store

_LOGGER = logging.getLogger("fdq")
_WEIGHTS = (".safetensors", ".gguf")


def checkpoint_directory(path: str | os.PathLike[str]) -> pathlib.Path:
    """`local_directory(path)`, or the fdq checkpoint that belongs to the run or the step there.

    A step is a directory whose name ends in a number: an fdq checkpoint itself, or one beside the
    items that a CheckpointManager keeps in it (`run/1000/model`). Of a run the last step counts
    that is complete, of whichever kind it is; steps of Orbax alone are left to Orbax's importer.

    Raises:
      CheckpointError: a step has several checkpoints, of which one must be named.
      FileNotFoundError, TypeError: as `local_directory`.
    """
    folder = local_directory(path)
    if not folder.is_dir() or is_stored(folder):
        return folder
    names = os.listdir(folder)
    if "config.json" in names or any(name.lower().endswith(_WEIGHTS) for name in names):
        return folder  # a model of its own, whatever lies below it
    if inside := _in_step(folder):
        return inside
    if orbax_store.is_orbax(folder):
        return folder
    last = _last_step(folder)
    if last is not None:
        _LOGGER.info("%s: its last step, %s.", folder, last.relative_to(folder))
    return last or folder


def is_stored(folder: pathlib.Path) -> bool:
    """Whether a directory is an fdq checkpoint, or says that it is."""
    return os.path.lexists(folder / manifest.FILE_NAME)


def _in_step(step: pathlib.Path) -> pathlib.Path | None:
    """The fdq checkpoint among the items of a step; None where there is none, or no step."""
    if _number(step.name) is None or orbax_store.steps(step):
        return None
    found = [entry for entry in sorted(step.glob("*")) if entry.is_dir() and is_stored(entry)]
    if not found or any(_number(entry.name) is not None for entry in found):
        return None  # of a run that is called by a number as well
    trees = [entry.parent for entry in sorted(step.glob("*/_METADATA"))]
    if len(found) + len(trees) > 1:
        names = ", ".join(entry.name for entry in [*found, *trees])
        raise CheckpointError(f"{step}: has several checkpoints ({names}). Give {found[0]}.")
    return found[0]


def _last_step(run: pathlib.Path) -> pathlib.Path | None:
    """The fdq checkpoint of a run's last step; None where that is Orbax's, or nothing is one."""
    of_orbax = orbax_store.steps(run)
    steps: dict[pathlib.Path, tuple[str, int]] = {}
    for entry in run.iterdir():
        number = _number(entry.name)
        if number is None or not entry.is_dir():
            continue
        if entry.name in of_orbax or is_stored(entry) or _in_step(entry) is not None:
            steps[entry] = number
    # Models that lie side by side may end in numbers too: qwen-2, llama-3.
    if not steps or len({prefix for prefix, _ in steps.values()}) > 1:
        return None
    last = max(steps, key=lambda entry: steps[entry][1])
    return last if is_stored(last) else _in_step(last)


def _number(name: str) -> tuple[str, int] | None:
    """What comes before the number that a step's name ends in, and it: `step_00007`, `7`."""
    # Not the 4 of `qwen-w4`.
    match = re.fullmatch(r"(|.*[_.-]|step|epoch|ckpt|checkpoint)([0-9]{1,18})", name)
    return (match[1], int(match[2])) if match else None
