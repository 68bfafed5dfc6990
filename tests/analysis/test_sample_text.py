"""The text that comes from the standard library: its split, its hash, its errors."""

import dataclasses
import hashlib
import pathlib
import sys

import pytest

from fdq.analysis import sample_text


@pytest.fixture
def library(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder like a standard library: 200 small modules, and files that must be left out."""
    for i in range(200):
        path = tmp_path / ("package" if i % 2 else ".") / f"module_{i}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# module {i}\n", encoding="utf-8")
    for left_out in (
        "test/test_a.py",
        "package/tests/test_b.py",
        "site-packages/numpy/core.py",
        "encodings/cp037.py",
        "idlelib/idle_test/c.py",
        "config-3.12-linux/d.py",
        "_sysconfigdata__linux.py",
        "package/__pycache__/e.py",
    ):
        path = tmp_path / left_out
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("left out", encoding="utf-8")
    return tmp_path


def test_the_splits_are_disjoint_and_cover_the_library(library):
    training = sample_text.source_files(held_out=False, root=library)
    held_out = sample_text.source_files(held_out=True, root=library)
    names = [name for name, _ in training + held_out]
    expected = {("package/" if i % 2 else "") + f"module_{i}.py" for i in range(200)}
    assert len(names) == len(set(names))
    assert set(names) == expected
    assert 1 <= len(held_out) <= 30  # 10 expected


def test_a_file_is_held_out_by_the_hash_of_its_path():
    names = [f"folder/file_{i}.py" for i in range(100)]
    by_definition = [n for n in names if int(hashlib.sha256(n.encode()).hexdigest(), 16) % 20 == 0]
    assert by_definition
    assert [n for n in names if sample_text.is_held_out(n)] == by_definition


def test_files_are_sorted_by_posix_path_and_joined_by_newlines(library):
    training = sample_text.training_text(root=library)
    files = sample_text.source_files(held_out=False, root=library)
    assert list(training.files) == sorted(training.files)
    assert training.text == "\n".join(text for _, text in files)


def test_the_text_carries_its_hash_and_python(library):
    sample = sample_text.heldout_text(root=library)
    assert sample.sha256 == hashlib.sha256(sample.text.encode()).hexdigest()
    assert sample.python == ".".join(map(str, sys.version_info[:3]))
    assert sample == sample_text.heldout_text(root=library)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sample.text = ""


def test_line_ends_and_file_order_on_disk_do_not_change_the_hash(library, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for path in sorted(library.rglob("*.py"), reverse=True):
        target = other / path.relative_to(library)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    ours, theirs = (sample_text.training_text(root=root) for root in (library, other))
    assert ours.sha256 == theirs.sha256


def test_files_that_are_not_utf8_are_left_out(library):
    name = sample_text.source_files(held_out=False, root=library)[0][0]
    (library / name).write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9\n")
    assert name not in sample_text.training_text(root=library).files


def test_max_bytes_counts_bytes_and_splits_no_character(tmp_path):
    name = next(f"m{i}.py" for i in range(1000) if sample_text.is_held_out(f"m{i}.py"))
    (tmp_path / name).write_text("aéé", encoding="utf-8")
    texts = [sample_text.heldout_text(max_bytes=n, root=tmp_path).text for n in (1, 2, 3, 4, 99)]
    assert texts == ["a", "a", "aé", "aé", "aéé"]


def test_files_lists_only_what_the_text_holds(library):
    everything = sample_text.heldout_text(max_bytes=None, root=library)
    start = sample_text.heldout_text(max_bytes=20, root=library)
    assert everything.text.startswith(start.text)
    assert start.files == everything.files[: len(start.files)]
    assert len(start.files) == 2  # a module has 11 to 13 bytes


@pytest.mark.parametrize("max_bytes", [0, -1])
def test_max_bytes_must_be_positive(max_bytes, library):
    with pytest.raises(ValueError, match=rf"`max_bytes` \(={max_bytes}\) must be positive"):
        sample_text.heldout_text(max_bytes=max_bytes, root=library)


def test_a_missing_folder_is_named(tmp_path):
    missing = tmp_path / "lib"
    with pytest.raises(FileNotFoundError, match=r"looked in .*lib, but it is not a folder"):
        sample_text.training_text(root=missing)


def test_a_folder_without_sources_is_named(tmp_path):
    (tmp_path / "os.pyc").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"but it has no \.py files.*without sources"):
        sample_text.heldout_text(root=tmp_path)


def test_a_zipped_library_is_recognised(tmp_path, monkeypatch):
    zipped = tmp_path / "python312.zip"
    zipped.write_bytes(b"PK")
    monkeypatch.setattr(sample_text.sysconfig, "get_path", lambda _: str(zipped))
    with pytest.raises(FileNotFoundError, match=r"python312\.zip.*from a zip file"):
        sample_text.training_text()


def test_the_running_python_has_text():
    held_out = sample_text.heldout_text()
    training = sample_text.training_text()
    assert len(held_out.text.encode()) == sample_text.DEFAULT_HELDOUT_BYTES
    assert len(training.text) > 5e6
    assert set(held_out.files).isdisjoint(training.files)
    assert not any(name.startswith(("test/", "site-packages/")) for name in training.files)


@pytest.mark.skipif(sys.version_info[:3] != (3, 12, 1), reason="figures are of CPython 3.12.1")
def test_the_reference_hash_is_that_of_cpython_3_12_1():
    assert sample_text.heldout_text().sha256 == sample_text.REFERENCE_SHA256


def test_rows_of_a_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij" * 10, "utf-8")
    seen = []

    def encode(text):
        seen.append(len(text))
        return [7, *map(ord, text)]

    rows = sample_text.file_rows(encode, path, 2, length=3)
    assert rows.tolist() == [[7, 97, 98], [99, 100, 101]]
    assert seen == [96]
    assert sample_text.file_rows(encode, path, 9, length=200).shape == (1, 101)
    for data, least, problem in (
        (b"ab", 16, "text.txt: 3 tokens are too few for healing; give at least 16, better 64"),
        (b" \n", 1, "text.txt: empty; healing needs text"),
        (b"\xff\xfe", 1, "text.txt: not UTF-8 text"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=problem):
            sample_text.file_rows(encode, path, 16, length=4, least=least, purpose="healing")
