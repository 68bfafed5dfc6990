"""Plain Orbax checkpoints, of either API and of training runs, as a source like any other."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp0
import pytest
from flax import linen, nnx
from orbax.checkpoint import v1 as ocp1

import fdq
from fdq.quantizers.quantization import quantize
from fdq_checkpoints import CheckpointError, convert, inspect, load, save
from tests.checkpoints import builders
from tests.checkpoints.test_stored_trees import assert_same
from tests.covering import slow


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(16, 32, rngs=rngs)
        self.norm = nnx.RMSNorm(32, rngs=rngs)
        self.steps = nnx.Variable(jnp.int32(3))


class Dense(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(8)(linen.relu(linen.Dense(32)(x)))


def nnx_state():
    return nnx.state(Block(nnx.Rngs(0)))


def nnx_dict():
    return nnx.to_pure_dict(nnx_state())


def linen_params():
    return Dense().init(jax.random.key(0), jnp.zeros((1, 16)))


def with_lists():
    return {"layers": [{"w": jnp.ones((4, 2))}, {"w": jnp.full((4, 2), 3.0)}], "n": np.arange(3)}


def write_v0(tree, path):
    with ocp0.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def write_v0_pytree(tree, path):
    ocp0.PyTreeCheckpointer().save(path, tree)


def write_v1(tree, path):
    ocp1.save(path, tree)


def as_dict(tree):
    if isinstance(tree, nnx.State):
        return nnx.to_pure_dict(tree)
    if isinstance(tree.get("layers"), list):
        return tree | {"layers": dict(zip("01", tree["layers"], strict=True))}
    return tree


@pytest.mark.parametrize("write", [write_v0, slow(write_v0_pytree), write_v1])
@pytest.mark.parametrize("make", [nnx_state, slow(nnx_dict), linen_params, with_lists])
def test_a_float_orbax_checkpoint_of_any_api(tmp_path, make, write):
    tree = make()
    write(tree, tmp_path / "float")
    expected = quantize(as_dict(tree), "W8A16")
    table = convert(tmp_path / "float", tmp_path / "out", "W8A16")
    assert any(row.quantized for row in table.rows)
    assert_same(expected, load(tmp_path / "out"))
    assert_same(expected, load(tmp_path / "float", "W8A16"))
    assert_same(as_dict(tree), load(tmp_path / "float"))
    before = inspect(tmp_path / "float")
    assert before.kind == "Orbax tree" and {row.path for row in before.rows} == {
        row.path for row in table.rows
    }


def training_state():
    """What a training loop keeps: parameters, an optimizer's tuples, numbers, a text, nothing."""
    params = linen_params()["params"]
    moments = jax.tree.map(jnp.zeros_like, params)
    count = np.array(2**40)
    optimizer = ({"mu": moments, "count": count}, None, {})
    return {"params": params, "opt_state": optimizer, "step": 3, "rate": 0.1, "run": "first"}


@pytest.mark.parametrize("write", [slow(write_v0_pytree), write_v1])
def test_a_training_state_with_numbers_texts_and_nothing(tmp_path, write):
    state = training_state()
    write(state, tmp_path / "state")
    with pytest.raises(CheckpointError, match=r"run is a str, no array.*--subtree\): opt_state, "):
        load(tmp_path / "state")
    params = load(tmp_path / "state", "W8A16", subtree="params")
    assert_same(quantize(state["params"], "W8A16"), params)
    optimizer = load(tmp_path / "state", subtree="opt_state")
    assert optimizer["0"]["count"] == 2**40
    write({name: x for name, x in state.items() if name != "run"}, tmp_path / "numbers")
    whole = load(tmp_path / "numbers")
    assert whole["step"] == 3 and whole["rate"] == 0.1
    with pytest.raises(CheckpointError, match="nothing below 'parms'.* nearest present name is"):
        convert(tmp_path / "state", tmp_path / "out", "W8A16", subtree="parms")


def run_of(folder, trees, **options):
    """A CheckpointManager's directory of steps: of one tree each, or of named ones."""
    with ocp0.CheckpointManager(folder, options=options.get("options")) as manager:
        for step, tree in trees.items():
            save = ocp0.args.StandardSave
            named = {name: save(x) for name, x in tree.items()} if options.get("named") else {}
            manager.save(step, args=ocp0.args.Composite(**named) if named else save(tree))


