"""Where block-wise float8 is multiplied in float8, and that its self-check sees what is wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdq
from fdq import ops
from fdq.ops import self_check
from fdq.ops.activation import activation_values, quantize_activation
from fdq.ops.matmul import float8_blocks
from fdq.ops.matmul.product import Product, parse_activation
from fdq.ops.prepared_weight import kernel_weight
from fdq.schemes.scheme import ActivationSpec
from pallas_kernels.aot.ahead_of_time import unavailable
from pallas_kernels.matmul import float8_blocks as kernels
from pallas_kernels.weights.word_format import turned_bytes
from tests.closeness import error
from tests.compiling_program import printed
from tests.covering import longest


def weight(rng, scheme="block_wise_fp8", k=256, n=128):
    values = jnp.asarray(rng.standard_normal((k, n)) * 0.05, jnp.float32)
    return ops.prepare(fdq.quantize(values, scheme), "gpu")


ROWS = ActivationSpec(format="float8_e4m3", granularity="token_group", group_size=128)


def product(q, rows=65, activation="fp8-x128", dtype=jnp.bfloat16):
    x = jnp.ones((rows, q.shape[0]), dtype)
    return Product(x, q, parse_activation(activation))


def reason(a):
    return str(float8_blocks.unsupported(a, kernel_weight(a.w)))


def test_when_it_is_chosen(rng, monkeypatch):
    monkeypatch.setattr(self_check, "is_real", lambda device: False)
    q = weight(rng)
    assert reason(product(q)) == "None"
    assert "64 rows are few" in reason(product(q, rows=64))
    for activation in (None, "fp8", "fp8-x64", "int8"):
        assert "rows are not float8 with scales" in reason(product(q, activation=activation))
    assert "keep float32 sums" in reason(product(q, dtype=jnp.float32))
    assert "in blocks of 128 x 128" in reason(product(weight(rng, "Wfp8A16")))
    monkeypatch.setattr(float8_blocks, "slower", lambda *found: f"a table: {found}")
    assert reason(product(q)) == "a table: ('float8_blocks', 'float8_e4m3', 65, 32768)"


def stand_in(change=lambda x, scale, w: (x, scale, w)):
    """The kernel's reference in its place, of arguments that are `change`d."""

    def run(x, scale, w, dtype):
        return kernels.float8_blocks_reference(*change(x, scale, w)).astype(dtype)

    return run


@pytest.mark.parametrize("run", [False, longest(True)])
def test_the_product_of_many_rows_takes_it(run, rng, monkeypatch):
    """Of a kernel that is its reference; the real one is in tests of `pallas_kernels`."""
    monkeypatch.setattr(self_check, "is_real", lambda device: False)
    taken, real = [], stand_in()

    def spy(x, scale, w, dtype):
        taken.append((x.dtype, x.shape, scale.shape, jnp.dtype(dtype)))
        return real(x, scale, w, dtype)

    monkeypatch.setattr(kernels, "float8_blocks", spy)
    q = weight(rng)
    x = jnp.asarray(rng.standard_normal((2, 40, 256)), jnp.bfloat16)
    multiply = functools.partial(fdq.matmul, activation="fp8-x128", implementation="decoded")
    y = multiply(x, q) if run else jax.eval_shape(multiply, x, q)
    assert (y.shape, y.dtype) == ((2, 40, 128), jnp.bfloat16)
    shapes = (80, 256), (80, 2)
    assert taken == [(jnp.dtype(jnp.float8_e4m3fn), *shapes, jnp.dtype(jnp.bfloat16))]
    if run:
        codes, scale = quantize_activation(x, ROWS)
        values = np.asarray(activation_values(codes, scale, 128, jnp.float32))
        assert error(y, values @ fdq.dequantize(q)) < 0.004


def of_words(w, words):
    return kernels.KernelWeight(**{**vars(w), "words": words})


def of_scale(w, scale):
    return kernels.KernelWeight(**{**vars(w), "scale": scale})


