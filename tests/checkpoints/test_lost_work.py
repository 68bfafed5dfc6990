"""Whatever ends a conversion: what was finished stays, and the next run goes on from it."""

import contextlib
import os
import resource
import shutil
import signal
import types

import numpy as np
import pytest

from fdq_checkpoints import CheckpointError, conversion, convert, load, save
from fdq_checkpoints.store import commit, journal, orbax_store, stopping
from tests.checkpoints import builders
from tests.checkpoints.test_interrupts import SOURCE, TENSORS, interrupt_after
from tests.checkpoints.test_stored_trees import assert_same

KEPT = r"Kept {} of 18 tensors .*out\.fdq-tmp\. The same call goes on from there; to drop them"


def notes(error):
    return " ".join(getattr(error.value, "__notes__", ()))


def going_on(destination, caplog, **options):
    """Converts, and how many tensors were not made again."""
    made = []
    caplog.clear()
    convert(
        options.pop("source", SOURCE),
        destination,
        options.pop("scheme", "W8A16"),
        progress=lambda *told: made.append(told[2]),
        **options,
    )
    return TENSORS - len(made)


@contextlib.contextmanager
def file_size_limit(nbytes):
    """Files that grow beyond it fail with EFBIG, as those on a full disk do with ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


# Orbax 0.12.8 closes its event loop under writes that go on beside one that failed (2026-11-28).
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_is_full(tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setattr(orbax_store, "MIN_BATCH_BYTES", 1)
    limit = contextlib.ExitStack()

    def progress(done, total, path):
        if path == "layers.0.self_attn.qkv_proj.kernel":
            limit.enter_context(file_size_limit(5_000))

    with (
        limit,
        pytest.raises(CheckpointError, match="could not be written: File too large") as error,
    ):
        convert(SOURCE, tmp_path / "out", "W8A16", progress=progress)
    said = capfd.readouterr()
    assert "Traceback" not in said.err + said.out + caplog.text
    kept = int(notes(error).split()[1])
    assert 0 < kept < TENSORS
    assert going_on(tmp_path / "out", caplog) == kept
    assert f"going on, kept {kept} of {TENSORS} tensors" in caplog.text
    assert_same(load(SOURCE, "W8A16"), load(tmp_path / "out"))


def test_a_weight_that_is_not_finite_in_the_last_layer(tmp_path, caplog):
    """The shard is downloaded again: what came of the others is not made again."""
    tensors = builders.model("qwen3", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    name = "model.layers.1.mlp.down_proj.weight"
    first = {key: value for key, value in tensors.items() if ".layers.1." not in key}
    last = {key: value for key, value in tensors.items() if ".layers.1." in key}
    bad = last[name].copy()
    bad[3, 4] = np.inf
    shards = {"model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": last}
    builders.write_sharded(tmp_path / "model", shards)
    builders.write(tmp_path / "model" / "model-00002-of-00002.safetensors", last | {name: bad})
    source = tmp_path / "model"
    place = rf"model-00002-of-00002\.safetensors: tensor '{name}' holds inf at \[3, 4\]"
    with pytest.raises(CheckpointError, match=place) as error:
        convert(source, tmp_path / "out", "W8A16")
    kept = int(notes(error).split()[1])
    with pytest.raises(CheckpointError, match=place):  # nothing has changed, nothing is lost
        convert(source, tmp_path / "out", "W8A16")
    builders.write(source / "model-00002-of-00002.safetensors", last)
    resumed = going_on(tmp_path / "out", caplog, source=source)
    assert "model-00002-of-00002.safetensors of the source has changed" in caplog.text
    assert 0 < resumed < kept
    assert_same(load(source, "W8A16"), load(tmp_path / "out"))


def test_only_batches_of_a_changed_shard_are_made_again(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(orbax_store, "MIN_BATCH_BYTES", 1)
    tensors = builders.model("qwen3", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    parts = {
        f"model-0000{i + 1}-of-00002.safetensors": {
            key: value for key, value in tensors.items() if (".layers.1." in key) == bool(i)
        }
        for i in range(2)
    }
    builders.write_sharded(tmp_path / "model", parts)
    progress, _ = interrupt_after(14)
    with pytest.raises(KeyboardInterrupt, match="Kept 14"):
        convert(tmp_path / "model", tmp_path / "out", "W8A16", progress=progress)
    changed = {key: value * 2 for key, value in parts["model-00002-of-00002.safetensors"].items()}
    builders.write(tmp_path / "model" / "model-00002-of-00002.safetensors", changed)
    (tmp_path / "model" / "README.md").write_text("What it is.")
    resumed = going_on(tmp_path / "out", caplog, source=tmp_path / "model")
    assert 0 < resumed < 14
    assert f"{14 - resumed} tensors made of it are made again" in caplog.text
    assert_same(load(tmp_path / "model", "W8A16"), load(tmp_path / "out"))


def test_pieces_of_a_shard_that_did_not_change_are_gone_on_with(tmp_path, caplog, monkeypatch):
    """Every tensor is in pieces, none in a batch."""
    tensors = builders.model("qwen3", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    parts = {
        f"model-0000{i + 1}-of-00002.safetensors": {
            key: value for key, value in tensors.items() if (".layers.1." in key) == bool(i)
        }
        for i in range(2)
    }
    builders.write_sharded(tmp_path / "model", parts)
    progress, _ = interrupt_after(14)
    with monkeypatch.context() as patched:
        patched.setattr(orbax_store.TreeWriter, "cut", lambda writer: None)
        patched.setattr(journal.Pieces, "tick", lambda pieces: pieces._keep())
        patched.setattr(orbax_store.TreeWriter, "flush", lambda writer: None)
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "model", tmp_path / "out", "W8A16", progress=progress)
    lines = (tmp_path / "out.fdq-tmp" / "journal").read_text().splitlines()[1:]
    assert lines and not any("batches" in line for line in lines)
    last = "model-00002-of-00002.safetensors"
    builders.write(tmp_path / "model" / last, {k: v * 2 for k, v in parts[last].items()})
    made, done = [], conversion.stream.Job._done

    def counted(job, tensor, part):
        made.append(".".join(tensor.path))
        return done(job, tensor, part)

    monkeypatch.setattr(conversion.stream.Job, "_done", counted)
    going_on(tmp_path / "out", caplog, source=tmp_path / "model")
    assert f"{last} of the source has changed" in caplog.text
    assert "layers.0.mlp.down_proj.kernel" not in made
    assert "layers.1.self_attn.qkv_proj.kernel" in made
    assert_same(load(tmp_path / "model", "W8A16"), load(tmp_path / "out"))


def test_pieces_for_which_there_is_no_room_are_not_kept(tmp_path, caplog, monkeypatch):
    """Once said, and the conversion goes on: batches take less."""
    monkeypatch.setattr(conversion, "FLUSH_SECONDS", 0.0)

    def full(array):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        journal, "np", types.SimpleNamespace(**vars(np) | {"ascontiguousarray": full})
    )
    convert(SOURCE, tmp_path / "out", "W8A16")
    told = [one.message for one in caplog.records if "could not be written" in one.message]
    assert len(told) == 1 and "out.fdq-tmp/pieces/0: could not be written: No space" in told[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert_same(load(SOURCE, "W8A16"), load(tmp_path / "out"))


def test_a_disk_without_hard_links(tmp_path, monkeypatch):
    asked = []

    def link(source, destination):
        asked.append(source)
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(orbax_store.os, "link", link)
    convert(SOURCE, tmp_path / "out", "W8A16")
    assert asked
    assert_same(load(SOURCE, "W8A16"), load(tmp_path / "out"))


def test_what_counts_as_done_where_room_is_asked_for(tmp_path):
    """Links once, pieces not at all: batches take their place."""
    for name in ("pieces", "weights"):
        (tmp_path / name).mkdir()
    (tmp_path / "pieces" / "0").write_bytes(b"x" * 1000)
    (tmp_path / "weights" / "a").write_bytes(b"x" * 100)
    os.link(tmp_path / "weights" / "a", tmp_path / "weights" / "b")
    assert commit._bytes_done(tmp_path) == 100


def test_a_sync_that_fails_and_a_readme_that_came(tmp_path, monkeypatch, caplog):
    shutil.copytree(SOURCE, tmp_path / "model")

    def fails(folder):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(commit, "_sync", fails)
        with pytest.raises(OSError, match="Input/output error") as error:
            convert(tmp_path / "model", tmp_path / "out", "W8A16")
    assert "Kept 18 of 18 tensors (100% of the bytes)" in notes(error)
    (tmp_path / "model" / "README.md").write_text("What it is.")
    assert going_on(tmp_path / "out", caplog, source=tmp_path / "model") == TENSORS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_end_it_like_an_interrupt(tmp_path, number):
    def usual(*_):
        raise AssertionError("the handler of before")

    progress, _ = interrupt_after(5, by=number)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(stopping.Stopped, match=KEPT.format(5)) as error:
            convert(SOURCE, tmp_path / "out", "W8A16", progress=progress)
        assert error.value.number == number
        assert signal.getsignal(number) is signal.SIG_DFL
        signal.signal(number, usual)  # somebody else's is left alone
        progress, _ = interrupt_after(2, by=number)
        with pytest.raises(AssertionError, match="the handler of before"):
            convert(SOURCE, tmp_path / "out", "W8A16", progress=progress)
    finally:
        signal.signal(number, before)


def test_another_job_does_not_take_the_place_of_one_that_was_stopped(tmp_path, caplog):
    progress, _ = interrupt_after(4)
    shutil.copytree(SOURCE, tmp_path / "model")
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "model", tmp_path / "out", "W8A16", progress=progress)
    holds = r"out\.fdq-tmp: holds 4 finished tensors of a conversion that was stopped, and cannot "
    with pytest.raises(
        FileExistsError, match=holds + r".*its scheme was 'W8A16', and is 'W4A16-g16'"
    ):
        convert(tmp_path / "model", tmp_path / "out", "W4A16-g16")
    with pytest.raises(FileExistsError, match="holds the work of a conversion that was stopped"):
        save({"a": np.ones(2, np.float32)}, tmp_path / "out")
    os.utime(tmp_path / "model" / "model.safetensors", (0, 0))
    with pytest.raises(FileExistsError, match=r"model\.safetensors of the source has changed"):
        convert(tmp_path / "model", tmp_path / "out", "W8A16")
    assert going_on(tmp_path / "out", caplog, scheme="W4A16-g16", overwrite=True) == 0
    assert "starting anew: its source was" in caplog.text
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["model", "out"]


def test_what_is_kept_is_there_after_a_kill_at_any_batch(tmp_path, caplog, monkeypatch):
    """The same bytes come out however often it was stopped."""
    monkeypatch.setattr(orbax_store, "MIN_BATCH_BYTES", 1)
    for count in (1, 5, 2, 7):
        progress, _ = interrupt_after(count)
        with pytest.raises(KeyboardInterrupt):
            convert(SOURCE, tmp_path / "out", "W8A16", progress=progress)
    assert going_on(tmp_path / "out", caplog) == 15
    convert(SOURCE, tmp_path / "whole", "W8A16")
    assert_same(load(tmp_path / "whole"), load(tmp_path / "out"))
    assert conversion.FLUSH_SECONDS <= 10


def test_a_journal_that_nobody_can_read_is_not_thrown_away(tmp_path, caplog):
    progress, _ = interrupt_after(4)
    with pytest.raises(KeyboardInterrupt):
        convert(SOURCE, tmp_path / "out", "W8A16", progress=progress)
    journal = tmp_path / "out.fdq-tmp" / "journal"
    text = journal.read_text()
    journal.write_text(text.replace('"int8"', '"int77"'))
    with pytest.raises(FileExistsError, match="cannot be read .*drop it with overwrite=True"):
        convert(SOURCE, tmp_path / "out", "W8A16")
    journal.write_text(text)
    assert going_on(tmp_path / "out", caplog) == 4


def test_what_was_damaged_meanwhile_is_found_and_made_anew(tmp_path, monkeypatch):
    def fails(folder):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="Input/output"):
        patched.setattr(commit, "_sync", fails)
        convert(SOURCE, tmp_path / "out", "W8A16")
    for path in (tmp_path / "out.fdq-tmp" / "weights").rglob("d/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(CheckpointError):
        convert(SOURCE, tmp_path / "out", "W8A16")
    assert not (tmp_path / "out.fdq-tmp").exists()
    convert(SOURCE, tmp_path / "out", "W8A16")
    assert_same(load(SOURCE, "W8A16"), load(tmp_path / "out"))
