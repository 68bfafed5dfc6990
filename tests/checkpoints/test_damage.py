"""Damaged, edited and newer fdq checkpoints are refused, never read wrongly."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from fdq.quantizers import quantize_array
from fdq.schemes.scheme import WeightSpec
from fdq_checkpoints import CheckpointError, inspect, load, save, verify
from fdq_checkpoints.store import manifest

# When one of several concurrent reads fails, Orbax 0.12.8 closes its event loop under the others,
# whose callbacks then raise where nobody can catch them (2026-11-22).
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("damage") / "tree"
    w = jnp.asarray(np.random.default_rng(2).normal(size=(64, 32)).astype(np.float32))
    q = quantize_array(w, WeightSpec.parse("W4-g64"), method="absmax")
    (path.parent / "tokenizer.json").write_text('{"version": "1.0"}')
    save({"w": q, "b": jnp.arange(9.0)}, path, files=[path.parent / "tokenizer.json"])
    return path


@pytest.fixture
def copy(stored, tmp_path) -> pathlib.Path:
    return shutil.copytree(stored, tmp_path / "copy")


def edit(folder: pathlib.Path, change, *, rehash: bool = True) -> None:
    """Change fdq.json, with a hash that fits again unless told otherwise."""
    path = folder / "fdq.json"
    content = json.loads(path.read_text())
    change(content)
    if rehash:
        content.pop("sha256")
        content["sha256"] = manifest._digest(content)
    path.write_text(json.dumps(content))


def test_every_flipped_byte_of_the_data_is_found(stored, copy):
    files = [path for path in (copy / "weights").rglob("d/*") if path.is_file()]
    assert files
    found = 0
    original = load(stored)
    for path in files:
        data = path.read_bytes()
        for position in np.linspace(0, len(data) - 1, 8).astype(int):
            damaged = bytearray(data)
            damaged[position] ^= 0x10
            path.write_bytes(damaged)
            try:
                loaded = load(copy)
            except CheckpointError:
                found += 1
            else:  # this byte is read by nobody: then all values must be right
                np.testing.assert_array_equal(loaded["w"].codes, original["w"].codes)
                np.testing.assert_array_equal(loaded["w"].scale, original["w"].scale)
                np.testing.assert_array_equal(loaded["b"], original["b"])
        path.write_bytes(data)
    assert found >= 8
    verify(copy)


def test_a_flipped_code_is_named(copy, stored):
    codes = np.asarray(load(stored)["w"].codes).tobytes()
    for path in (copy / "weights").rglob("*"):
        if path.is_file() and codes in (data := path.read_bytes()):
            path.write_bytes(data.replace(codes, bytes([codes[0] ^ 1]) + codes[1:]))
    for check in (load, verify, lambda path: inspect(path, verify=True)):
        with pytest.raises(CheckpointError, match=r"w\.codes: the checksum of its data is not"):
            check(copy)
    assert load(copy, verify=False)["w"].shape == (64, 32)


def test_a_newer_version_is_refused_by_name(copy):
    def newer(content):
        content.update(format_version=2, fdq_version="9.9", surprise=[])

    edit(copy, newer, rehash=False)
    with pytest.raises(CheckpointError, match=r"version 2 is newer than 1.*fdq 9\.9.*Upgrade fdq"):
        load(copy)


def _tensor(content, name):
    return next(tensor for tensor in content["tensors"] if tensor["path"] == [name])


def other_spec(content):
    _tensor(content, "w")["spec"]["format"] = "int2"


def other_group(content):
    _tensor(content, "w")["spec"]["group_size"] = 32


def no_format(content):
    _tensor(content, "w")["spec"]["format"] = "int5"


def unknown_field(content):
    _tensor(content, "w")["spec"]["colour"] = "red"


def other_padding(content):
    _tensor(content, "w")["padding"] = 1


def other_dtype(content):
    _tensor(content, "b")["arrays"]["value"]["dtype"] = "int32"


def other_shape(content):
    _tensor(content, "b")["shape"] = [3, 3]
    _tensor(content, "b")["arrays"]["value"]["shape"] = [3, 3]


def shape_of_nothing(content):
    _tensor(content, "b")["shape"] = [3, 3]


def overflowing_shape(content):
    _tensor(content, "b")["arrays"]["value"]["shape"] = [2**32, 2**32]


def unknown_prng(content):
    _tensor(content, "b")["prng"] = "dice"


def nameless_prng(content):
    _tensor(content, "b")["prng"] = 3


def no_key_data(content):
    _tensor(content, "b")["prng"] = "threefry2x32"


def quantized_key(content):
    _tensor(content, "w")["prng"] = "threefry2x32"


def unknown_dtype(content):
    _tensor(content, "b")["arrays"]["value"]["dtype"] = "float7"


def one_less(content):
    content["tensors"].remove(_tensor(content, "b"))


def one_more(content):
    content["tensors"].append(_tensor(content, "b") | {"path": ["c"]})


def twice(content):
    content["tensors"].append(_tensor(content, "b"))


def other_kind(content):
    content["kind"] = "optimizer"


def model_without_config(content):
    content["kind"] = "model"


def other_format(content):
    content["format"] = "zip"


def unknown_key(content):
    content["surprise"] = 1


def no_path(content):
    _tensor(content, "b").pop("path")


def outside(content):
    content["files"]["../x"] = {"bytes": 1, "sha256": ""}


EDITS = [
    (other_spec, r"w: .*int2.*|impossible"),
    (other_group, r"w: int4 of shape \(64, 32\) has arrays"),
    (no_format, "w: impossible WeightSpec|unknown weight format 'int5'"),
    (unknown_field, "w: impossible WeightSpec .*colour"),
    (other_padding, "padding 0, found .* padding 1"),
    (other_dtype, r"b is float32 \(9,\), fdq.json says int32 \(9,\)"),
    (other_shape, r"b is float32 \(9,\), fdq.json says float32 \(3, 3\)"),
    (shape_of_nothing, r"b: shape \(3, 3\), but its array says \(9,\)"),
    (overflowing_shape, r"b: '\[4294967296, 4294967296\]' is not a shape"),
    (unknown_prng, "b: not the data of a PRNG key"),
    (nameless_prng, "b: prng '3' is not a name"),
    (no_key_data, "b: not the data of a PRNG key"),
    (quantized_key, "w: both quantized and a PRNG key"),
    (unknown_dtype, "b: unknown dtype 'float7'"),
    (one_less, "b is not in fdq.json"),
    (one_more, "has no readable array c"),
    (twice, "two tensors have the same path"),
    (other_kind, "kind 'optimizer' is not one of"),
    (model_without_config, "a model without its config"),
    (other_format, "format is 'zip', expected 'fdq-checkpoint'"),
    (unknown_key, r"unknown keys \['surprise'\]"),
    (no_path, "malformed .KeyError: 'path'"),
    (outside, "'../x' is not a file name"),
]


@pytest.mark.parametrize(("change", "message"), EDITS, ids=[case[0].__name__ for case in EDITS])
def test_an_edited_manifest_is_refused(copy, change, message):
    edit(copy, change)
    with pytest.raises(CheckpointError, match=message):
        load(copy)


def test_an_edit_without_a_new_hash_is_refused(copy):
    edit(copy, lambda content: content.update(scheme="W2"), rehash=False)
    with pytest.raises(CheckpointError, match="does not match its own sha256"):
        load(copy)


MISSING = r"weights/\S+: missing, expected [\d,]+ bytes"
TRUNCATED = r"weights/\S+: [\d,]+ bytes, expected [\d,]+ bytes"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "fdq.json").write_text((f / "fdq.json").read_text()[:-9]),
            "not valid JSON",
        ),
        (lambda f: (f / "fdq.json").write_text(""), "not valid JSON"),
        (lambda f: (f / "fdq.json").unlink(), "Orbax|no config.json"),
        (lambda f: shutil.rmtree(f / "weights"), "weights: missing"),
        (lambda f: next(f.rglob("_METADATA")).unlink(), MISSING),
        (lambda f: next(f.rglob("_METADATA")).write_text("{"), TRUNCATED),
        (lambda f: [shutil.rmtree(d) for d in list(f.rglob("d"))], MISSING),
        (lambda f: (f / "weights/state/manifest.ocdbt").unlink(), MISSING),
        (
            lambda f: [p.write_bytes(p.read_bytes()[:-3]) for p in f.rglob("d/*") if p.is_file()],
            TRUNCATED,
        ),
    ],
    ids=[
        *("truncated manifest", "empty manifest", "no manifest", "no weights", "no metadata"),
        *("truncated metadata", "no data", "no index", "truncated data"),
    ],
)
def test_missing_and_truncated_files(copy, damage, message):
    damage(copy)
    with pytest.raises(CheckpointError, match=message):
        load(copy)


def test_files_beside_the_weights(copy):
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: changed since"):
        verify(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer.json: missing"):
        verify(copy)


def test_already_quantized(copy):
    with pytest.raises(CheckpointError, match="quantized already"):
        load(copy, "W8A16")
