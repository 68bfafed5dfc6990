"""Flax modules quantized whole: what became of each layer, and what comes out."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fdq import nn
from fdq.calibration.observation import calibrate
from fdq.formats.qtensor import QTensor, dequantize, materialize
from fdq.quantizers import quantize_array
from fdq.quantizers.modules import collect
from fdq.quantizers.quantization import match_table, quantize
from tests.closeness import relative_error
from tests.covering import slow

WIDTH, HEADS, LAYERS = 64, 4, 3


class Block(nnx.Module):
    """A residual MLP; three of them are stacked and scanned."""

    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jax.nn.gelu(self.up(x)))


class Model(nnx.Module):
    """What people build: attention, a convolution, shared layers, a tied kernel, a scan, lists."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(32, WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.conv = nnx.Conv(WIDTH, WIDTH, kernel_size=(3,), rngs=rngs)
        self.first = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.again = self.first
        self.tied = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.tied.kernel = self.first.kernel
        self.heads = nnx.Einsum("...ta,hab->...thb", (HEADS, WIDTH, 8), (HEADS, 8), rngs=rngs)
        self.list = nnx.List(
            [nnx.Linear(HEADS * 8, WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)]
        )
        keys = jax.random.split(rngs.params(), LAYERS)
        self.blocks = nnx.vmap(lambda key: Block(nnx.Rngs(key)))(keys)
        self.dropout = nnx.Dropout(0.1, deterministic=True, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(x)
        x = x + self.conv(x)
        x = self.tied(self.again(jax.nn.relu(self.first(x))))
        heads = self.heads(x)
        x = self.list[1](self.list[0](heads.reshape(*heads.shape[:-2], -1)))

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(block, x):
            return block(x)

        return self.dropout(forward(self.blocks, x))


TOKENS = np.arange(12).reshape(2, 6) % 32


@functools.cache
def model():
    return Model(nnx.Rngs(0))


@functools.cache
def quantized(scheme):
    return quantize(model(), scheme)


@functools.partial(jax.jit, static_argnums=0)
def run(graphdef, state, tokens):
    return nnx.merge(graphdef, state)(tokens)


def output(module):
    return np.asarray(run(*nnx.split(module), TOKENS))


def at(module, path):
    for name in path.split("."):
        module = module[int(name)] if name.isdigit() else getattr(module, name)
    return module


def decoded(module):
    """The float model with what its quantized twin stands for."""
    clone = nnx.clone(model())
    for tensor in collect(clone):
        path = tensor.uses[0].path
        q = at(module, path)
        if isinstance(q, QTensor):
            shape, w = tensor.content.shape, dequantize(q)
            if path == "heads.kernel":  # folded as [a, h, b]
                w = jnp.moveaxis(w.reshape(shape[1], shape[0], shape[2]), 0, 1)
            tensor.content.set_value(w.reshape(shape))
    return clone


@pytest.mark.parametrize(("scheme", "error"), [slow("W8A16", 0.02), slow("W4A16-g32", 0.25)])
def test_outputs_are_those_of_the_decoded_weights(scheme, error):
    y = output(quantized(scheme))
    assert relative_error(y, output(decoded(quantized(scheme)))) < 2e-6
    assert 1e-4 < relative_error(y, output(model())) < error


@pytest.mark.slow
def test_activations_are_quantized_too():
    q = quantize(model(), "W8A8")
    assert q.first.activation == q.attention.out.activation == q.blocks.up.activation
    assert 1e-4 < relative_error(output(q), output(model())) < 0.05


def test_what_became_of_each_layer():
    q = quantized("W4A16-g32")
    assert type(q.first) is nn.QuantizedLinear
    assert type(q.attention.query) is nn.QuantizedLinearGeneral
    assert type(q.attention.out) is nn.QuantizedLinearGeneral
    assert type(q.heads) is nn.QuantizedEinsum
    assert type(q.list[0]) is nn.QuantizedLinear
    assert type(q.conv) is nnx.Conv and type(q.embed) is nnx.Embed
    assert q.attention.query.kernel.shape == q.attention.out.kernel.shape == (WIDTH, WIDTH)
    assert q.heads.kernel.shape == (WIDTH, HEADS * 8)
    assert q.blocks.up.kernel.shape == (LAYERS, WIDTH, 2 * WIDTH)
    # Attributes that surrounding code may read are those of the source.
    assert q.first.in_features == WIDTH and q.first.use_bias
    # No parameter that an optimizer would touch.
    kinds = {type(v) for _, v in nnx.to_flat_state(nnx.state(q, nnx.Param))}
    assert kinds == {nnx.Param}
    assert not any("codes" in path for path, _ in nnx.to_flat_state(nnx.state(q, nnx.Param)))


def test_shared_stays_shared_and_the_original_is_untouched():
    q = quantized("W4A16-g32")
    assert q.again is q.first and q.tied is not q.first
    assert q.tied.kernel.codes is q.first.kernel.codes
    assert q.tied.bias is not q.first.bias
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(q)) if path[-1] == "codes"]
    assert len(paths) == len(set(paths)) == 9
    assert type(model().first) is nnx.Linear and type(model().first.kernel) is nnx.Param
    assert model().tied.kernel is model().first.kernel
    assert q.embed.embedding.get_value() is model().embed.embedding.get_value()


