"""Conversions that are interrupted: what is kept, what is said, and how they go on."""

import json
import os
import pathlib
import signal

import pytest

from fdq_checkpoints import conversion, convert, load, slabs
from fdq_checkpoints.store import commit, journal, orbax_store
from tests.checkpoints import builders
from tests.checkpoints.test_stored_trees import assert_same

SOURCE = builders.MODELS / "qwen3"
TENSORS = 18


@pytest.fixture(autouse=True)
def listens():
    """A run in the background of a shell inherits that Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_after(count, *, by=None):
    """A progress callback that presses Ctrl-C after so many tensors, and the paths that it saw."""
    seen = []

    def progress(done, total, path):
        del done, total
        seen.append(path)
        if len(seen) == count:
            os.kill(os.getpid(), by or signal.SIGINT)

    return progress, seen


def batches(pending):
    lines = (pending / "journal").read_text().splitlines()
    return [len(json.loads(line).get("tensors", [])) for line in lines[1:]]


def test_an_interrupt_keeps_what_is_finished_and_says_how_to_go_on(tmp_path):
    pending = tmp_path / "out.fdq-tmp"
    for count, kept in ((4, 4), (3, 7)):
        progress, _ = interrupt_after(count)
        message = (
            rf"^Kept {kept} of {TENSORS} tensors \(\d+% of the bytes\) in {pending}\. The same"
        )
        with pytest.raises(KeyboardInterrupt, match=message):
            convert(SOURCE, tmp_path / "out", "W8A16", progress=progress)
        assert sum(batches(pending)) == kept
    progress, seen = interrupt_after(0)
    convert(SOURCE, tmp_path / "out", "W8A16", progress=progress)
    assert len(seen) == TENSORS - 7
    assert_same(load(SOURCE, "W8A16"), load(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupt_before_anything_is_finished_says_so(tmp_path, monkeypatch):
    def pressed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion.saving, "write_tensor", pressed)
    with pytest.raises(KeyboardInterrupt, match="^Nothing was finished yet; the same call starts"):
        convert(SOURCE, tmp_path / "out", "W8A16")


def test_an_interrupt_while_a_batch_is_written_waits_for_it(tmp_path, monkeypatch):
    saved = orbax_store.ocp.partial.save

    def pressed(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        saved(*arguments)

    monkeypatch.setattr(orbax_store.ocp.partial, "save", pressed)
    monkeypatch.setattr(orbax_store, "MIN_BATCH_BYTES", 1)
    with pytest.raises(KeyboardInterrupt, match=rf"^Kept 1 of {TENSORS} tensors"):
        convert(SOURCE, tmp_path / "out", "W8A16")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_after_the_last_tensor_keeps_all(tmp_path, monkeypatch):
    sync = commit._sync

    def pressed(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(commit, "_sync", pressed)
    with pytest.raises(KeyboardInterrupt, match=r"out\.fdq-tmp\. The same call goes on"):
        convert(SOURCE, tmp_path / "out", "W8A16")
    monkeypatch.setattr(commit, "_sync", sync)
    progress, seen = interrupt_after(0)
    convert(SOURCE, tmp_path / "out", "W8A16", progress=progress)
    assert seen == []
    assert_same(load(SOURCE, "W8A16"), load(tmp_path / "out"))


def pieces(pending):
    """By path how many columns are on disk that no batch has."""
    lines = map(json.loads, (pending / "journal").read_text().splitlines()[1:])
    return {".".join(one["path"]): one["stop"] for line in lines for one in line.get("pieces", [])}


def test_what_is_old_is_written_however_small_it_is(tmp_path, monkeypatch, caplog):
    """Nobody flushes after a kill: what is finished must have been written by time."""
    clock = [0.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(orbax_store.TreeWriter, "flush", lambda writer: None)  # as after a kill
    kept = []

    def progress(done, total, path):
        kept.append(len(pieces(tmp_path / "out.fdq-tmp")))
        clock[0] += 2.0
        if len(kept) == 8:
            raise RuntimeError(path)

    with pytest.raises(RuntimeError):
        convert(SOURCE, tmp_path / "out", "W8A16", progress=progress)
    # Every third tensor is more than five seconds after the last one that was written.
    assert kept == [0, 0, 0, 3, 3, 3, 6, 6]
    monkeypatch.undo()
    damaged = tmp_path / "out.fdq-tmp" / "pieces" / "1"  # with the fourth tensor to the sixth
    damaged.write_bytes(b"\0" * damaged.stat().st_size)
    made = []
    done = conversion.stream.Job._done

    def counted(self, tensor, part):
        made.append(".".join(tensor.path))
        return done(self, tensor, part)

    monkeypatch.setattr(conversion.stream.Job, "_done", counted)
    convert(SOURCE, tmp_path / "out", "W8A16")
    assert f"going on, kept 3 of {TENSORS} tensors" in caplog.text
    assert len(set(made)) == TENSORS - 3
    assert "layers.0.mlp.down_proj.kernel" not in made
    assert_same(load(SOURCE, "W8A16"), load(tmp_path / "out"))
    assert "pieces" not in os.listdir(tmp_path / "out")


def test_columns_of_the_matrix_in_the_making_are_kept(tmp_path, monkeypatch):
    """One matrix may take longer than what may be lost."""
    clock = [0.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(slabs, "SLAB_WEIGHTS", 1)
    monkeypatch.setattr(slabs, "SLAB_COLUMNS", 8)
    monkeypatch.setattr(slabs, "_cores", lambda: 1)
    monkeypatch.setattr(slabs, "WAITING_BYTES", 0)  # none is made before the last is taken
    part = conversion.stream.Job._quantized
    made = []

    def slow(self, tensor, columns):
        clock[0] += 3.0
        made.append((tensor.path[-2], columns.start))
        if len(made) == 6:
            raise RuntimeError
        return part(self, tensor, columns)

    monkeypatch.setattr(conversion.stream.Job, "_quantized", slow)
    with pytest.raises(RuntimeError) as error:
        convert(SOURCE, tmp_path / "out", "W4A16-g16")
    assert "and 62% of the next" in error.value.__notes__[0]
    assert pieces(tmp_path / "out.fdq-tmp")["layers.0.mlp.down_proj.kernel"] == 40
    convert(SOURCE, tmp_path / "out", "W4A16-g16")
    assert made[6:10] == [("down_proj", 40), ("down_proj", 48), ("down_proj", 56), (made[9][0], 0)]
    monkeypatch.undo()
    assert_same(load(SOURCE, "W4A16-g16"), load(tmp_path / "out"))


@pytest.mark.parametrize("done", [0, 1])
def test_a_kill_while_batches_are_put_together_loses_none(tmp_path, monkeypatch, done):
    """Orbax merges them in place."""
    monkeypatch.setattr(orbax_store, "MIN_BATCH_BYTES", 1)
    finalize = orbax_store.ocp.partial.finalize

    def killed(path):
        if done:
            finalize(path)
        else:
            batch = min(pathlib.Path(path + ".partial_save").iterdir())
            batch.rename(batch.with_name("moved"))
        raise SystemExit

    monkeypatch.setattr(orbax_store.ocp.partial, "finalize", killed)
    with pytest.raises(SystemExit):
        convert(SOURCE, tmp_path / "out", "W8A16")
    monkeypatch.undo()
    progress, seen = interrupt_after(0)
    convert(SOURCE, tmp_path / "out", "W8A16", progress=progress)
    assert seen == []
    assert_same(load(SOURCE, "W8A16"), load(tmp_path / "out"))
    assert not [name for name in os.listdir(tmp_path / "out") if name.startswith("weights.")]


@pytest.mark.parametrize("by_time", [False, True])
def test_the_matrices_of_a_stack_are_kept_one_by_one(tmp_path, monkeypatch, by_time):
    """The experts of a large layer take minutes."""
    source = builders.MODELS / "qwen3_moe"
    quantize = conversion.stream.Assigned.tensor
    clock = [0.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: clock[0])

    def slow(self, array, row, paths, *, inputs, index=None):
        if index == 3 and "gate_up" in row.path and stop:
            raise SystemExit if by_time else KeyboardInterrupt
        if index is not None:
            seen.append((row.path, index))
            clock[0] += 3.0
        return quantize(self, array, row, paths, inputs=inputs, index=index)

    monkeypatch.setattr(conversion.stream.Assigned, "tensor", slow)
    # A kill, after which nothing is flushed: what was written by time is left as it is.
    monkeypatch.setattr(commit.shutil, "rmtree", lambda *_, **__: None)
    seen, stop = [], True
    with pytest.raises(SystemExit if by_time else KeyboardInterrupt) as raised:
        convert(source, tmp_path / "out", "W4A16-g16", method="absmax", progress=None)
    # By time: a stack came before this one, whose first matrix and third were then due.
    kept = 3
    assert by_time or "and 3 of the 8 matrices of the next in" in str(raised.value)
    done = sum(batches(tmp_path / "out.fdq-tmp"))
    assert done == 3, "what was made before the stack does not wait for it"
    stack = seen[-1][0]
    monkeypatch.undo()
    monkeypatch.setattr(conversion.stream.Assigned, "tensor", slow)
    seen, stop = [], False
    convert(source, tmp_path / "out", "W4A16-g16", method="absmax")
    assert sorted(index for path, index in seen if path == stack) == list(range(kept, 8))
    assert_same(load(source, "W4A16-g16", method="absmax"), load(tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "fdq.json",
        "weights",
    ]


def test_a_line_of_the_journal_that_was_cut_does_not_spoil_the_next(tmp_path):
    pending = tmp_path / "out.fdq-tmp"
    progress, _ = interrupt_after(4)
    with pytest.raises(KeyboardInterrupt):
        convert(SOURCE, tmp_path / "out", "W8A16", progress=progress)
    with open(pending / "journal", "a") as file:
        file.write('{"batches": ["a')
    for count, kept in ((2, 6), (2, 8)):
        progress, _ = interrupt_after(count)
        with pytest.raises(KeyboardInterrupt, match=f"^Kept {kept} of"):
            convert(SOURCE, tmp_path / "out", "W8A16", progress=progress)
