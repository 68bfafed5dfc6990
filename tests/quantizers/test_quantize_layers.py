"""Layers of every kind in Flax modules: equations, axes, dtypes, and those that fdq leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fdq import nn
from fdq.formats.qtensor import QTensor, dequantize, materialize
from fdq.nn.general import Equation
from fdq.quantizers.quantization import match_table, quantize
from tests.closeness import relative_error
from tests.covering import slow_but


def test_fdq_layers_hold_their_qtensor_in_place():
    class Both(nnx.Module):
        def __init__(self, rngs):
            self.linear = nn.Linear(64, 32, use_bias=True, rngs=rngs)
            self.experts = nn.Experts(2, 64, 32, rngs=rngs)
            self.embed = nn.Embedding(64, 16, rngs=rngs)
            self.router = nn.Router(64, 2, top_k=1, rngs=rngs)

    source = Both(nnx.Rngs(0))
    q = quantize(source, "Wfp8Afp8")
    assert type(q.linear) is nn.Linear and q.linear.kernel.shape == (64, 32)
    assert type(q.linear.kernel.codes) is nn.QCodes and type(q.linear.kernel.scale) is nn.QScale
    assert q.linear.activation.format == "float8_e4m3"
    assert q.experts.gate_up_proj.kernel.shape == (2, 64, 64)
    assert isinstance(q.embed.embedding, nnx.Param)
    assert isinstance(source.linear.kernel, nnx.Param) and source.linear.activation is None
    reasons = {row.path: row.reason for row in match_table(source, "W8").left}
    assert "'embed'" in reasons["embed.embedding"]
    assert reasons["router.kernel"] == "fdq.nn.Router: not quantized"
    q = quantize(source, {"embed.embedding": "W8A16"})
    assert isinstance(q.embed.embedding, QTensor)
    static = {"linear": 1.0, "experts.gate_up_proj": 2.0, "experts.down_proj": 3.0}
    q = quantize(source, "W8A8-static", calibration=static)
    assert q.experts.down_proj.activation_scale.shape == ()
    again = quantize(q, {"*.embedding": "W8A16"})
    assert again.linear.kernel.codes.get_value() is q.linear.kernel.codes.get_value()


def test_layers_that_only_look_like_linear_are_left():
    class Special(nnx.Linear):
        pass

    class Owner(nnx.Module):
        def __init__(self, rngs):
            self.plain = nnx.Linear(8, 8, rngs=rngs)
            self.special = Special(8, 8, rngs=rngs)
            self.dot = nnx.Linear(
                8, 8, dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k), rngs=rngs
            )
            self.batched = nnx.LinearGeneral(8, 8, batch_axis={0: 2}, rngs=rngs)
            self.experts = nnx.Einsum("etk,ekn->etn", (2, 8, 8), rngs=rngs)
            self.late = nnx.Einsum("ab,bc->ac", (8, 8), rngs=rngs)
            self.late.einsum_str = None
            self.tied = nnx.Embed(8, 8, rngs=rngs)
            self.head = nnx.Linear(8, 8, use_bias=False, rngs=rngs)
            self.head.kernel = self.tied.embedding
            self.table = nnx.Param(jnp.ones((8, 8)))
            self.constant = nnx.data(jnp.ones((8, 8)))

    owner = Owner(nnx.Rngs(0))
    table = match_table(owner, "W8")
    assert [row.path for row in table.quantized] == ["plain.kernel"]
    reasons = {row.path: row.reason for row in table.left}
    assert reasons["special.kernel"] == "Special: needs a rule that names it"
    assert "dot_general of its own" in reasons["dot.kernel"]
    assert "batch axes" in reasons["batched.kernel"]
    assert "(a batch)" in reasons["experts.kernel"]
    assert "only known when it is called" in reasons["late.kernel"]
    assert reasons["head.kernel"].startswith("embed: left unless a rule")
    assert reasons["table"] == "Owner: needs a rule that names it, used as x @ table"
    assert "constant" in reasons
    q = quantize(owner, "W8")
    assert q.head.kernel is q.tied.embedding


@pytest.mark.parametrize(
    ("equation", "inputs", "kernel", "bias"),
    [
        ("ab,bc->ac", (3, 8), (8, 5), (5,)),
        ("...b,cb->...c", (2, 3, 8), (5, 8), (5,)),
        ("nta,hab->nthb", (2, 3, 8), (4, 8, 5), (4, 5)),
        ("thb,hba->at", (3, 2, 4), (2, 4, 5), None),
        ("b...,bc->...c", (8, 2, 3), (8, 5), None),
    ],
)
def test_einsum_equations(equation, inputs, kernel, bias, rng):
    layer = nnx.Einsum(equation, kernel, bias, rngs=nnx.Rngs(0))
    if bias:
        layer.bias.set_value(jnp.asarray(rng.standard_normal(bias), jnp.float32))
    q = quantize(layer, "W8A16")
    x = rng.standard_normal(inputs).astype(np.float32)
    y, reference = np.asarray(q(x)), np.asarray(layer(x))
    assert y.shape == reference.shape
    assert relative_error(y, reference) < 0.02
    np.testing.assert_array_equal(np.asarray(q(x, equation)), y)
    with pytest.raises(ValueError, match="cannot be called with"):
        q(x, "ab,bd->ad")


@pytest.mark.parametrize("equation", ["ab,bc", "aab,bc->ac", "ab,b...->a", "ab,bc->a", "a,b->ab"])
def test_equations_that_are_no_matrix_product(equation):
    assert isinstance(Equation.parse(equation), str)


@pytest.mark.parametrize("axis", [(-1,), (-2, -1), (1, 0), (0,)])
def test_linear_general_axes(axis, rng):
    x = rng.standard_normal((4, 8, 6)).astype(np.float32)
    features = tuple(x.shape[a] for a in sorted(axis))
    layer = nnx.LinearGeneral(features, (3, 5), axis=axis, rngs=nnx.Rngs(0))
    layer.bias.set_value(jnp.asarray(rng.standard_normal((3, 5)), jnp.float32))
    y = np.asarray(quantize(layer, "W8A16")(x))
    assert relative_error(y, np.asarray(layer(x))) < 0.02


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": jnp.bfloat16},
        {"param_dtype": jnp.bfloat16, "dtype": jnp.float32},
        {"dtype": jnp.bfloat16, "preferred_element_type": jnp.bfloat16},
        {"dtype": jnp.float16, "use_bias": False},
    ],
)
def test_dtypes_are_promoted_as_by_the_source(options):
    layer = nnx.Linear(16, 8, rngs=nnx.Rngs(0), **options)
    q = quantize(layer, "W8A16")
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jnp.ones((2, 16), dtype)
        assert q(x).dtype == layer(x).dtype


def test_sharding_names_follow_the_axes():
    mesh = jax.make_mesh((4,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
    metadata = {"out_sharding": ("tp", None), "mesh": mesh}
    layer = nnx.Linear(64, 8, kernel_metadata=metadata, use_bias=False, rngs=nnx.Rngs(0))
    q = quantize(layer, "W4A16-g32")  # 32 bytes of codes and 2 groups along K
    assert q.kernel.codes.out_sharding == ("tp", None)
    assert q.kernel.scale.out_sharding == (None, None)  # 2 groups on 4 devices
    assert q.kernel.codes.get_value().sharding.spec == jax.sharding.PartitionSpec("tp", None)
    x = np.ones((3, 64), np.float32)
    np.testing.assert_allclose(q(x), x @ dequantize(materialize(q.kernel)), rtol=1e-5)


MISSION = "W8A8C8 W8A8C16 W4A16C16 WNF4A8C8 Wfp8Afp8 W4Afp8 W4A8C8 W4A16C8 W2A16 wint8 wint4 wint2"
FASTDEPLOY = (
    "block_wise_fp8 tensor_wise_fp8 mix_quant mxfp4 mxfp8 nvfp4 W3A16 W4A16-asym-g32 WNF4-dq"
)


@pytest.mark.parametrize(
    "name",
    slow_but(
        ("W8A8C8", "W4A16C16", "WNF4A8C8", "Wfp8Afp8", "wint2"),
        (*MISSION.split(), *FASTDEPLOY.split()),
    ),
)
def test_every_scheme_works_in_a_users_layer(name, rng):
    layer = nnx.Linear(128, 16, rngs=nnx.Rngs(0))
    x = rng.standard_normal((4, 128)).astype(np.float32)
    holder = nnx.Sequential(layer)
    calibration = {"layers.0": np.abs(x).max()}
    q = quantize(holder, name, calibration=calibration).layers[0]
    y, reference = np.asarray(jax.jit(lambda x: q(x))(x)), np.asarray(layer(x))
    limit = {"int2": 0.5, "cc2": 0.5, "int3": 0.25}.get(q.kernel.spec.format, 0.15)
    assert 0 < relative_error(y, reference) < limit
    if q.activation is None:
        w = np.asarray(dequantize(q.kernel))
        assert relative_error(y, x @ w + np.asarray(layer.bias.get_value())) < 2e-6