def test_says_what_was_left(capsys):
    quantize(model(), "W4A16-g32", verbose=True)
    printed = capsys.readouterr().out
    lines = {line.split()[0]: line for line in printed.splitlines()[1:]}
    assert printed.startswith("Quantized 9 of ")
    assert "bits per weight" in printed.splitlines()[0]
    assert "nnx.Conv: not quantized" in lines["conv.kernel"]
    assert "embed: left unless a rule" in lines["embed.embedding"]
    assert "vector" in lines["again.bias"]
    assert not any("rngs" in line or "again.kernel" in line for line in lines)
    quantize(model(), "W4A16-g32")
    assert capsys.readouterr().out == ""
    table = match_table(model(), "W4A16-g32")
    assert {row.path for row in table.quantized} >= {"attention.query.kernel", "blocks.up.kernel"}
    assert "W4A16C16-g32" in str(table)


def test_jit_takes_the_module_and_states_survive_as_pure_dicts():
    q = quantized("W8A16")
    y = output(q)
    np.testing.assert_array_equal(nnx.jit(lambda m, t: m(t))(q, TOKENS), y)
    np.testing.assert_array_equal(output(nnx.clone(q)), y)
    saved = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(q, nnx.Not(nnx.RngState))))
    assert saved["again"]["kernel"]["codes"].dtype == np.int8
    abstract = nnx.eval_shape(lambda: Model(nnx.Rngs(1)))
    template = quantize(abstract, "W8A16")
    state = nnx.state(template, nnx.Not(nnx.RngState))
    shapes = jax.tree.map(
        lambda s, a: (s.shape, s.dtype) == (a.shape, a.dtype), nnx.to_pure_dict(state), saved
    )
    assert all(jax.tree.leaves(shapes))
    restored = quantize(Model(nnx.Rngs(1)), "W8A16")
    state = nnx.state(restored, nnx.Not(nnx.RngState))
    nnx.replace_by_pure_dict(state, saved)
    nnx.update(restored, state)
    np.testing.assert_array_equal(output(restored), y)


def test_rules_pick_schemes_and_leave_things():
    rules = {"attention": None, "blocks.down": "W8A8", "*": "W4A16-g32"}
    q = quantize(model(), rules)
    assert type(q.attention.query) is nnx.LinearGeneral
    assert q.blocks.down.kernel.spec.format == "int8"
    assert q.blocks.up.kernel.spec.format == "int4"
    assert q.blocks.down.activation.format == "int8" and q.blocks.up.activation is None
    same = quantize(model(), "W4A16-g32", rules={"attention": None, "blocks.down": "W8A8"})
    assert nnx.graphdef(same) == nnx.graphdef(q)
    # A shared module is one tensor with several paths: a rule may use any of them.
    q = quantize(model(), {"again": "W8A16"})
    assert q.first.kernel.spec.format == "int8" and q.again is q.first
    assert type(q.list[0]) is nnx.Linear


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"attention.q_proj": "W8"}, "Nearest paths: .*attention"),
        ({"conv": "W8"}, "conv.kernel is left \\(nnx.Conv: not quantized\\)"),
        ("W4A16-g48", "K=64 .* is not divisible by group_size=48"),
        (
            "W8A8-static",
            "again.kernel: W8A8C16-static needs the calibrated range of its input.*drop '-static'",
        ),
        ("W5A16", "Did you mean"),
    ],
)
def test_errors(scheme, message):
    with pytest.raises(ValueError, match=message):
        quantize(model(), scheme)


