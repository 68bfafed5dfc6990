"""fdq checkpoints of any tree: bit-equal after saving and loading, on any sharding."""

import functools
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from fdq.formats import FORMATS
from fdq.formats.qtensor import QTensor
from fdq.ops.prepared_weight import PREPARED
from fdq.quantizers import quantize_array
from fdq.schemes.scheme import WeightSpec
from fdq_checkpoints import CheckpointError, inspect, load, save, tree_paths, verify

# Every format, and every array that a QTensor can have.
SPECS = [
    *(f"W{name}" for name in ("8", "4", "4-g64", "3", "2", "fp8", "fp8e5m2", "NF4", "CC2")),
    *(
        "W4-asym",
        "W2-asym",
        "W4-affine",
        "W8-g64-affine",
        "Wfp8-tensor",
        "Wfp8-b128",
        "Wfp8-b128-ue8m0",
        "WNF4-dq",
    ),
    *("WMXFP4", "WMXFP8", "WNVFP4"),
]
DTYPES = [
    *(np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.uint8, np.int32, np.bool_),
    *(ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu),
]


def quick(w, name):
    """Quantized without a search, which takes a second per format to compile."""
    spec = WeightSpec.parse(name)
    return quantize_array(w, spec, method="absmax" if FORMATS[spec.format].closed_form else None)


@pytest.fixture(scope="module")
def tree():
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(128, 24)).astype(np.float32))
    stack = jnp.asarray(rng.normal(size=(3, 136, 8)).astype(np.float32))
    return {
        "quantized": {name: quick(w, name) for name in SPECS},
        "experts": quick(stack, "W3-channel"),
        "plain": {
            np.dtype(dtype).name: jnp.asarray(rng.integers(0, 2, (2, 3)).astype(dtype))
            for dtype in DTYPES
        },
        "scalar": jnp.float32(2.5),
        "empty": jnp.zeros((0, 4), jnp.bfloat16),
        "key": jax.random.key(7),
        "host": np.arange(5, dtype=np.int32),
        "a list": [jnp.ones(2), {"x.y/z": jnp.zeros(3)}],
    }


@pytest.fixture(scope="module")
def stored(tree, tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("stored") / "tree"
    save(tree, path)
    return path


def assert_same(a, b):
    """Equal paths, static parts, dtypes, shapes and bits."""
    expected = {tensor.path: tensor.value for tensor in tree_paths.flatten(a)}
    found = {tensor.path: tensor.value for tensor in tree_paths.flatten(b)}
    assert expected.keys() == found.keys()
    for path, value in expected.items():
        other = found[path]
        if isinstance(value, QTensor):
            assert isinstance(other, QTensor), path
            assert (value.spec, value.padding, value.shape) == (
                other.spec,
                other.padding,
                other.shape,
            ), path
        left, right = tree_paths.arrays_of(value), tree_paths.arrays_of(other)
        assert left.keys() == right.keys(), path
        for name in left:
            x, y = map(_bits, (left[name], right[name]))
            assert (x.dtype, x.shape) == (y.dtype, y.shape), (path, name)
            assert x.tobytes() == y.tobytes(), (path, name)


def _bits(array) -> np.ndarray:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    return np.asarray(array)


def test_the_table_covers_every_format():
    # Trellis codes take a search to make: see tests/formats/test_trellis.py.
    others = {name for name in FORMATS if not name.startswith("trellis")}
    assert {WeightSpec.parse(name).format for name in SPECS} == others


@pytest.mark.slow
def test_nested_dicts_without_a_template(tree, stored):
    expected = tree | {"a list": {"0": tree["a list"][0], "1": tree["a list"][1]}}
    loaded = load(stored)
    assert_same(expected, loaded)
    assert jax.random.key_impl(loaded["key"]) == jax.random.key_impl(tree["key"])
    assert type(loaded["plain"]["int8"]) is type(jnp.ones(1))


def test_a_template_brings_its_structure(tree, stored):
    template = jax.eval_shape(lambda: tree)
    loaded = load(stored, template=template)
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    assert_same(tree, loaded)


def test_a_float_template_takes_quantized_tensors(tree, stored):
    floats = jax.tree.map(
        lambda x: jnp.zeros(x.shape) if isinstance(x, QTensor) else x,
        tree,
        is_leaf=lambda x: isinstance(x, QTensor),
    )
    assert_same(tree, load(stored, template=floats))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"scalar": jnp.ones(3)}, r"scalar: stored shape \(\), the template has"),
        (lambda t: t | {"scalar": jnp.int32(1)}, "scalar: stored dtype float32, the template has"),
        (lambda t: t | {"more": jnp.ones(3)}, "has no tensor more"),
        (
            lambda t: {k: v for k, v in t.items() if k != "scalar"},
            "has a tensor scalar that is not expected",
        ),
        (
            lambda t: t | {"experts": t["quantized"]["W8"]},
            "experts: stored shape",
        ),
        (
            lambda t: t | {"quantized": t["quantized"] | {"W4-g64": t["quantized"]["W4"]}},
            "quantized.W4-g64: stored as W4-g64, the template has W4",
        ),
    ],
    ids=["shape", "dtype", "missing", "extra", "experts", "spec"],
)
def test_another_template_is_refused(tree, stored, change, message):
    with pytest.raises(CheckpointError, match=message):
        load(stored, template=change(jax.eval_shape(lambda: tree)))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_restore_onto_another_sharding(tmp_path, axis_type):
    make_mesh = functools.partial(jax.make_mesh, axis_types=(axis_type,) * 2)
    w = np.random.default_rng(1).normal(size=(256, 64)).astype(np.float32)
    q = quantize_array(jnp.asarray(w), WeightSpec.parse("W4-g64"))
    written = NamedSharding(make_mesh((2, 4), ("x", "y")), PartitionSpec("x", "y"))
    tree = {"w": jax.device_put(q, written), "b": jnp.arange(8.0)}
    save(tree, tmp_path / "a")
    mesh = make_mesh((4, 2), ("x", "y"))

    def sharding(path: str, array: jax.ShapeDtypeStruct):
        spec = PartitionSpec("x", "y") if array.shape[0] % 4 == 0 and array.ndim == 2 else None
        return NamedSharding(mesh, spec or PartitionSpec())

    loaded = load(tmp_path / "a", sharding=sharding)
    assert loaded["w"].codes.sharding == NamedSharding(mesh, PartitionSpec("x", "y"))
    assert {shard.data.shape for shard in loaded["w"].codes.addressable_shards} == {(32, 32)}
    assert_same(tree, loaded)
    by_name = {"b": NamedSharding(mesh, PartitionSpec("x"))}
    loaded = load(tmp_path / "a", sharding=by_name)
    assert len(loaded["b"].sharding.device_set) == 8
    assert len(loaded["w"].codes.sharding.device_set) == 1
    template = jax.eval_shape(lambda: tree)
    template["b"] = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=by_name["b"])
    assert load(tmp_path / "a", template=template)["b"].sharding == by_name["b"]
    last = SingleDeviceSharding(jax.devices()[-1])
    assert load(tmp_path / "a", sharding=last)["b"].devices() == {jax.devices()[-1]}
    with pytest.raises(CheckpointError, match=r"no array w.code\. The nearest present name"):
        load(tmp_path / "a", sharding={"w.code": by_name["b"]})


