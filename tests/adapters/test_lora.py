"""Adapters beside quantized layers: what they compute, their gradients, merging, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fdq
from fdq import models
from fdq.formats.qtensor import QuantizedWeight, dequantize
from fdq.models.decoder import abstract
from fdq.nn.parameters import value
from tests.checkpoints import builders
from tests.closeness import assert_close, error
from tests.covering import longest, slow

TOKENS = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)


@functools.cache
def loaded(name, scheme):
    return fdq.load(builders.MODELS / name, scheme)


def tuned_model(name, scheme="W4A16-g32", **settings):
    """A model with adapters that do something: B is random too."""
    return moved(fdq.lora(loaded(name, scheme), **{"rank": 3, "alpha": 6, **settings}))


def moved(tuned):
    rng = np.random.default_rng(5)
    for _, parameter in nnx.to_flat_state(nnx.state(tuned, nnx.LoRAParam)):
        new = rng.standard_normal(parameter.shape) / parameter.shape[-2]
        new = 0.3 * new + np.asarray(parameter.get_value(), np.float64)
        parameter.set_value(jnp.asarray(new, parameter.dtype))
    return tuned


def decoded(module):
    """The same module with floats in place of its quantized weights."""
    copy = nnx.clone(module)
    for _, one in nnx.iter_modules(copy):
        for name, held in list(vars(one).items()):
            if isinstance(held, QuantizedWeight):
                setattr(one, name, nnx.Param(dequantize(value(held))))
    return copy


@nnx.jit
def run(model, x):
    return model(x)


def loss(model, tokens):
    chosen = jnp.take_along_axis(
        jax.nn.log_softmax(model(tokens[:, :-1])), tokens[:, 1:, None], axis=-1
    )
    return -chosen.mean()


def with_gradients(function, model, *arguments):
    """What a function of a model gives, and its gradients by the adapters, by path."""

    @nnx.jit
    def run(model, *arguments):
        by = nnx.DiffState(0, nnx.LoRAParam)
        return nnx.value_and_grad(function, argnums=by, has_aux=True)(model, *arguments)

    (_, y), gradients = run(model, *arguments)
    found = nnx.to_flat_state(gradients)
    return y, {path: np.asarray(parameter.get_value()) for path, parameter in found}


def assert_as_decoded(function, model, *arguments):
    """Result and gradients are those of the model in floats; returns the result."""
    y, found = with_gradients(function, model, *arguments)
    expected, dense = with_gradients(function, decoded(model), *arguments)
    assert_close(y, expected, of_largest=1e-5)
    assert found and found.keys() == dense.keys()
    for path in found:
        assert_close(found[path], dense[path], of_largest=1e-5, what=str(path))
    return y


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        slow("llama", "W4A16-g32"),
        longest("qwen3_moe", "W4A16-g16"),
        longest("llama", "WNF4A16-g32"),
        longest("llama", "W8A16"),
        longest("deepseek_v3", "W4A16-g8"),
    ],
)
def test_gradients_are_those_of_the_decoded_model(name, scheme):

    def function(model, tokens):
        logits = model(tokens[:, :-1])
        return jnp.sin(logits).sum(), logits

    assert_as_decoded(function, tuned_model(name, scheme), TOKENS)


class Own(nnx.Module):
    """Somebody's model of Flax's own layers."""

    def __init__(self, rngs):
        self.first = nnx.Linear(64, 96, rngs=rngs)
        self.heads = nnx.LinearGeneral((12, 8), (4, 16), axis=(-1, -2), rngs=rngs)
        self.mix = nnx.Einsum("bhd,hdf->bf", (4, 16, 64), (64,), rngs=rngs)
        self.experts = fdq.nn.ExpertLinear(3, 64, 32, rngs=rngs)

    def __call__(self, x):
        y = jax.nn.gelu(self.first(x)).reshape(-1, 12, 8)
        y = jnp.tanh(self.mix(self.heads(y)))
        return self.experts(y, jnp.arange(y.shape[0]) % 3)


@pytest.fixture(scope="module")
def own():
    return Own(nnx.Rngs(3))


@pytest.mark.parametrize("scheme", ["W4A16-g32", longest(None), longest("W8A16"), "WNF4A16-g32"])
@pytest.mark.slow
def test_layers_of_flax(own, scheme, rng):
    base = own if scheme is None else fdq.quantize(own, scheme)
    x = jnp.asarray(rng.standard_normal((5, 64)), jnp.float32)
    before = jax.tree.map(np.array, nnx.state(base))
    tuned = fdq.lora(base, rank=2, key=jax.random.key(4))
    assert {type(one) for _, one in nnx.iter_modules(base)}.isdisjoint({fdq.nn.LoRA})
    assert len(nnx.to_flat_state(nnx.state(tuned, nnx.LoRAParam))) == 8
    plain = run(base, x)

    def function(model, x):
        y = model(x)
        return jnp.sin(y).sum(), y

    assert_close(with_gradients(function, tuned, x)[0], plain, of_largest=1e-6)  # B is zero
    y = assert_as_decoded(function, moved(tuned), x)
    assert error(y, plain) > 0.05
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(base))
    floats = fdq.merge_lora(tuned, requantize=False)
    assert type(floats) is Own and not nnx.to_flat_state(nnx.state(floats, nnx.LoRAParam))
    assert_close(run(floats, x), y, of_largest=1e-5)


def test_a_stack_of_layers(rng):
    @nnx.vmap(in_axes=0, out_axes=0)
    def made(key):
        return nnx.Linear(32, 32, rngs=nnx.Rngs(key))

    stack = fdq.quantize(made(jax.random.split(jax.random.key(0), 3)), "W8A16")
    tuned = moved(fdq.lora(stack, rank=2))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def through(x, layer):
        return jnp.tanh(layer(x))

    x = jnp.asarray(rng.standard_normal((4, 32)), jnp.float32)
    by_hand = x
    for i in range(3):
        w = np.asarray(dequantize(value(tuned.base_module.kernel)))[i]
        one = tuned.adapters.whole
        change = np.asarray(one.lora_a[...][i] @ one.lora_b[...][i]) * one.scale
        by_hand = np.tanh(by_hand @ (w + change) + np.asarray(tuned.base_module.bias[...][i])[None])
    assert_close(through(x, tuned), by_hand, of_largest=1e-5)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        slow("llama", ("v_proj", "down_proj")),
        longest("qwen3_moe", None),
        longest("deepseek_v3", None),
    ],
)
def test_a_model_is_decoded_with_its_adapters(name, targets):
    tuned = tuned_model(name, "W4A16-g8", targets=targets)
    prompts = jnp.asarray([[1, 2, 3], [4, 5, 6]])
    state = fdq.prefill(tuned, prompts, tuned.init_cache(2, 16, "C16"))
    found = np.asarray(fdq.decode(tuned, state, steps=4).generated())
    whole = np.concatenate([prompts, found], axis=1)
    logits = run(tuned, jnp.asarray(whole))
    np.testing.assert_array_equal(logits[:, 2:-1].argmax(-1), found)
    assert error(run(loaded(name, "W4A16-g8"), jnp.asarray(whole)), logits) > 0.02


def test_targets_name_layers_and_parts_of_fused_ones():
    model = loaded("llama", "W4A16-g32")

    def names(targets):
        state = nnx.to_flat_state(nnx.state(fdq.lora(model, targets=targets), nnx.LoRAParam))
        return {".".join(map(str, path[:-1])) for path, _ in state}

    attention = "layers.{}.self_attn.qkv_proj.adapters.{}"
    assert names(("q_proj", "v_proj")) == {
        attention.format(i, part) for i in range(2) for part in ("q_proj", "v_proj")
    }
    assert names("layers.1.self_attn.k_proj") == {attention.format(1, "k_proj")}
    assert names("qkv_proj") == {
        attention.format(i, f"{part}_proj") for i in range(2) for part in "qkv"
    }
    assert names("*.1.mlp") == {
        "layers.1.mlp.gate_up_proj.adapters.gate_proj",
        "layers.1.mlp.gate_up_proj.adapters.up_proj",
        "layers.1.mlp.down_proj.adapters.whole",
    }
    assert names("lm_head") == {"lm_head.adapters.whole"}
    assert len(names(None)) == 14 and not names(None) & names("lm_head")


def test_a_part_changes_its_own_columns_alone():
    model = loaded("llama", "W4A16-g32")
    tuned = moved(fdq.lora(model, targets=("k_proj", "down_proj")))
    layers = (one.layers[1].self_attn.qkv_proj for one in (model, tuned))
    x = jnp.linspace(-1, 1, 128, dtype=jnp.float32).reshape(2, 64)
    plain, found = (np.asarray(layer(x)) for layer in layers)
    changed = (plain != found).any(0)
    widths, _ = model.layers[1].self_attn.fused_parts()["qkv_proj"]
    q, k, _ = widths
    assert changed[q : q + k].all() and not changed[:q].any() and not changed[q + k :].any()


def test_a_family_that_publishes_fused_layers_has_adapters_of_the_whole():
    config = loaded("llama", "W4A16-g32").config.replace(model_type="phi3")
    state = nnx.state(fdq.lora(abstract(config), targets="qkv_proj", rank=2), nnx.LoRAParam)
    found = {path[-2:]: leaf.shape for path, leaf in nnx.to_flat_state(state)}
    assert found == {("whole", "lora_a"): (64, 2), ("whole", "lora_b"): (2, 128)}


def test_merging_quantizes_the_sum_as_the_weight_was():
    model = loaded("llama", "W4A16-g32")
    tuned = tuned_model("llama", targets=("v_proj", "down_proj"))
    merged = fdq.merge_lora(tuned)
    assert merged.scheme == model.scheme and nnx.state(merged, nnx.LoRAParam) == nnx.State({})
    layer, old, new = (one.layers[0].self_attn.qkv_proj for one in (tuned, model, merged))
    change = np.zeros((64, 128), np.float32)
    one = layer.adapters.v_proj
    change[:, one.start : one.stop] = np.asarray(one.lora_a[...] @ one.lora_b[...]) * one.scale
    w = dequantize(value(old.kernel)) + change
    expected = fdq.quantize(w, "W4A16-g32")
    assert value(new.kernel).canonical().spec == expected.spec
    assert_close(dequantize(value(new.kernel)), dequantize(expected), of_largest=1e-6)
    assert new.kernel.layout == old.kernel.layout
    untouched = (one.layers[0].mlp.gate_up_proj.kernel for one in (model, merged))
    jax.tree.map(np.testing.assert_array_equal, *map(value, untouched))
    nearer, farther = (error(dequantize(value(one.kernel)), w) for one in (new, old))
    assert nearer < 0.7 * farther


def test_an_optimizer_moves_the_adapters_alone(rng):
    layers = nnx.Sequential(*(nnx.Linear(32, 32, rngs=nnx.Rngs(i)) for i in range(2)))
    tuned = fdq.lora(fdq.quantize(layers, "W2A16-g32"), rank=4)
    optimizer = nnx.Optimizer(tuned, optax.adam(1e-2), wrt=nnx.LoRAParam)
    before = jax.tree.map(np.array, nnx.split(tuned, nnx.LoRAParam, ...)[2])
    x = jnp.asarray(rng.standard_normal((64, 32)), jnp.float32)
    y = layers(x)

    @nnx.jit
    def step(tuned, optimizer):
        def loss(model):
            return ((model(x) - y) ** 2).mean()

        of_adapters = nnx.DiffState(0, nnx.LoRAParam)
        found, gradient = nnx.value_and_grad(loss, argnums=of_adapters)(tuned)
        optimizer.update(tuned, gradient)
        return found

    with jax.numpy_dtype_promotion("standard"):  # optax has numbers of both kinds
        losses = [float(step(tuned, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.8 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, before, nnx.split(tuned, nnx.LoRAParam, ...)[2])


def memory(step, *arguments, donate):
    """Bytes at most, by the compiler: arguments, results not in their place, what is between."""
    found = jax.jit(step, donate_argnums=donate).lower(*arguments).compile().memory_analysis()
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + results + found.temp_size_in_bytes


@pytest.mark.slow
def test_a_step_takes_less_than_half_of_the_memory():
    """Of one of all weights in bfloat16 with Adam; nothing is computed."""
    config = models.DecoderConfig(
        model_type="llama", vocab_size=512, hidden_size=512, intermediate_size=1536, num_layers=2,
        num_heads=8, num_kv_heads=4, head_dim=64, rms_norm_epsilon=1e-5,
        rotary=fdq.nn.RotaryConfig(), dtype="bfloat16",
    )  # fmt: skip
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    model = abstract(config)
    tuned = fdq.lora(fdq.quantize(model, "W4A16"), rank=8)
    found = []
    for one, kind in ((model, nnx.Param), (tuned, nnx.LoRAParam)):
        graph, trained, rest = nnx.split(one, kind, ...)
        if kind is nnx.LoRAParam:
            assert sum(leaf.size for leaf in jax.tree.leaves(trained)) < 0.04 * 6_500_000
        optimizer = optax.adam(1e-4)
        state = jax.eval_shape(optimizer.init, trained)

        def step(trained, state, rest, tokens, graph=graph, optimizer=optimizer):
            def of(trained):
                return loss(nnx.merge(graph, trained, rest), tokens)

            gradient = jax.grad(of)(trained)
            updates, state = optimizer.update(gradient, state, trained)
            return optax.apply_updates(trained, updates), state

        with jax.numpy_dtype_promotion("standard"):
            found.append(memory(step, trained, state, rest, tokens, donate=(0, 1)))
    whole, adapters = found
    print(f"{whole / 1e6:.1f} MB, {adapters / 1e6:.1f} MB: {adapters / whole:.3f}")
    assert adapters < 0.45 * whole


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": "q_prj"}, "'q_prj' is no linear layer of this Decoder.*mean 'q_proj'"),
        ({"targets": ["q_proj", "embed_tokens"]}, "'embed_tokens' is no linear layer"),
        ({"rank": 0}, r"rank \(=0\) must be a whole number"),
        ({"alpha": float("nan")}, r"alpha \(=nan\)"),
        ({"dtype": jnp.int8}, r"dtype \(=int8\)"),
    ],
)
def test_what_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        fdq.lora(loaded("llama", "W4A16-g32"), **settings)


def test_what_is_no_module_and_what_has_adapters():
    with pytest.raises(TypeError, match="expected an NNX module, found a dict"):
        fdq.lora({"kernel": jnp.ones((4, 4))})
    with pytest.raises(ValueError, match="no linear layer"):
        fdq.lora(nnx.LayerNorm(4, rngs=nnx.Rngs(0)))
    model = loaded("llama", "W4A16-g32")
    with pytest.raises(ValueError, match=r"o_proj: has adapters already\. Merge them first"):
        fdq.lora(fdq.lora(model, targets="o_proj"), targets="q_proj")
    with pytest.raises(ValueError, match=r"has no adapters of fdq\.lora"):
        fdq.merge_lora(model)
