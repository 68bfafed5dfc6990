"""What loading holds in memory: of floats a tensor at a time, of what is quantized a batch."""

import os
import pathlib
import platform
import subprocess
import sys
import weakref

import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp1

from fdq.models import CONFIGS, Decoder
from fdq_checkpoints import convert, inspect, load, save
from fdq_checkpoints.store import host_memory, orbax_store, restore
from tests.checkpoints import builders


class Held:
    """Bytes of the arrays that a reader has given out and somebody still holds, at their peak."""

    def __init__(self, monkeypatch):
        self.now = self.peak = self.calls = 0
        read = orbax_store.TreeReader.read

        def counted(reader, names):
            found = read(reader, names)
            self.calls += 1
            for array in found.values():
                self.now += array.nbytes
                weakref.finalize(array, self.released, array.nbytes)
            self.peak = max(self.peak, self.now)
            return found

        monkeypatch.setattr(orbax_store.TreeReader, "read", counted)

    def released(self, nbytes):
        self.now -= nbytes


@pytest.mark.parametrize("kind", ["fdq checkpoint", "Orbax tree"])
def test_floats_are_read_and_quantized_a_tensor_at_a_time(tmp_path, kind, monkeypatch):
    model = load(builders.MODELS / "qwen3_moe")
    if kind == "Orbax tree":
        ocp1.save(tmp_path / "float", nnx.to_pure_dict(nnx.state(model)))
    else:
        save(model, tmp_path / "float")
    table = inspect(tmp_path / "float")
    held = Held(monkeypatch)
    quantized = load(tmp_path / "float", {"*.experts": "W8A16", "*": "W8A16"})
    largest = max(row.nbytes for row in table.rows)
    # On the CPU, what is not quantized may stay the array that was read.
    stays = sum(row.nbytes for row in table.rows if "_proj" not in row.path)
    assert held.peak <= 2 * largest + stays < table.nbytes / 2, (held.peak, largest, stays)
    assert quantized is not None and held.calls == len(table.rows)


def test_what_is_quantized_is_read_in_batches(tmp_path, monkeypatch):
    convert(builders.MODELS / "qwen3_moe", tmp_path / "out", "W8A16")
    table = inspect(tmp_path / "out")
    sizes = []
    read = orbax_store.TreeReader.read

    def counted(reader, names):
        found = read(reader, names)
        sizes.append(sum(array.nbytes for array in found.values()))
        return found

    monkeypatch.setattr(orbax_store.TreeReader, "read", counted)
    monkeypatch.setattr(restore, "MIN_BATCH_BYTES", 1)
    monkeypatch.setattr(restore, "BATCHES", 4)
    load(tmp_path / "out")
    largest = max(row.nbytes for row in table.rows)
    assert sum(sizes) == table.nbytes and 3 <= len(sizes) <= 10
    assert max(sizes) <= max(table.nbytes // 4, largest)


def test_what_is_freed_while_a_model_is_quantized_goes_back_to_the_system(monkeypatch):
    """A C library that keeps it holds several times what is in use."""
    trimmed, tensors = [], []
    monkeypatch.setattr(host_memory, "_malloc_trim", lambda: trimmed.append)
    monkeypatch.setattr(host_memory, "TRIM_BYTES", 1)
    load(builders.MODELS / "qwen3", "W8A16", progress=lambda *told: tensors.append(told))
    assert len(trimmed) == len(tensors) > 10
    monkeypatch.setattr(host_memory, "_malloc_trim", lambda: None)  # not glibc
    load(builders.MODELS / "qwen3", "W8A16")


def test_a_c_library_that_cannot_give_memory_back_is_no_error(monkeypatch):
    def none(_):
        raise OSError("there is no such library")

    host_memory._malloc_trim.cache_clear()
    monkeypatch.setattr(host_memory.ctypes, "CDLL", none)
    assert host_memory._malloc_trim() is None
    monkeypatch.undo()
    host_memory._malloc_trim.cache_clear()
    if sys.platform == "linux" and "glibc" in platform.libc_ver():
        assert host_memory._malloc_trim() is not None


def peak(folder, scheme, small):
    root = pathlib.Path(__file__).parents[2]
    folders = os.pathsep.join([str(root), str(root / "checkpoints")])
    environment = os.environ | {"PYTHONPATH": folders, "JAX_PLATFORMS": "cpu"}
    script = pathlib.Path(__file__).with_name("peak_memory.py")
    done = subprocess.run(
        [sys.executable, script, folder, scheme, small],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return int(done.stdout.split()[-1])


def written(folder, *, layers, width):
    """A random model in bfloat16: as an fdq checkpoint, as an Orbax tree, and quantized."""
    config = CONFIGS["ernie-4.5-0.3b"].replace(
        vocab_size=2048,
        hidden_size=width,
        intermediate_size=3 * width,
        num_layers=layers,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        dtype="bfloat16",
    )
    model = Decoder(config, rngs=nnx.Rngs(params=0))
    save(model, folder / "float")
    ocp1.save(folder / "orbax", nnx.to_pure_dict(nnx.state(model)))
    convert(folder / "float", folder / "w8", "W8A16")
    return inspect(folder / "float").nbytes, inspect(folder / "w8").nbytes


@pytest.mark.slow
def test_the_peak_of_loading_200_megabytes(tmp_path):
    floats, quantized = written(tmp_path / "large", layers=9, width=1024)
    written(tmp_path / "small", layers=1, width=128)
    assert floats > 190e6
    layer = (floats - 2048 * 1024 * 2) / 9
    for name in ("float", "orbax"):
        found = peak(tmp_path / "large" / name, "W8A16", tmp_path / "small" / name)
        assert found <= quantized + layer + 256e6, f"{name}: {found:,}"
    # The search of 4 bits holds more at a time, and its result is half as large.
    found = peak(tmp_path / "large" / "float", "W4A16", tmp_path / "small" / "float")
    assert found <= quantized / 2 + layer + 256e6, f"W4A16: {found:,}"
    found = peak(tmp_path / "large" / "w8", "none", tmp_path / "small" / "w8")
    assert found <= quantized + layer + 100e6, f"quantized: {found:,}"