def test_nan_names_the_layer():
    bad = nnx.clone(model())
    bad.list[0].kernel.set_value(bad.list[0].kernel.get_value().at[0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match=r"list\.0\.kernel: 1 of .* NaN"):
        quantize(bad, "W8A16")


def test_static_activations_take_calibrated_scales():
    small = nnx.Sequential(nnx.Linear(WIDTH, 8, rngs=nnx.Rngs(0)), nnx.relu)
    x = np.linspace(-2.0, 3.0, 4 * WIDTH, dtype=np.float32).reshape(4, WIDTH)
    path = match_table(small, "W8").quantized[0].path
    by_channel = {path: np.abs(x).max(axis=0)}
    for calibration in (by_channel, {path.removesuffix(".kernel"): 3.0}):
        q = quantize(small, "W8A8-static", calibration=calibration)
        layer = q.layers[0]
        assert layer.activation_scale.get_value() == np.float32(3.0) / 127
        assert 0 < relative_error(np.asarray(layer(x)), np.asarray(small.layers[0](x))) < 0.02
    abstract = nnx.eval_shape(lambda: nnx.clone(small))
    scale = quantize(abstract, "W8A8-static").layers[0].activation_scale
    assert (scale.shape, scale.dtype) == ((), jnp.float32)
    for wrong in (np.ones(3), np.nan, -1.0, "large"):
        with pytest.raises(ValueError, match=r"0\.kernel: (the absmax of its input|expected)"):
            quantize(small, "W8A8-static", calibration={path: wrong})
    with pytest.raises(ValueError, match="no tensor 'up'. Nearest paths: .*kernel"):
        quantize(small, "W8A8-static", calibration={"up": 1.0})
    for tokens in (TOKENS, jnp.asarray(TOKENS), [[1, 2]]):
        with pytest.raises(TypeError, match=r"Sample tokens go to fdq\.calibrate"):
            quantize(small, "W8A8-static", calibration=tokens)


def test_a_calibration_gives_scales_and_importance():
    layer = nnx.Sequential(nnx.Linear(WIDTH, 8, rngs=nnx.Rngs(0)), nnx.relu)
    x = np.linspace(-2.0, 3.0, 4 * WIDTH, dtype=np.float32).reshape(4, WIDTH)
    seen = calibrate(layer, x)
    q = quantize(layer, "W4A8-g32-static", calibration=seen, importance=seen).layers[0]
    np.testing.assert_allclose(q.activation_scale.get_value(), 3.0 / 127, rtol=1e-6)
    kernel = layer.layers[0].kernel.get_value()
    expected = quantize_array(kernel, q.kernel.spec, importance=np.square(x).mean(axis=0))
    np.testing.assert_array_equal(materialize(q.kernel).codes, expected.codes)


def test_containers_of_modules():
    layer = nnx.Linear(WIDTH, 8, rngs=nnx.Rngs(0))
    q = quantize(nnx.List([layer, layer]), "W8")
    assert type(q[0]) is nn.QuantizedLinear and q[0] is q[1]
    with pytest.raises(ValueError, match=r"quantized already: 0.kernel is quantized \(W8\)"):
        quantize(q, "W4-g32")


def test_donated_sources_are_freed():
    source = Model(nnx.Rngs(0))
    expected = output(quantized("W8A16"))
    q = quantize(source, "W8A16", donate=True)
    assert source.first.kernel.get_value().is_deleted()
    assert not source.first.bias.get_value().is_deleted()
    np.testing.assert_array_equal(output(q), expected)


def test_abstract_models_take_seconds_and_no_memory():
    from fdq.models import CONFIGS, abstract

    big = abstract(CONFIGS["ernie-4.5-300b-a47b"], jnp.bfloat16)
    q = quantize(big, "mix_quant")
    experts = q.layers[53].mlp.experts.down_proj
    assert isinstance(experts.kernel.codes.get_value(), jax.ShapeDtypeStruct)
    assert experts.kernel.shape == (64, 3584, 8192) and experts.kernel.spec.format == "int4"
    assert experts.activation.format == "int8"
    assert q.layers[53].self_attn.qkv_proj.kernel.spec.format == "int8"
    assert (
        q.scheme == '{"*.experts": "W4A8C16", "*": "W8A16C8"}'
        and '"cache": "C8"' in q.recipe_record
    )
    static = quantize(big, "tensor_wise_fp8")
    assert static.layers[0].mlp.down_proj.activation_scale.shape == ()


def test_ernies_wint4_depends_on_the_experts():
    from fdq.models import CONFIGS, abstract

    for name, dense in (("ernie-4.5-21b-a3b", "int8"), ("ernie-4.5-0.3b", "int4")):
        q = quantize(abstract(CONFIGS[name], jnp.bfloat16), "wint4", compat="fastdeploy")
        assert q.layers[1].self_attn.o_proj.kernel.spec.format == dense
        assert q.layers[1].self_attn.o_proj.kernel.spec.granularity == "channel"


def test_user_code_warns_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output(quantize(model(), "W8A16"))


def test_modules_in_containers():
    class Holder(nnx.Module):
        def __init__(self, rngs):
            def linear():
                return nnx.Linear(WIDTH, WIDTH, rngs=rngs)

            self.plain = nnx.data([linear(), (linear(), {"a": linear()})])
            self.named = nnx.Dict({"x": linear(), "f": nnx.relu})
            self.sequence = nnx.Sequential(linear(), nnx.relu, linear())
            self.shared = self.plain[0]

    q = quantize(Holder(nnx.Rngs(0)), "W8A16")
    layers = [q.plain[0], q.plain[1][0], q.plain[1][1]["a"], q.named["x"], q.sequence.layers[2]]
    assert {type(layer) for layer in layers} == {nn.QuantizedLinear}
    assert type(q.plain) is list and type(q.plain[1]) is tuple and q.named["f"] is nnx.relu
    assert q.shared is q.plain[0]


def test_stacked_layers_get_a_scale_each():
    calibration = {"up": np.array([1.0, 2.0, 4.0], np.float32), "down": 1.0}
    q = quantize(model().blocks, "W8A8-static", calibration=calibration)
    np.testing.assert_allclose(q.up.activation_scale.get_value() * 127, [1, 2, 4])
    np.testing.assert_allclose(q.down.activation_scale.get_value() * 127, [1, 1, 1])
