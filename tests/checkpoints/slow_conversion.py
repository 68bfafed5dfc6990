"""Run as a program: a conversion whose quantizer is slow, killed (SIGKILL) from outside its loop.

python slow_conversion.py SRC DST SCHEME SECONDS LOG    # seconds counted from the first part

A line of the log is a moment, a path, and how many of its columns were there then.
"""

import os
import signal
import sys
import threading
import time

import fdq_checkpoints
from fdq_checkpoints import slabs, stream
from fdq_checkpoints.store import journal

SECONDS_A_PART = 0.3


def main(src: str, dst: str, scheme: str, seconds: str, log: str) -> None:
    quantized, made = stream.Job._quantized, journal.Pieces.made
    timer = threading.Timer(float(seconds), os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    slabs.SLAB_WEIGHTS, slabs.SLAB_COLUMNS = 1, 16
    slabs.WAITING_BYTES = 0

    def slow(job, tensor, part):
        time.sleep(SECONDS_A_PART)
        return quantized(job, tensor, part)

    with open(log, "w", buffering=1) as file:

        def noted(pieces, tensor, arrays, stop):
            made(pieces, tensor, arrays, stop)
            if not timer.is_alive():
                timer.start()
            file.write(f"{time.time()} {'.'.join(tensor.path)} {stop}\n")

        stream.Job._quantized, journal.Pieces.made = slow, noted
        slabs._cores = lambda: 1
        fdq_checkpoints.convert(src, dst, scheme, method="absmax")
    timer.cancel()


if __name__ == "__main__":
    main(*sys.argv[1:])