def test_prepared_layouts_are_stored_canonical(tree, tmp_path):
    q = tree["quantized"]["W8"]
    for kind in PREPARED:
        save({"w": kind.of(q)}, tmp_path / kind.layout)
        assert_same({"w": q}, load(tmp_path / kind.layout))
    assert len(PREPARED) > 1


def test_64_bits_stay_on_the_host_rather_than_being_cut(tmp_path):
    save({"step": np.array([2**40])}, tmp_path / "a")
    step = load(tmp_path / "a")["step"]
    assert isinstance(step, np.ndarray) and step.dtype == np.int64 and step[0] == 2**40


def test_inspect_and_verify(tree, stored):
    table = inspect(stored, verify=True)
    assert (
        table.verified
        and table.kind == "params"
        and len(table.rows) == len(tree_paths.flatten(tree))
    )
    rows = {row.path: row for row in table.rows}
    assert rows["quantized.W4"].nbytes == tree["quantized"]["W4"].nbytes
    assert rows["quantized.W4"].bits_per_weight == tree["quantized"]["W4"].bits_per_weight
    assert table.nbytes < table.disk_bytes < 2 * table.nbytes + 300_000
    text = str(table)
    assert "quantized.W4-g64" in text and "checksums verified" in text
    verify(stored)


def test_checkpoints_can_be_moved(stored, tmp_path):
    shutil.copytree(stored, tmp_path / "elsewhere")
    assert_same(load(stored), load(tmp_path / "elsewhere"))


def test_destination_exists(tmp_path):
    save({"a": jnp.ones(3)}, tmp_path / "a")
    with pytest.raises(FileExistsError, match="exists already"):
        save({"a": jnp.zeros(3)}, tmp_path / "a")
    assert load(tmp_path / "a")["a"].sum() == 3
    save({"a": jnp.zeros(3)}, tmp_path / "a", overwrite=True)
    assert load(tmp_path / "a")["a"].sum() == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").touch()
    with pytest.raises(FileExistsError, match="not an fdq checkpoint"):
        save({"a": jnp.zeros(3)}, tmp_path / "other", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "other"]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": "text"}, "a: expected an array, found str"),
        ({"a": jax.ShapeDtypeStruct((2,), jnp.float32)}, "a: abstract"),
        ({"a": {1: jnp.ones(1), "1": jnp.ones(1)}}, None),
        ({}, "no arrays to save"),
    ],
    ids=["text", "abstract", "same path", "empty"],
)
def test_what_cannot_be_saved_leaves_nothing(tmp_path, tree, message):
    with pytest.raises((CheckpointError, ValueError, TypeError), match=message):
        save(tree, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_small_disk_and_a_second_writer(tmp_path, monkeypatch):
    from fdq_checkpoints.store import commit

    with (
        commit.pending_directory(tmp_path / "a") as folder,
        pytest.raises(CheckpointError, match="another process is writing"),
    ):
        (folder / "file").write_text("x")
        save({"a": jnp.ones(3)}, tmp_path / "a")
    assert (tmp_path / "a" / "file").exists()
    monkeypatch.setattr(commit, "_SPARE_BYTES", 2**60)
    with pytest.raises(CheckpointError, match="are needed"):
        save({"a": jnp.ones(3)}, tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
