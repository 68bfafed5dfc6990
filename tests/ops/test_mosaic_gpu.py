"""The seam to the kernels: layout, choice, self-check. Kernels run in Mosaic's interpreter."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fdq
from fdq import ops
from fdq.cache import CacheTensor, parse_format, quantize_cache
from fdq.ops import implementation, self_check
from fdq.ops.attention.mosaic_gpu import self_check_of as attention_check
from fdq.ops.grouped_matmul import mosaic_mma as grouped_mma
from fdq.ops.kernels import MOSAIC_GPU
from fdq.ops.matmul import check_cases, decoded
from fdq.ops.matmul import mosaic_gpu as matmul
from fdq.ops.preparation import prepare_in_place
from fdq.ops.route import mosaic_gpu as route
from pallas_kernels.matmul.matrix_vector import choose_config
from pallas_kernels.tuning import choices
from tests.closeness import error
from tests.covering import longest, slow

TOLERANCE = 5e-6


def weight(scheme, k=256, n=200, seed=0):
    values = np.random.default_rng(seed).standard_normal((k, n)) * 0.05
    return fdq.quantize(jnp.asarray(values, jnp.float32), scheme)


@pytest.fixture
def kernels(monkeypatch):
    """Ops run as kernels where they can."""
    monkeypatch.setenv("FDQ_IMPLEMENTATION", "mosaic_gpu")


@pytest.mark.parametrize("scheme", ["W4A16", *map(slow, ("W8A16", "W4A16-g64", "W2A16"))])
def test_prepared_weights_give_the_same_products(scheme, rng, kernels):
    q = weight(scheme)
    prepared = ops.prepare(q)
    assert prepared.layout == MOSAIC_GPU
    assert prepared.shape == q.shape and prepared.nbytes >= q.nbytes
    x = jnp.asarray(rng.standard_normal((3, 256)), jnp.float32)
    expected = np.asarray(x, np.float64) @ np.asarray(fdq.dequantize(q), np.float64)
    assert error(fdq.matmul(x, prepared), expected) < TOLERANCE
    assert error(fdq.matmul(x, prepared, implementation="xla"), expected) < TOLERANCE
    back = ops.unprepare(prepared)
    assert back.layout == "canonical" and back.padding == q.padding
    for name, array in q.arrays().items():
        np.testing.assert_array_equal(getattr(back, name), array)


@pytest.mark.parametrize(
    ("scheme", "activation"),
    [
        ("W8A16", "int8"),
        ("W4A16", "fp8"),
        ("W4A16", "fp8-x128"),
        slow("W4A16", "int8"),
        slow("W8A16", "fp8"),
        slow("W8A16", "fp8-x128"),
    ],
)
def test_quantized_activations(scheme, activation, rng, kernels):
    q = ops.prepare(weight(scheme))
    x = jnp.asarray(rng.standard_normal((2, 256)), jnp.float32)
    y = fdq.matmul(x, q, activation=activation)
    wanted = fdq.matmul(x, q, activation=activation, implementation="xla")
    assert error(y, wanted) < TOLERANCE


@pytest.mark.parametrize(("m", "activation"), [slow(9, None), longest(17, "int8")])
def test_more_rows_are_the_tensor_cores(m, activation, rng, kernels):
    q = ops.prepare(weight("W4A16", k=128, n=128))
    x = jnp.asarray(rng.standard_normal((m, 128)), jnp.bfloat16)
    y = fdq.matmul(x, q, activation=activation, out_dtype=jnp.float32)
    if activation is None:
        wanted = np.asarray(x, np.float64) @ np.asarray(fdq.dequantize(q), np.float64)
    else:
        wanted = fdq.matmul(
            x, q, activation=activation, out_dtype=jnp.float32, implementation="xla"
        )
    assert error(y, wanted) < TOLERANCE
    with pytest.raises(NotImplementedError, match="bfloat16 or float16, or int8, found float32"):
        fdq.matmul(x.astype(jnp.float32), q, implementation="mosaic_gpu")


@pytest.mark.parametrize("activation", [slow(None), slow("int8"), longest("fp8")])
def test_experts_of_more_tokens_are_the_tensor_cores(activation, rng, kernels):
    values = jnp.asarray(rng.standard_normal((3, 128, 128)) * 0.05, jnp.float32)
    stack = ops.prepare(fdq.quantize(values, "W4A16"))
    x = jnp.asarray(rng.standard_normal((9, 128)), jnp.bfloat16)
    index = jnp.asarray(rng.integers(0, 3, (9, 2)), jnp.int32)
    run = functools.partial(fdq.grouped_matmul, activation=activation, out_dtype=jnp.float32)
    y = run(x, stack, index, implementation="mosaic_gpu")
    rows = np.asarray(x, np.float64)
    if activation is not None:
        codes, scale = ops.quantize_activation(x, ops.parse_activation(activation))
        rows = np.asarray(codes, np.float64) * np.asarray(scale, np.float64)
    decoded = np.asarray(fdq.dequantize(stack), np.float64)[np.asarray(index)]
    assert error(y, np.einsum("tk,tpkn->tpn", rows, decoded)) < TOLERANCE
    assert (run(x, stack, index) == y).all()  # what is chosen


def test_gradient_and_vmap(rng, kernels):
    q = ops.prepare(weight("W4A16"))
    x = jnp.asarray(rng.standard_normal((4, 2, 256)), jnp.float32)
    decoded = np.asarray(fdq.dequantize(q), np.float64)
    gradient = jax.grad(lambda x: fdq.matmul(x, q).sum())(x[0])
    assert error(gradient, np.broadcast_to(decoded.sum(1), (2, 256))) < TOLERANCE
    y = jax.jit(jax.vmap(lambda x: fdq.matmul(x, q)))(x)
    assert error(y, np.asarray(x, np.float64) @ decoded) < TOLERANCE


def test_modules_and_abstract_weights_are_prepared(kernels):
    class Layer(nnx.Module):
        def __init__(self):
            q = weight("W4A16")
            boxed = {n: nnx.Variable(a) for n, a in q.arrays().items()}
            self.kernel = nnx.data(type(q)(**boxed, spec=q.spec))

    prepared = ops.prepare(Layer())
    assert prepared.kernel.layout == MOSAIC_GPU and prepared.kernel.shape == (256, 200)
    assert isinstance(prepared.kernel.data, nnx.Variable)
    back = ops.unprepare(prepared)
    np.testing.assert_array_equal(back.kernel.codes[...], weight("W4A16").codes)
    abstract = fdq.quantize(jax.ShapeDtypeStruct((256, 200), jnp.float32), "W4A16")
    for one, other in zip(
        jax.tree.leaves(ops.prepare(abstract)),
        jax.tree.leaves(ops.prepare(weight("W4A16"))),
        strict=True,
    ):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


def test_stacked_weights_keep_their_axes(kernels):
    stacked = fdq.quantize(jnp.ones((3, 256, 128)), "W4A16")
    prepared = ops.prepare(stacked)
    assert prepared.shape == (3, 256, 128)
    one = jax.vmap(lambda q: jnp.zeros(q.shape))(prepared)
    assert one.shape == (3, 256, 128)


def test_attention_of_one_query_runs_as_a_kernel(rng):
    spec = parse_format("C8")
    values = jnp.asarray(rng.standard_normal((2, 2, 40, 64)), jnp.float32)
    k = quantize_cache(values, spec)
    q = jnp.asarray(rng.standard_normal((2, 1, 6, 64)), jnp.float32)
    settings = {"lengths": jnp.asarray([40, 13], jnp.int32)}
    y = fdq.attention(q, k, k, implementation="mosaic_gpu", **settings)
    wanted = fdq.attention(q, k, k, implementation="xla", **settings)
    assert error(y, wanted) < TOLERANCE
    two = jnp.concatenate([q, q], axis=1)
    with pytest.raises(NotImplementedError, match=r"attention\[mosaic_gpu\]: .*one query"):
        fdq.attention(two, k, k, implementation="mosaic_gpu", **settings)


def test_a_cpu_takes_xla_unless_it_is_told(rng, caplog):
    implementation._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="fdq"):
        fdq.matmul(jnp.ones((1, 256)), weight("W4A16"))
    assert "matmul runs as 'xla': the device is not a GPU" in caplog.text


class FakeGpu:
    device_kind = "NVIDIA Test"
    platform = "gpu"


def test_a_kernel_that_disagrees_is_switched_off_once(monkeypatch, caplog):
    monkeypatch.setattr(self_check, "is_real", lambda device: True)
    monkeypatch.setattr(jax, "default_device", lambda device: jax.ensure_compile_time_eval())
    calls = []

    def wrong():
        calls.append(1)
        return jnp.ones(3), jnp.full(3, 2.0)

    with caplog.at_level(logging.WARNING, logger="fdq"):
        first = self_check.failure("test_wrong", "int4", FakeGpu(), wrong)
        again = self_check.failure("test_wrong", "int4", FakeGpu(), wrong)
    assert first == again and "differs from its reference by 1" in str(first)
    assert calls == [1]
    assert caplog.text.count("switched off on NVIDIA Test") == 1

    def broken():
        raise RuntimeError("ptxas: no such instruction\nand much more")

    reason = self_check.failure("test_broken", "int4", FakeGpu(), broken)
    assert reason == "RuntimeError: ptxas: no such instruction"
    right = self_check.failure("test_right", "int4", FakeGpu(), lambda: (jnp.ones(3),) * 2)
    assert right is None
    nothing = self_check.failure("test_zero", "int4", FakeGpu(), lambda: (jnp.zeros(3),) * 2)
    assert nothing is not None  # zeros prove nothing


@pytest.mark.parametrize("activation", [slow(None), "int8", longest("fp8"), slow("fp8-x128")])
def test_experts_in_the_kernels_layout(activation, rng, kernels):
    """Up to 8 rows are gathered by the kernel; XLA takes one expert at a time out of the layout."""
    stack = fdq.quantize(jnp.asarray(rng.standard_normal((4, 256, 128)), jnp.float32), "W4A16")
    prepared = ops.prepare(stack)
    decoded = np.asarray(fdq.dequantize(stack), np.float64)
    for rows in (3, 12):
        x = jnp.asarray(rng.standard_normal((rows, 256)), jnp.float32)
        index = jnp.asarray(rng.integers(0, 4, rows), jnp.int32)
        y = fdq.grouped_matmul(x, prepared, index, activation=activation)
        wanted = np.einsum("tk,tkn->tn", np.asarray(x, np.float64), decoded[index])
        assert error(y, wanted) < (0.05 if activation else TOLERANCE)
        xla = fdq.grouped_matmul(x, stack, index, activation=activation, implementation="xla")
        assert error(y, np.asarray(xla, np.float64)) < TOLERANCE
    run = functools.partial(fdq.grouped_matmul, implementation="xla")
    program = jax.jit(run).lower(x, prepared, index).as_text()
    # The words of one expert are read as they are: no canonical codes, no decoded stack.
    assert "tensor<1x32x128xi32>" in program and "xui8>" not in program
    assert "tensor<4x256x128xf32>" not in program


def test_what_no_kernel_does_is_refused_where_it_is_asked_for(rng):
    x = jnp.ones((2, 256))
    index = jnp.zeros((2,), jnp.int32)
    stack = ops.prepare(fdq.quantize(jnp.ones((3, 256, 128)), "W4A16"), "gpu")
    with pytest.raises(NotImplementedError, match=r"matmul\[mosaic_gpu\]: the weight is an array"):
        fdq.matmul(x, jnp.ones((256, 128)), implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="activations have one scale for all experts"):
        fdq.grouped_matmul(
            x, stack, index, activation="int8-static", activation_scale=jnp.ones(3),
            implementation="mosaic_gpu",
        )  # fmt: skip
    with pytest.raises(NotImplementedError, match="the kernels take 1 to 64 rows of x, found 65"):
        fdq.grouped_matmul(
            jnp.ones((65, 256)), stack, jnp.zeros((65,), jnp.int32), implementation="mosaic_gpu"
        )


def test_prepared_weights_describe_themselves(kernels):
    prepared = ops.prepare(weight("W4A16"))
    assert prepared.code_dtype == weight("W4A16").code_dtype == jnp.uint8
    abstract = jax.eval_shape(lambda: prepared)
    assert abstract.is_abstract and not prepared.is_abstract
    assert fdq.dequantize(abstract).shape == (256, 200)
    with pytest.raises(ValueError, match="This is quantized already: mlp.kernel"):
        fdq.quantize({"mlp": {"kernel": prepared}}, "W4A16")


def test_a_loaded_model_is_prepared_a_weight_at_a_time(kernels):
    class Layer(nnx.Module):
        def __init__(self, q):
            self.kernel = nnx.data(q)

    class Model(nnx.Module):
        def __init__(self):
            q = weight("W4A16")
            boxed = type(q)(**{n: nnx.Variable(a) for n, a in q.arrays().items()}, spec=q.spec)
            self.layers = nnx.List([Layer(boxed), Layer(boxed)])

    model = Model()
    expected = ops.prepare(model)
    prepare_in_place(model)
    first, second = (layer.kernel for layer in model.layers)
    assert first.layout == MOSAIC_GPU and first.data is second.data
    words = expected.layers[0].kernel.data.get_value().words
    np.testing.assert_array_equal(first.data.get_value().words, words)


CHECKS = {
    "integer": lambda: matmul.self_check_of("integer_matrix_vector", weight("W8A16").spec),
    "matrix-vector": lambda: matmul.self_check_of("matrix_vector", weight("W4A16").spec),
    "experts": lambda: matmul.self_check_of("gathered_matrix_vector", weight("W4A16-g32").spec),
    "tensor cores": lambda: matmul.self_check_of("mma_matmul", weight("W4A16").spec),
    "experts on tensor cores": lambda: grouped_mma.self_check_of(
        "gathered_mma", weight("W4A16").spec
    ),
    "integers on tensor cores": lambda: matmul.self_check_of("integer_mma", weight("W4A16").spec),
    "experts' integers on tensor cores": lambda: grouped_mma.self_check_of(
        "gathered_integer_mma", weight("W4A16").spec
    ),
    "decoding": lambda: decoded.self_check_of(weight("W4A16").spec),
    "attention": lambda: attention_check(cache("C8"), 4, jnp.dtype("bfloat16"), {}),
    "router": lambda: route.self_check_of(64, 6),
}


def cache(name):
    return CacheTensor.empty((1, 2, 32, 64), parse_format(name))


@pytest.mark.parametrize("check", [slow("integer"), *map(longest, list(CHECKS)[1:])])
def test_a_self_check_passes_in_the_interpreter_as_one_program(check):
    check, compiled = CHECKS[check](), []

    def listen(event, duration, **_):
        compiled.extend([event] * event.endswith("backend_compile_duration"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        assert check.run(jax.devices("cpu")[0]) is None
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(compiled) == 1


def test_a_self_check_sees_what_programs_of_published_models_are(rng):
    """Both widths, four segments of a program of all of K, steps as the device chooses them."""
    layout = matmul.kernel_weight(ops.prepare(weight("W4A16", k=512, n=512), "gpu")).layout
    assert layout.segments == 4
    for rows, columns in ((1, 256), (8, 512)):
        wide, narrow = check_cases.configs("matrix_vector", layout, rows)
        assert (wide.block_columns, wide.split) == (columns, 1)
        assert (narrow.block_columns, narrow.split) == (columns // 2, 2)
        published = dataclasses.replace(layout, k=4096, n=28672)
        assert wide.step_rows == choose_config(published, rows, 4).step_rows


def test_every_way_of_the_tuning_table_is_checked(monkeypatch):
    rows = [
        {"kernel": "matrix_vector", "formats": ["int4"], "max_weights": 9, "config": {"split": 4}},
        {"kernel": "matrix_vector", "formats": ["int8"], "config": {"split": 8}},
        {"kernel": "*", "formats": ["*"]},
        {"kernel": "*", "formats": ["*"], "config": {"split": 2}},  # never reached
    ]
    table = [{"use": "mosaic_gpu", **row} for row in rows]
    monkeypatch.setattr(choices, "_rows", lambda file: table if file == "test.json" else [])
    assert choices.settings("test", "matrix_vector", "int4", rows=1) == [{"split": 4}, {}]


def test_a_second_weight_of_a_format_runs_no_check(monkeypatch):
    ran = []
    monkeypatch.setattr(self_check, "_RESULTS", {})
    monkeypatch.setattr(self_check, "_compare", lambda device, case, tolerance: ran.append(case))
    for scheme, k, n in (("W4A16", 256, 200), ("W4A16", 512, 128), ("W8A16", 256, 128)):
        w = ops.prepare(weight(scheme, k, n), "gpu")
        for rows in (1, 3):
            assert matmul.preferred("matrix_vector", w, rows) is None
    assert len(ran) == 2
