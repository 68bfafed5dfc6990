"""fdq checkpoints among the steps of a training run, and paths that are addresses."""

import pathlib

import jax.numpy as jnp
import orbax.checkpoint as ocp0
import pytest
from etils import epath
from orbax.checkpoint import v1 as ocp1

import fdq
from fdq.quantizers.quantization import quantize
from fdq_checkpoints import CheckpointError, convert, inspect, load, save
from tests.checkpoints.test_stored_trees import assert_same
from tests.covering import slow


def tree(number):
    return {"a": {"kernel": jnp.full((8, 16), float(number))}}


def manager_v0(folder):
    return ocp0.CheckpointManager(folder)


def save_v0(manager, step, content):
    manager.save(step, args=ocp0.args.StandardSave(content))
    manager.wait_until_finished()


def steps_v0(manager):
    return list(manager.all_steps())


def manager_v1(folder):
    return ocp1.training.Checkpointer(folder)


def save_v1(manager, step, content):
    manager.save(step, content)


def steps_v1(manager):
    return [checkpoint.step for checkpoint in manager.checkpoints]


V0, V1 = (manager_v0, save_v0, steps_v0), (manager_v1, save_v1, steps_v1)


@pytest.mark.parametrize("api", [V0, slow(V1)], ids=["V0", "V1"])
def test_a_run_whose_steps_are_floats_and_codes(tmp_path, api):
    """The last step counts, of whichever kind; managers and fdq do not mind each other."""
    make, write, steps = api
    run = tmp_path / "run"
    codes = quantize(tree(3), "W8A16")
    with make(run) as manager:
        write(manager, 9, tree(1))
        write(manager, 10, tree(2))
    assert_same(load(run), tree(2))
    save(codes, run / "1000")
    (run / "1001.fdq-tmp").mkdir()
    assert_same(load(run), codes)
    assert_same(load(run / "1000"), codes)
    assert_same(load(run / "10"), tree(2))
    assert inspect(run, verify=True).path == str(run / "1000")
    save(quantize(tree(5), "W8A16"), run / "1000", overwrite=True)
    assert_same(load(run), quantize(tree(5), "W8A16"))
    with make(run) as manager:
        assert set(steps(manager)) >= {9, 10}
        write(manager, 2000, tree(4))
    assert_same(load(run), tree(4))
    convert(run, tmp_path / "out", "W8A16")
    assert inspect(tmp_path / "out").provenance["source"] == "run/2000"
    # Beside what the manager keeps of the step, one has to be named.
    save(codes, run / "2000" / "codes")
    with pytest.raises(CheckpointError, match=r"2000: has several checkpoints \(codes, (.*)\)\. G"):
        load(run)
    assert_same(load(run / "2000" / "codes"), codes)


def test_checkpoints_below_steps_and_models_side_by_side(tmp_path):
    for step in (7, 30):
        save(tree(step), tmp_path / "run" / f"step_{step:06}" / "model")
    assert_same(load(tmp_path / "run"), tree(30))
    assert_same(load(tmp_path / "run" / "step_000007"), tree(7))
    assert inspect(tmp_path / "run").path.endswith("run/step_000030/model")
    for name in ("qwen-2", "llama-3"):
        save(tree(1), tmp_path / "models" / name)
    with pytest.raises(CheckpointError, match="models: no config.json, but .* has one"):
        load(tmp_path / "models")
    (tmp_path / "run" / "step_000031").mkdir()
    assert_same(load(tmp_path / "run"), tree(30))


ADDRESSES = ["gs://bucket/run/1000", "memory://run", "s3://bucket/run", "hdfs://host/run"]


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_are_refused_by_name(tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    paths = [address, pathlib.Path(address)]
    if address.startswith(("gs", "s3")):
        paths.append(epath.Path(address))
    save(tree(1), tmp_path / "here")
    for path in paths:
        for read in (load, inspect, lambda path: convert(path, "out", "W8A16")):
            with pytest.raises(
                FileNotFoundError, match="an address that fdq does not know. Download"
            ) as told:
                read(path)
            assert str(told.value).startswith(repr(address))
        for write in (
            lambda path: fdq.save(tree(1), path),
            lambda path: fdq.save(tree(1), overwrite=True, path=path),
            lambda path: fdq.convert("here", path, "W8A16"),
            lambda path: fdq.export("here", path, to="dense"),
        ):
            with pytest.raises(CheckpointError, match="writes to local directories only") as told:
                write(path)
            assert str(told.value).startswith(repr(address))
    assert [entry.name for entry in tmp_path.iterdir()] == ["here"]


def test_local_paths_of_epath_are_paths(tmp_path):
    save(tree(1), epath.Path(tmp_path) / "out")
    assert_same(load(epath.Path(tmp_path) / "out"), tree(1))
    assert "gcloud storage cp -r 'gs://b/m' DIR" in _told(lambda: load("gs://b/m"))
    assert "aws s3 cp --recursive DIR 's3://b/m'" in _told(lambda: save(tree(1), "s3://b/m"))


def _told(call):
    with pytest.raises((CheckpointError, FileNotFoundError)) as told:
        call()
    return str(told.value)
