"""Kernels and programs that the tests of ahead-of-time compiles compile, in child processes."""

import functools
import os
import time

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mg

from pallas_kernels.aot.gpu_targets import ALL
from pallas_kernels.aot.kernel_cases import KernelCase, Program, fma_weights
from pallas_kernels.mosaic.launch import launch

COLUMNS = 512  # of a block: four a thread
GROUP = 128
NIBBLES = 8  # of a word
K = N = 2048
SPLIT = 4


def four_bit_matrix_vector(words, scale, x):
    """int4 x [K] @ w [K, N] in float32: words [K / 8, N] int32, scale [K / 128, N] float32.

    A nibble at bits 19 to 22 of a float32 whose other bits are 0x41800000 is 16 + q.
    """
    groups = scale.shape[0] // SPLIT

    def probe(words_ref, scale_ref, x_ref, out_ref):
        part = lax.axis_index("part")
        columns = pl.ds(pl.multiple_of(lax.axis_index("block") * COLUMNS, COLUMNS), COLUMNS)

        def add_word(row, carry):
            total, sum_x = carry
            word = words_ref[row, columns]
            for nibble in range(NIBBLES):
                shift = 19 - 4 * nibble
                moved = word << shift if shift > 0 else word >> -shift
                value = lax.bitcast_convert_type((moved & 0x780000) | 0x41800000, jnp.float32)
                element = x_ref[row * NIBBLES + nibble]
                total, sum_x = total + value * element, sum_x + element
            return total, sum_x

        def add_group(i, total):
            group = part * groups + i
            first = group * (GROUP // NIBBLES)
            zero = jnp.zeros((COLUMNS,), jnp.float32)
            product, sum_x = lax.fori_loop(
                first, first + GROUP // NIBBLES, add_word, (zero, jnp.float32(0))
            )
            # Codes are q - 8, and 16 was added to them.
            return total + (product - sum_x * jnp.float32(24)) * scale_ref[group, columns]

        start = jnp.zeros((COLUMNS,), jnp.float32)
        out_ref[part, columns] = lax.fori_loop(0, groups, add_group, start)

    parts = launch(
        probe,
        (words, scale, x),
        out_type=jax.ShapeDtypeStruct((SPLIT, N), jnp.float32),
        grid=(N // COLUMNS, SPLIT),
        grid_names=("block", "part"),
    )
    return parts.sum(0)


def accumulate(x, *, live):
    """Sums `live` rows of [512] at a time, each in 4 registers of a thread, in one loop."""

    def accumulators(x_ref, out_ref):
        def body(i, sums):
            return tuple(s * x_ref[i] + x_ref[i + j] for j, s in enumerate(sums))

        zeros = tuple(jnp.zeros((COLUMNS,), jnp.float32) for _ in range(live))
        for j, total in enumerate(lax.fori_loop(0, 64, body, zeros)):
            out_ref[j] = total

    return launch(
        accumulators,
        (x,),
        out_type=jax.ShapeDtypeStruct((live, COLUMNS), jnp.float32),
        grid=(1,),
        grid_names=("block",),
    )


def in_shared_memory(x):
    """Doubles [1024] by way of 4096 bytes of shared memory."""

    def staged(x_ref, out_ref, shared_ref):
        shared_ref[...] = x_ref[...]
        out_ref[...] = shared_ref[...] * jnp.float32(2)

    return launch(
        staged,
        (x,),
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(1,),
        grid_names=("block",),
        scratch_types=(mg.SMEM((1024,), jnp.float32),),
    )


def needs_hopper(x):
    """Has an instruction that aborts the compiler below sm_90."""

    def fenced(x_ref, out_ref):
        out_ref[...] = x_ref[...]
        mg.commit_smem()

    return launch(
        fenced, (x,), out_type=jax.ShapeDtypeStruct(x.shape, x.dtype), grid=(1,), grid_names=("b",)
    )


def exponential(x):
    """Needs libdevice."""

    def exponentials(x_ref, out_ref):
        out_ref[...] = jnp.exp(x_ref[...])

    return launch(
        exponentials,
        (x,),
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(1,),
        grid_names=("b",),
    )


def device_facts(x):
    """Adds what the default device says of itself to x, so that the compiled program shows it."""
    device = jax.config.jax_default_device
    major, minor = map(int, device.compute_capability.split("."))
    return x + jnp.float32(1000 * device.core_count + 10 * major + minor)


def updates(cache, row, position):
    """Writes a row into a cache and reads the cache."""
    cache = lax.dynamic_update_slice(cache, row, (position, jnp.int32(0)))
    return cache, cache.astype(jnp.float32).sum(1)


def looped(x, w):
    """Five products in a loop of known length."""
    return lax.fori_loop(0, 5, lambda i, x: jnp.tanh(x @ w), x)


def _one_argument(function, *shape):
    return Program(function=function, arguments=(jax.ShapeDtypeStruct(shape, jnp.float32),))


def _matrix_vector():
    return Program(
        function=four_bit_matrix_vector,
        arguments=(
            jax.ShapeDtypeStruct((K // NIBBLES, N), jnp.int32),
            jax.ShapeDtypeStruct((K // GROUP, N), jnp.float32),
            jax.ShapeDtypeStruct((K,), jnp.float32),
        ),
    )


def _updates(donate):
    return Program(
        function=updates,
        arguments=(
            jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16),
            jax.ShapeDtypeStruct((1, 1024), jnp.bfloat16),
            jax.ShapeDtypeStruct((), jnp.int32),
        ),
        donate=donate,
    )


def _looped():
    square = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    return Program(function=looped, arguments=(square, square))


def _sleeps():
    time.sleep(60)


def _exits():
    os._exit(3)


def _raises():
    raise ValueError("a reason\nin two lines")


def _case(name, build, *arguments, **options):
    build = functools.partial(build, *arguments)
    return KernelCase(name=name, kernel=name, build=build, **options)


PROBE = _case(
    "matrix-vector probe",
    _matrix_vector,
    gpus=ALL,
    weights_per_iteration=functools.partial(fma_weights, 1),
    bytes_per_weight=0.5 + 4 / GROUP,
)
SPILLS = _case("spills", _one_argument, functools.partial(accumulate, live=80), 256, COLUMNS)
FITS = _case("fits", _one_argument, functools.partial(accumulate, live=16), 256, COLUMNS)
SHARED = _case("shared memory", _one_argument, in_shared_memory, 1024)
HOPPER = _case("needs sm_90", _one_argument, needs_hopper, 1024)
EXPONENTIAL = _case("exponential", _one_argument, exponential, 1024)
FACTS = _case("device facts", _one_argument, device_facts, 1024)
DONATED = _case("donated cache", _updates, (0,))
KEPT = _case("cache not donated", _updates, ())
LOOPED = _case("loop", _looped)
SLEEPS = _case("sleeps", _sleeps)
EXITS = _case("exits", _exits)
RAISES = _case("raises", _raises)