WRONG = {
    "no scales of x": lambda x, scale, w: (x, jnp.ones_like(scale), w),
    "scales of the row before": lambda x, scale, w: (x, jnp.roll(scale, 1, axis=0), w),
    "scales of the group before": lambda x, scale, w: (x, jnp.roll(scale, 1, axis=1), w),
    "scales of 64 rows before": lambda x, scale, w: (x, jnp.roll(scale, 64, axis=0), w),
    "blocks' scales of the group before": lambda x, scale, w: (
        x,
        scale,
        of_scale(w, jnp.roll(w.scale, 1, axis=0)),
    ),
    "blocks' scales of other columns": lambda x, scale, w: (
        x,
        scale,
        of_scale(w, jnp.roll(w.scale, 128, axis=1)),
    ),
    "one group left out": lambda x, scale, w: (x, scale.at[:, 4].set(0), w),
    "a slot read twice": lambda x, scale, w: (x.at[:, 512:640].set(x[:, :128]), scale, w),
    "words of other columns": lambda x, scale, w: (
        x,
        scale,
        of_words(w, jnp.roll(w.words, 8, axis=1)),
    ),
    "words of other rows": lambda x, scale, w: (
        x,
        scale,
        of_words(w, jnp.roll(w.words, 1, axis=0)),
    ),
}


@pytest.fixture(scope="module")
def checked():
    """What the self-check multiplies, and its reference."""
    arguments: list = []
    real = stand_in()

    def run(x, scale, w, dtype):
        arguments.append((x, scale, w))
        return real(x, scale, w, dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "float8_blocks", run)
        results, wanted, arguments = jax.jit(lambda: (*float8_blocks.case(), arguments))()
    assert [error(*pair) < 0.003 for pair in zip(results, wanted, strict=True)] == [True, True]
    return arguments[0], wanted[0]


@pytest.mark.parametrize("name", WRONG)
def test_the_self_check_sees_what_is_wrong(name, checked):
    arguments, wanted = checked
    found = kernels.float8_blocks_reference(*WRONG[name](*arguments))
    assert error(found, wanted) > 4 * float8_blocks._TOLERANCE


def test_the_self_check_allows_for_the_sums_of_hopper(checked):
    """14 bits after every 32 products, as far as is known."""
    (x, scale, w), wanted = checked
    codes = np.asarray(turned_bytes(w.words, x.dtype), np.float64)
    x, scale, of_blocks = (np.asarray(a, np.float64) for a in (x, scale, w.scale))
    total = np.zeros(wanted.shape)
    for group in range(scale.shape[1]):
        sums = np.zeros_like(total)
        for first in range(group * 128, group * 128 + 128, 32):
            sums += x[:, first : first + 32] @ codes[:, first : first + 32].T
            step = np.exp2(np.floor(np.log2(np.maximum(np.abs(sums), 1e-30))) - 13)
            sums = np.trunc(sums / step) * step
        total += sums * scale[:, group, None] * of_blocks[group]
    bfloat16 = 2**-8  # half a step, of the largest
    assert 1e-5 < error(total, wanted) < float8_blocks._TOLERANCE - bfloat16 / 2


@pytest.mark.slow
@pytest.mark.longest
def test_the_self_check_passes_in_the_interpreter():
    assert float8_blocks.check().run(jax.devices("cpu")[0]) is None


@pytest.mark.slow
@pytest.mark.longest
def test_a_wrong_kernel_is_switched_off(rng, monkeypatch, caplog):
    monkeypatch.setattr(self_check, "is_real", lambda device: True)
    monkeypatch.setattr(self_check, "_RESULTS", {})
    case = float8_blocks.case
    monkeypatch.setattr(float8_blocks, "case", lambda: case())  # traced here and now
    monkeypatch.setattr(kernels, "float8_blocks", stand_in(WRONG["one group left out"]))
    assert "it differs from its reference" in reason(product(weight(rng)))
    assert "float8_blocks[float8_e4m3, blocks of 128 x 128] is switched off" in caplog.text


@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
@pytest.mark.parametrize(
    ("gpu", "scheme", "activation", "called"),
    [
        longest("h100", "Wfp8A16", "fp8", ["__cublas$lt$matmul$f8"]),
        longest("l4", "Wfp8A16", "fp8", ["__cublas$lt$matmul$f8"]),
        longest("h100", "block_wise_fp8", "fp8-x128", ["mosaic_gpu_v2"]),
        # Decoded, and multiplied in bfloat16.
        longest("l4", "block_wise_fp8", "fp8-x128", ["mosaic_gpu_v2", "__cublas$lt$matmul"]),
    ],
)
def test_what_multiplies_rows_of_float8(gpu, scheme, activation, called):
    assert printed("float8_program.py", gpu, scheme, activation).split() == called
