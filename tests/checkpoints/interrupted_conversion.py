"""Run as a program: a conversion that kills itself (SIGKILL) at a chosen point.

python interrupted_conversion.py SRC DST tensor:3   # after the third tensor
python interrupted_conversion.py SRC DST unrecorded # a batch is on disk, the journal lacks it
python interrupted_conversion.py SRC DST finalized  # all is written but fdq.json
"""

import os
import signal
import sys

import fdq_checkpoints
from fdq_checkpoints.store import manifest, orbax_store


def kill(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(src: str, dst: str, point: str) -> None:
    orbax_store.MIN_BATCH_BYTES = 1  # at most 64 batches, however small
    progress = None
    if point == "finalized":
        manifest.write = kill
    elif point == "unrecorded":
        saved = orbax_store.ocp.partial.save
        calls = []

        def save_and_die(*arguments: object, **options: object) -> None:
            saved(*arguments, **options)
            calls.append(1)
            if len(calls) == 3:
                kill()

        orbax_store.ocp.partial.save = save_and_die
    else:
        last, count = int(point.removeprefix("tensor:")), []

        def progress(*_: object) -> None:
            count.append(1)
            if len(count) == last:
                kill()

    fdq_checkpoints.convert(src, dst, "W8A16", progress=progress)


if __name__ == "__main__":
    main(*sys.argv[1:])
