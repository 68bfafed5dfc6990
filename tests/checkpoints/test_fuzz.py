"""Random damage to headers, indexes, manifests and configs: read as before, or refused in a line.

Each case is a number: `pytest -k "config and 17"` repeats it.
"""

import contextlib
import json
import pathlib
import random
import resource
import shutil
import struct
import time

import numpy as np
import pytest

from fdq_checkpoints import CheckpointError, inspect, load, save
from fdq_checkpoints.sources import open_source
from fdq_checkpoints.store import manifest
from tests.checkpoints import builders, foreign
from tests.covering import covering

SECONDS, BYTES = 2.0, 10**9
NASTY = (
    *(None, True, False, -1, 0, 1, 3, 2**31, 2**63, -(2**70), 10**30, 0.5, 1e308, float("nan")),
    *("", "../../etc/passwd", "/etc/passwd", "\x00\x1b[31m", "a" * 5000, "int4", "1", "\ud800"),
    *([], {}, [[]], [0], [-1], [2**40, 2**40], {"": {}}, [None] * 100),
)


def places(value, path=()):
    """The path of every value below a JSON value."""
    yield path
    inner = value.items() if isinstance(value, dict) else ()
    inner = enumerate(value) if isinstance(value, list) else inner
    for key, below in inner:
        yield from places(below, (*path, key))


def changed_value(content, rng):
    """A JSON value with one of its values replaced, dropped, doubled or renamed."""
    path = rng.choice([place for place in places(content) if place])
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    key = path[-1]
    kind = rng.randrange(4)
    if kind == 0 and isinstance(parent, dict):
        parent[rng.choice([key.upper(), key + "_", "x"])] = parent.pop(key)
    elif kind == 1:
        del parent[key]
    elif kind == 2 and isinstance(parent, list):
        parent.append(parent[key])
    else:
        parent[key] = rng.choice(NASTY)
    return content


def changed_bytes(data, rng):
    """Bytes with some flipped, dropped, doubled or put in."""
    data = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data))
        kind = rng.randrange(4)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + rng.randrange(1, 40)]
        elif kind == 2:
            data[at:at] = data[at : at + rng.randrange(1, 40)]
        else:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
        if not data:
            break
    return bytes(data)


def damage_json(path, rng):
    text = path.read_text()
    if rng.random() < 0.4:
        path.write_bytes(changed_bytes(text.encode(), rng))
    else:
        # With lone surrogates and NaN, as programs that do not look write them.
        path.write_text(json.dumps(changed_value(json.loads(text), rng)))


def damage_header(path, rng):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.3:
        path.write_bytes(changed_bytes(data[: 8 + length], rng) + rest)
    elif rng.random() < 0.2:
        path.write_bytes(data[: rng.randrange(len(data))])
    else:
        changed = json.dumps(changed_value(json.loads(header), rng)).encode()
        path.write_bytes(builders.file_bytes(changed, rest))


def damage_manifest(path, rng):
    if rng.random() < 0.3:
        path.write_bytes(changed_bytes(path.read_bytes(), rng))
        return
    content = json.loads(path.read_text())
    content.pop("sha256")
    content = changed_value(content, rng)
    with contextlib.suppress(ValueError):  # NaN has no hash: one that does not fit
        content["sha256"] = manifest._digest(content)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pathlib.Path:
    folder, rng = tmp_path_factory.mktemp("fuzz"), np.random.default_rng(0)
    tensors = builders.model("llama", folder / "model")
    builders.shard(folder / "model", tensors)
    shutil.copytree(folder / "model", folder / "single")
    (folder / "single" / "model.safetensors.index.json").unlink()
    for path in (folder / "single").glob("model-*"):
        path.unlink()
    builders.write(folder / "single" / "model.safetensors", tensors)
    shutil.copytree(folder / "single", folder / "tokenized")
    stops = {"eos_token_id": [1, 2], "bos_token_id": 0, "do_sample": True, "temperature": 0.6}
    (folder / "tokenized" / "generation_config.json").write_text(json.dumps(stops))
    foreign.model("packed", folder / "quantized", rng)
    save({"a": np.ones((4, 8), np.float32), "b": {"c": np.arange(3)}}, folder / "tree")
    return folder


KINDS = {
    "config": ("single", "config.json", damage_json),
    "header": ("single", "model.safetensors", damage_header),
    "index": ("model", "model.safetensors.index.json", damage_json),
    "quantization": ("quantized", "config.json", damage_json),
    "codes": ("quantized", "model.safetensors", damage_header),
    "manifest": ("tree", "fdq.json", damage_manifest),
    "companion": ("tokenized", "generation_config.json", damage_json),
    "orbax": ("tree", "weights/**/_METADATA", damage_json),
}


@contextlib.contextmanager
def no_more_memory_than(nbytes):
    status = pathlib.Path("/proc/self/status").read_text()
    now = int(status.split("VmData:")[1].split()[0]) * 1024
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (now + nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


CASES = [(kind, block) for kind in KINDS for block in range(5)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("kind", "block"), covering(CASES, lambda case: case[:1]))
def test_damage_is_refused_in_a_line(kind, block, whole, tmp_path, recwarn):
    source, name, damage = KINDS[kind]
    for number in range(12 * block, 12 * block + 12):
        folder = tmp_path / str(number)
        shutil.copytree(whole / source, folder)
        damage(next(folder.glob(name)), random.Random(f"{kind} {number}"))
        start = time.perf_counter()
        try:
            with no_more_memory_than(BYTES):
                if source == "tree":
                    inspect(folder, verify=True)
                elif source == "tokenized":
                    load(folder)
                else:
                    with open_source(folder):
                        pass
        except (CheckpointError, FileNotFoundError) as error:
            text = str(error)
            assert "\n" not in text and text.isprintable() and len(text) < 1500, (number, text)
            assert str(folder) in text, (number, text)
        assert time.perf_counter() - start < SECONDS, number
