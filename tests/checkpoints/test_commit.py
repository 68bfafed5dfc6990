"""Directories that appear whole: readers and other writers meanwhile, links, full disks."""

import shutil
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from fdq_checkpoints import CheckpointError, convert, load, save
from fdq_checkpoints.store import commit, orbax_store


def test_another_writer_is_refused_until_the_directory_has_its_name(tmp_path, monkeypatch):
    refused = []
    sync = commit._sync

    def while_syncing(folder):
        with pytest.raises(CheckpointError, match="another process is writing it") as error:
            save({"b": jnp.ones(2)}, tmp_path / "out")
        refused.append(error)
        sync(folder)

    monkeypatch.setattr(commit, "_sync", while_syncing)
    save({"a": jnp.ones(2)}, tmp_path / "out")
    assert len(refused) == 1 and set(load(tmp_path / "out")) == {"a"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["fdq.json", "weights"]
    with pytest.raises(FileExistsError, match="exists already"):
        save({"b": jnp.ones(2)}, tmp_path / "out")


def test_overwriting_keeps_what_is_not_ours(tmp_path):
    save({"a": jnp.ones(2)}, tmp_path / "kept")
    (tmp_path / "out").symlink_to(tmp_path / "kept")
    save({"b": jnp.ones(2)}, tmp_path / "out", overwrite=True)
    assert set(load(tmp_path / "kept")) == {"a"} and set(load(tmp_path / "out")) == {"b"}
    mine = tmp_path / "out.fdq-old"
    mine.mkdir()
    (mine / "notes").touch()
    with pytest.raises(FileExistsError, match="is not an fdq checkpoint"):
        save({"c": jnp.ones(2)}, tmp_path / "out", overwrite=True)
    shutil.rmtree(mine)
    assert set(load(tmp_path / "out")) == {"b"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "out"]
    (tmp_path / "new.fdq-tmp").symlink_to(tmp_path / "kept")
    with pytest.raises(CheckpointError, match="a link; it would be emptied"):
        save({"c": jnp.ones(2)}, tmp_path / "new")
    assert set(load(tmp_path / "kept")) == {"a"}


def test_what_is_written_already_needs_no_more_disk(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=commit._SPARE_BYTES + 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    pending = tmp_path / "out.fdq-tmp"
    pending.mkdir()
    (pending / "batch").write_bytes(bytes(5000))
    with commit.pending_directory(tmp_path / "out", keep=lambda: True, needed_bytes=6000):
        pass
    with (
        pytest.raises(
            CheckpointError,
            match=r"about 6\.00 kB are needed, beside a reserve of 16\.8 MB, but 16\.8 MB are "
            r"free\. Free some space",
        ),
        commit.pending_directory(tmp_path / "other", needed_bytes=6000),
    ):
        pass


def test_another_subtree_starts_anew(tmp_path, monkeypatch):
    """The params and their moving average look the same but for their values."""
    rng = np.random.default_rng(0)
    params, average = (
        {name: {"kernel": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)} for name in "ab"}
        for _ in range(2)
    )
    writer = orbax_store.TreeWriter(tmp_path / "source", total_bytes=0)
    for top, tree in (("params", params), ("average", average)):
        for name in "ab":
            writer.add((top, name, "kernel"), tree[name]["kernel"])
    writer.finalize()
    monkeypatch.setattr(orbax_store, "MIN_BATCH_BYTES", 1)

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "source", tmp_path / "out", None, subtree="params", progress=interrupt)
    assert (tmp_path / "out.fdq-tmp").is_dir()
    again = {"subtree": "average", "overwrite": True}
    convert(tmp_path / "source", tmp_path / "out", None, **again)
    for name, value in load(tmp_path / "out").items():
        np.testing.assert_array_equal(value["kernel"], average[name]["kernel"])


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_reader_meanwhile_sees_the_old_or_the_new(tmp_path, can_exchange, monkeypatch):
    if not can_exchange:
        monkeypatch.setattr(commit, "_exchanged", lambda *_: False)
    out, wrong, seen, stop = tmp_path / "out", [], set(), threading.Event()
    save({"a": jnp.zeros(100_000)}, out)

    def reading():
        while not stop.is_set():
            try:
                values = np.asarray(load(out)["a"])
                assert (values == values[0]).all()
                seen.add(float(values[0]))
            except Exception as error:
                wrong.append(error)
                return

    thread = threading.Thread(target=reading)
    thread.start()
    for number in range(1, 13):
        save({"a": jnp.full(100_000, number, jnp.float32)}, out, overwrite=True)
    stop.set()
    thread.join()
    assert not wrong and len(seen) > 2, wrong
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
