"""How far it is from `fdq.matmul` to the kernel, and how many files one enters on the way."""

import pathlib
import traceback

import jax.numpy as jnp
import pytest

import fdq
import pallas_kernels
from pallas_kernels.matmul import matrix_vector

OWN = (pathlib.Path(fdq.__file__).parent, pathlib.Path(pallas_kernels.__file__).parent)


def own_frames() -> list[traceback.FrameSummary]:
    """Frames of the library on the stack, from `fdq.matmul` on."""
    frames = [
        frame
        for frame in traceback.extract_stack()
        if any(parent in pathlib.Path(frame.filename).parents for parent in OWN)
    ]
    first = next(i for i, frame in enumerate(frames) if frame.name == "matmul")
    return frames[first:]


@pytest.fixture
def stacks(monkeypatch):
    """Frames at the entrance of the kernel, and where it is launched."""
    found = []
    entrance, launch = matrix_vector.matrix_vector, matrix_vector.launch

    def at_entrance(*arguments, **settings):
        found.append(own_frames())
        return entrance(*arguments, **settings)

    def at_launch(*arguments, **settings):
        found.append(own_frames())
        return launch(*arguments, **settings)

    monkeypatch.setattr(matrix_vector, "matrix_vector", at_entrance)
    monkeypatch.setattr(matrix_vector, "launch", at_launch)
    return found


def test_the_kernel_is_six_frames_and_eight_files_away(stacks, monkeypatch):
    monkeypatch.setenv("FDQ_IMPLEMENTATION", "mosaic_gpu")
    q = fdq.prepare(fdq.quantize(jnp.ones((128, 136)), "W4A16"))
    fdq.matmul(jnp.ones((3, 128)), q)
    entrance, launch = stacks
    assert len(entrance) <= 6, [frame.name for frame in entrance]
    files = {frame.filename for frame in launch}
    assert len(files) <= 8, files