def test_of_a_runs_root_the_last_step_is_read(tmp_path):
    trees = {9: {"w": jnp.ones((4, 8))}, 10: {"w": jnp.full((4, 8), 3.0)}}
    run_of(tmp_path / "run", trees)
    (tmp_path / "run" / "11.orbax-checkpoint-tmp-7").mkdir()
    (tmp_path / "run" / "notes2").mkdir()
    for source, step in (("run", 10), ("run/10", 10), ("run/9", 9), ("run/9/default", 9)):
        table = inspect(tmp_path / source)
        assert table.rows[0].shape == (4, 8)
        assert_same(load(tmp_path / source, "W8A16"), quantize(trees[step], "W8A16"))
    assert inspect(tmp_path / "run").path == str(tmp_path / "run" / "10")
    convert(tmp_path / "run", tmp_path / "out", "W8A16")
    assert inspect(tmp_path / "out").provenance["source"] == "run/10"
    options = ocp0.CheckpointManagerOptions(step_prefix="ckpt", step_format_fixed_length=6)
    run_of(tmp_path / "named", trees, options=options)
    assert_same(load(tmp_path / "named"), trees[10])
    (tmp_path / "v1").mkdir()
    write_v1(trees[9], tmp_path / "v1" / "step_9")
    write_v1(trees[10], tmp_path / "v1" / "step_10")
    assert_same(load(tmp_path / "v1"), trees[10])


def test_the_trees_of_a_step_that_has_several_are_told_apart(tmp_path):
    params = {"a": {"kernel": jnp.ones((4, 8))}}
    step = {"ema": {"a": {"kernel": jnp.full((4, 8), 2.0)}}, "params": params}
    run_of(tmp_path / "run", {1: step}, named=True)
    ocp1.save_checkpointables(tmp_path / "v1", step)
    for folder in ("run", "run/1", "v1"):
        assert_same(load(tmp_path / folder), step)
        assert_same(load(tmp_path / folder, subtree="params"), params)
        convert(tmp_path / folder, tmp_path / "out", "W8A16", subtree="ema.a", overwrite=True)
        assert_same(load(tmp_path / "out"), quantize(step["ema"]["a"], "W8A16"))
    assert_same(load(tmp_path / "run" / "1" / "params"), params)


def test_the_arrays_of_an_fdq_checkpoint_are_no_tree_of_their_own(tmp_path):
    save({"a": {"kernel": jnp.ones((4, 8))}}, tmp_path / "out")
    for use in (load, inspect, lambda path: convert(path, tmp_path / "other", "W8A16")):
        with pytest.raises(CheckpointError, match=r"without what they mean\. Give .*/out\."):
            use(tmp_path / "out" / "weights")


@pytest.mark.slow
def test_a_decoder_trained_in_jax_becomes_a_model(tmp_path):
    family = builders.MODELS / "qwen3"
    model, expected = load(family), load(family, "W8A16")
    state = {"model": nnx.to_pure_dict(nnx.state(model)), "step": 1}
    ocp1.save(tmp_path / "float", state)
    shutil.copytree(family, tmp_path / "qwen3")
    (tmp_path / "qwen3" / "tokenizer.json").write_text("{}")
    content = json.loads((family / "config.json").read_text())
    for config in (model.config, content, tmp_path / "qwen3", tmp_path / "qwen3" / "config.json"):
        found = load(tmp_path / "float", "W8A16", config=config, subtree="model")
        assert_same(expected, found)
    assert found.tokenizer_path == str(tmp_path / "qwen3" / "tokenizer.json")
    options = {"config": tmp_path / "qwen3", "subtree": "model"}
    fdq.convert(tmp_path / "float", tmp_path / "out", "W8A16", **options)
    assert_same(expected, load(tmp_path / "out"))
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    kept = load(tmp_path / "float", dtype="bfloat16", **options)
    assert_same(load(family, dtype="bfloat16"), kept)
    three = model.config.replace(num_layers=3)
    with pytest.raises(CheckpointError, match=r"has no tensor layers\.2"):
        load(tmp_path / "float", config=three, subtree="model")
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such file\. Give a model's config"):
        load(tmp_path / "float", config=tmp_path / "nowhere", subtree="model")
    with pytest.raises(TypeError, match="got int"):
        load(tmp_path / "float", config=3, subtree="model")
    with pytest.raises(CheckpointError, match="dtype= is for models, and a tree keeps its"):
        load(tmp_path / "float", dtype="bfloat16")


def test_a_tree_comes_in_the_structure_of_a_template(tmp_path):
    module = Block(nnx.Rngs(0))
    write_v1(nnx.state(module), tmp_path / "state")
    template = nnx.eval_shape(lambda: Block(nnx.Rngs(0)))
    assert_same(module, load(tmp_path / "state", template=template))
    assert_same(quantize(module, "W8A16"), load(tmp_path / "state", "W8A16", template=template))
    write_v1(with_lists(), tmp_path / "lists")
    found = load(tmp_path / "lists", template=with_lists())
    assert jax.tree.structure(found) == jax.tree.structure(with_lists())
    wrong = with_lists() | {"n": np.zeros(3, np.float32)}
    with pytest.raises(CheckpointError, match="n: stored dtype int64, the template has float32"):
        load(tmp_path / "lists", template=wrong)
