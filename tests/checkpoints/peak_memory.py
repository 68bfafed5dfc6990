"""Run as a program: the memory that loading a checkpoint takes at its peak, in bytes.

python peak_memory.py FOLDER SCHEME SMALL  # SCHEME may be none; SMALL is loaded first, to warm up
"""

import resource
import sys

import fdq_checkpoints


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(folder: str, scheme: str, small: str) -> None:
    name = None if scheme == "none" else scheme
    fdq_checkpoints.load(small, name)
    before = peak()
    loaded = fdq_checkpoints.load(folder, name)
    print(peak() - before)
    del loaded


if __name__ == "__main__":
    main(*sys.argv[1:])
