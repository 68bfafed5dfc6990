"""What a launch asks of the compiler."""

import pytest

from pallas_kernels.aot.ahead_of_time import unavailable
from tests.compiling_program import printed

needs_compiler = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


def shared_memory(kernel, directory):
    """What Mosaic infers of the buffers of a product, a line each."""
    return printed("shared_memory_program.py", "h100", directory, kernel).splitlines()


@needs_compiler
def test_shared_memory_is_neither_tiled_nor_swizzled(tmp_path):
    """A swizzle that Mosaic chose by itself made products of eight rows wrong on an H100."""
    lines = shared_memory("eight rows", tmp_path)
    assert len(lines) == 3, lines  # rows, their sums, the norms
    assert all("out_transforms = [[]]" in line for line in lines), lines


@needs_compiler
@pytest.mark.slow
@pytest.mark.longest
def test_what_wgmma_reads_is_swizzled_and_scales_are_not(tmp_path):
    lines = shared_memory("rows of float8", tmp_path)
    scales = [line for line in lines if "1x128xf32" in line]
    codes = [line for line in lines if "128x128xf8E4M3FN" in line]
    assert scales and codes
    assert all("out_transforms = [[]]" in line for line in scales), scales
    wanted = "out_transforms = [[#mosaic_gpu.tile<[8, 128]>, #mosaic_gpu.swizzle<128 : i32>]]"
    assert all(wanted in line for line in codes), codes
