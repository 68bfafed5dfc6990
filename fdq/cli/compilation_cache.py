"""What XLA has compiled is kept for the next command; for commands only, never by `import fdq`."""

import hashlib
import os
import pathlib
import platform

import jax

from fdq.user_cache import user_cache


def use() -> None:
    """Lets JAX keep what it compiles, unless the user has told it where, or there is no place.

    Each kind of processor has a folder of its own: a home is shared by different machines, and
    what was compiled for one may end another.
    """
    if jax.config.jax_compilation_cache_dir is not None or (cache := user_cache()) is None:
        return
    folder = cache / "compiled" / _processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(folder, os.W_OK):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # What compiles sooner is hardly read sooner.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _processor() -> str:
    """Stands for the instructions that this machine's processor has."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    of_one = [line for line in lines if line.startswith(("model name", "flags", "Features"))][:2]
    described = "\n".join([platform.machine(), platform.processor(), *of_one])
    return hashlib.sha256(described.encode()).hexdigest()[:12]
