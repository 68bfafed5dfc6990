"""`fdq convert` and `fdq inspect` of plain Orbax checkpoints."""

import json

import jax.numpy as jnp
import orbax.checkpoint as ocp0
from flax import nnx

from fdq.quantizers.quantization import quantize
from fdq_checkpoints import load
from tests.checkpoints import builders
from tests.checkpoints.test_stored_trees import assert_same
from tests.cli.command import run


def test_a_runs_root_with_its_subtree_and_config(tmp_path):
    family = builders.MODELS / "qwen3"
    state = {
        "params": nnx.to_pure_dict(nnx.state(load(family))),
        "opt_state": {"kernel": jnp.ones((4, 4))},
    }
    with ocp0.CheckpointManager(tmp_path / "run") as manager:
        manager.save(7, args=ocp0.args.StandardSave(state))
    options = ("--scheme", "W8A16", "--subtree", "params", "--config", family / "config.json")
    content = json.loads(
        run("convert", tmp_path / "run", tmp_path / "model", *options, "--json").stdout
    )
    assert content["bytes_after"] < content["bytes_before"]
    assert_same(load(tmp_path / "model"), load(family, "W8A16"))
    assert "opt_state.kernel" in run("inspect", tmp_path / "run").stdout
    table = json.loads(
        run("inspect", tmp_path / "run" / "7", "--subtree", "opt_state", "--json").stdout
    )
    assert [row["path"] for row in table["rows"]] == ["kernel"]
    run("convert", tmp_path / "run", tmp_path / "tree", "--scheme", "W8A16")
    assert_same(load(tmp_path / "tree"), quantize(state, "W8A16"))
