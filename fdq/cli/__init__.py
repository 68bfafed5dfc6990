"""The `fdq` command; needs the extra `cli`.

`main` is the entry point. One file holds one command; `fdq.cli.app` puts them together and
`fdq.cli.console` holds what they share: output, errors, exit codes.
"""

import glob
import os
import sys

# Modules of the extra: their absence is explained, that of any other is a defect and is shown.
_EXTRA = ("tokenizers", "typer", "rich")
# What the kernel shows of an NVIDIA GPU: a card, one of a Windows host, one of a Jetson.
_GPU_DEVICES = ("/dev/nvidia[0-9]*", "/dev/dxg", "/dev/nvhost-*")


def main() -> None:
    """Runs the command line; exits with 0 or as `fdq.cli.console` says: 1, 2, 3 or 130."""
    if not any(glob.glob(pattern) for pattern in _GPU_DEVICES):
        # The extra `aot` brings JAX's CUDA plugin without CUDA's libraries. Where there is no GPU
        # that they could be for, their absence is no error to print a traceback for.
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    try:
        from fdq.cli import compilation_cache
        from fdq.cli.app import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in _EXTRA:
            raise
        print(
            f"The fdq command needs the package {error.name!r}: pip install {' '.join(_EXTRA)}, "
            "or in a clone of fdq pip install -e '.[cli]'",
            file=sys.stderr,
        )
        sys.exit(2)
    compilation_cache.use()
    app(prog_name="fdq")
