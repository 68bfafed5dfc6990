"""Products of many rows: a decoded weight, and a library's dot. Kernels run in the interpreter."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdq
from fdq import ops
from fdq.decoding import chunks
from fdq.models import CONFIGS
from fdq.ops import self_check
from fdq.ops.matmul import decoded
from fdq.ops.matmul.product import Product
from tests.closeness import error
from tests.covering import longest, slow

ROWS = (2, 35)


def weight(rng, scheme, k=128, n=72):
    values = jnp.asarray(rng.standard_normal((k, n)) * 0.05, jnp.float32)
    return ops.prepare(fdq.quantize(values, scheme), "gpu")


# Rounded twice, the weight and the result.
@pytest.mark.parametrize(
    ("scheme", "activation", "dtype", "bound"),
    [
        ("W8A16", "int8", "float32", 1e-6),  # codes by codes
        slow("W4A16", None, "bfloat16", 0.008),
        slow("W4A16", None, "float16", 0.001),
        longest("W4A16", "int8", "float32", 1e-6),
        longest("Wfp8A16", "fp8", "float32", 1e-6),
        longest("WNVFP4A16", "fp8-x128", "bfloat16", 0.008),
    ],
)
def test_it_is_the_product(scheme, activation, dtype, bound, rng):
    q = weight(rng, scheme)
    x = jnp.asarray(rng.standard_normal((*ROWS, 128)), dtype)
    y = fdq.matmul(x, q, activation=activation, implementation="decoded")
    assert (y.shape, y.dtype) == ((*ROWS, 72), x.dtype)
    if activation is None:
        wanted = np.asarray(x, np.float64) @ np.asarray(fdq.dequantize(q), np.float64)
    else:
        wanted = fdq.matmul(x, q, activation=activation, implementation="xla")
    assert error(y, wanted) < bound


def test_codes_of_float8_are_multiplied_as_they_are(rng):
    q = weight(rng, "Wfp8A16", k=200)
    rows = jnp.asarray(rng.standard_normal((16, 200)) * 3, jnp.float8_e4m3fn)
    y = decoded._codes_product(rows, decoded.kernel_weight(q))
    wanted = np.asarray(rows, np.float64) @ np.asarray(fdq.dequantize(q), np.float64)
    assert error(y, wanted) < 1e-6


def test_the_wanted_dtype_is_the_results(rng):
    """Rows of 16 bits, and logits of 32: no sum is rounded to 16 bits on the way."""
    q = weight(rng, "W8A16")
    x = jnp.asarray(rng.standard_normal((20, 128)), jnp.bfloat16)
    y = fdq.matmul(x, q, out_dtype=jnp.float32, implementation="decoded")
    wanted = np.asarray(x, np.float64) @ np.asarray(fdq.dequantize(q), np.float64)
    assert error(y, wanted) < 0.004  # of rounded weights
    assert (y != y.astype(jnp.bfloat16).astype(jnp.float32)).any()


@pytest.mark.parametrize("transform", [slow("grad"), longest("vmap")])
def test_transformations(transform, rng):
    q = weight(rng, "W4A16")
    x = jnp.asarray(rng.standard_normal((2, 20, 128)), jnp.float32)

    def found(implementation):
        def run(x):
            return fdq.matmul(x, q, implementation=implementation)

        if transform == "vmap":
            return jax.vmap(run)(x)
        return jax.grad(lambda x: (run(x) ** 2).sum())(x)

    assert error(found("decoded"), np.asarray(found("xla"), np.float64)) < 2e-6


def test_when_it_is_chosen(rng, monkeypatch):
    monkeypatch.setattr(self_check, "is_real", lambda device: False)
    one, q = decoded.Decoded(), weight(rng, "W4A16")
    many = jnp.ones((100, 128))
    assert one.skipped() == "the device is not a GPU"
    assert "array" in str(one.unsupported(Product(many, jnp.ones((128, 8)))))
    assert "rows are few" in str(one.declined(Product(many[:3], q)))
    assert "fdq.prepare" in str(one.declined(Product(many, ops.unprepare(q))))
    assert one.declined(Product(many, q)) is None
    # What the environment asks for is for the whole program: what it cannot do, the device's does.
    monkeypatch.setenv("FDQ_IMPLEMENTATION", "mosaic_gpu")
    matmul = fdq.ops.matmul.api.MATMUL
    assert matmul.choose(Product(many, q)).name == "xla"
    # Of two that can, one that fails its self-check is passed over there too.
    monkeypatch.setattr(decoded.Decoded, "skipped", lambda self: None)
    assert matmul.choose(Product(many, q)).name == "decoded"
    monkeypatch.setattr(decoded.Decoded, "declined", lambda self, arguments: "it is wrong here")
    assert matmul.choose(Product(many, q)).name == "xla"
    # Only attention knows cuDNN.
    monkeypatch.setenv("FDQ_IMPLEMENTATION", "cudnn")
    assert matmul.choose(Product(many, q)).name == "xla"
    with pytest.raises(ValueError, match="unknown implementation 'cudnn'"):
        matmul.choose(Product(many, q), "cudnn")


@pytest.mark.slow
@pytest.mark.longest
def test_the_self_checks_cases_pass_in_the_interpreter(monkeypatch, rng):
    monkeypatch.setattr(self_check, "is_real", lambda device: True)
    monkeypatch.setattr(self_check, "_RESULTS", {})
    q = weight(rng, "Wfp8A16")
    assert decoded.Decoded().declined(Product(jnp.ones((100, 128)), q)) is None
    result, wanted = decoded._float8_case("float8_e4m3")
    assert error(result, np.asarray(wanted, np.float64)) < 1e-6
    assert len(self_check._RESULTS) == 1


class Gpu:
    platform = "gpu"

    def __init__(self, **stats):
        self.memory_stats = lambda: stats


def test_the_chunk_of_prompts_is_chosen_from_memory(monkeypatch):
    config = CONFIGS["llama-3-8b"]
    assert chunks.default_chunk(config, 1, 4096) == 512  # of a CPU

    def chosen(batch, slots=1024, config=config, **stats):
        monkeypatch.setattr(chunks, "default_device", lambda: Gpu(**stats))
        return chunks.default_chunk(config, batch, slots)

    assert chosen(1) == 2048
    assert chosen(1, bytes_limit=80 << 30, bytes_in_use=10 << 30) == 2048
    assert chosen(32, bytes_limit=80 << 30, bytes_in_use=10 << 30) == 1024
    assert chosen(64, bytes_limit=24 << 30, bytes_in_use=20 << 30) == 512
    assert chunks.token_bytes(CONFIGS["ernie-4.5-21b-a3b"]) > 14 * 6 * 1536
    # What cuDNN has a mask for; or not for 512 either.
    assert [chosen(8, slots) for slots in (1 << 14, 1 << 15, 1 << 16, 1 << 17)] == [
        2048,
        1024,
        512,
        2048,
    ]
    # A model of one's own; several processes, of which each knows its own memory.
    assert chosen(9, config=object(), bytes_limit=1) == 2048
    assert chosen(9, config=types.SimpleNamespace(hidden_size=64), bytes_limit=1) == 512
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert chosen(64, bytes_limit=24 << 30, bytes_in_use=20 << 30) == 2048
