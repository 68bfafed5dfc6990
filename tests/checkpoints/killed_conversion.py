"""Run as a program: a conversion that is killed (SIGKILL) from outside its loop, after a while.

python killed_conversion.py SRC DST SCHEME SECONDS    # counted from its beginning
"""

import os
import signal
import sys
import threading

import fdq_checkpoints
from fdq_checkpoints.store import orbax_store


def main(src: str, dst: str, scheme: str, seconds: str) -> None:
    orbax_store.MIN_BATCH_BYTES = 1  # at most 64 batches, however small
    timer = threading.Timer(float(seconds), os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()
    fdq_checkpoints.convert(src, dst, scheme, method="absmax")
    timer.cancel()


if __name__ == "__main__":
    main(*sys.argv[1:])
