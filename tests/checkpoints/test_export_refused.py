"""Exports that cannot be are refused by name, and nothing half-written is left."""

import json

import pytest

import fdq
from fdq_checkpoints import CheckpointError, tree_paths
from fdq_checkpoints.export import EXPORTERS, Plan
from fdq_checkpoints.exporting import export
from tests.checkpoints import foreign
from tests.checkpoints.exports import NARROW, config_of, model_of
from tests.cli.command import run

REFUSED_BY_AWQ = {  # scheme: why
    "W8A16-f16": "4 bits alone",
    "W4A8-g16-f16": "no word for quantized inputs",
    "W4A16-g16": "scales in bfloat16",
}


@pytest.fixture(scope="module")
def plain():
    return model_of(NARROW, "W8A16", method="absmax")


REFUSED = [
    # scheme, exporter, what is said
    ("W8A16", "gptq", r"W8A16\) \(and 3 more\): scales in float32.*16 bits; --to compressed-tens"),
    ("W8A8-f16", "gptq", "no word for quantized inputs; --to compressed-tensors"),
    ("W8A16", "fp8", "is no float8.*Quantize it so first.*compressed-tensors"),
    ("W8A16", "mxfp4", "is not in mxfp4"),
    ("W8A16", "bitsandbytes", "has NF4 alone; --to compressed-tensors"),
    ("Wfp8e5m2A16", "compressed-tensors", "no such weights; --to dense decodes it"),
    (None, "compressed-tensors", "nothing in it is quantized.*--to dense"),
    ("W8A16", "gguff", "Unknown exporter 'gguff'.*Known: compressed-tensors, gptq"),
]


@pytest.mark.parametrize(("scheme", "to", "said"), REFUSED, ids=lambda x: str(x)[:20])
def test_what_a_layout_cannot_hold_is_refused_by_name(scheme, to, said, tmp_path):
    model = model_of(NARROW, scheme, method="absmax")
    with pytest.raises(ValueError, match=said):
        export(model, tmp_path / "out", to=to)
    assert not list(tmp_path.iterdir())


def test_a_zero_point_of_zero_is_for_the_second_version(tmp_path):
    model = model_of(NARROW, "W4A16-g32-asym-f16", method="absmax")
    zero = model.layers[0].mlp.down_proj.kernel.zero
    zero.set_value(zero.get_value().at[0, 0].set(0))
    with pytest.raises(CheckpointError, match="a zero point of 0.*--to gptq_v2 holds it"):
        export(model, tmp_path / "out", to="gptq")
    assert not list(tmp_path.iterdir())  # found while it was written


def test_a_destination_is_whole_or_not_there(plain, tmp_path):
    fdq.save(plain, tmp_path / "saved")
    with pytest.raises(CheckpointError, match="written into .*saved, or over it"):
        export(tmp_path / "saved", tmp_path / "saved/out", to="dense")
    export(tmp_path / "saved", tmp_path / "out", to="dense")
    with pytest.raises(FileExistsError, match="pass overwrite=True to replace an export to dense"):
        export(plain, tmp_path / "out", to="dense")

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(plain, tmp_path / "other", to="dense", progress=interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(plain, tmp_path / "out", to="dense", overwrite=True, progress=interrupt)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "saved"]
    export(plain, tmp_path / "out", to="compressed-tensors", overwrite=True)
    assert "quantization_config" in config_of(tmp_path / "out")
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an export to dense; not overwritten"):
        export(plain, tmp_path / "out", to="dense", overwrite=True)
    with pytest.raises(FileExistsError, match="not an export"):
        export(plain, tmp_path / "saved", to="dense", overwrite=True)


def test_damage_is_found_and_nothing_is_left(plain, tmp_path):
    fdq.save(plain, tmp_path / "saved")
    data = max((p for p in (tmp_path / "saved/weights").rglob("*") if p.is_file()),
               key=lambda p: p.stat().st_size)  # fmt: skip
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError):
        export(tmp_path / "saved", tmp_path / "out", to="dense")
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


class Counted(Plan):
    def __init__(self, origin):
        self.nbytes, self.formats = 10, {"counted": len(origin.tensors)}

    def write(self, folder, progress):
        (folder / "count.txt").write_text(str(self.formats["counted"]))


class Count:
    """An exporter that writes how many tensors there are."""

    name = "count"

    def plan(self, origin, options):
        return Counted(origin)

    def wrote(self, file):
        return file.name == "count.txt"


def test_an_exporter_of_ones_own(plain, tmp_path):
    with EXPORTERS.registered(Count()):
        for _ in range(2):
            export(plain, tmp_path / "out", to="count", overwrite=True)
    assert int((tmp_path / "out/count.txt").read_text()) == len(tree_paths.flatten(plain))


def test_the_command(plain, tmp_path):
    fdq.save(plain, tmp_path / "saved")
    out = tmp_path / "out"
    told = run("export", tmp_path / "saved", out, "--to", "compressed-tensors").stdout
    assert "pack-quantized (W8A16)" in told and "No tokenizer" in told
    again = ["export", tmp_path / "saved", out, "--to", "compressed-tensors"]
    assert "replace an earlier export with --overwrite" in run(*again, code=2).stderr
    found = json.loads(run(*again, "--overwrite", "--json").stdout)
    assert found["formats"]["pack-quantized (W8A16)"] == 7 and found["bytes"] > 1000
    wrong = run("export", tmp_path / "saved", tmp_path / "no", "--to", "gtpq", code=2).stderr
    assert "Did you mean 'gptq'?" in wrong
    wrong = run("export", tmp_path / "saved", tmp_path / "no", "--to", "gptq", code=2).stderr
    assert "--to compressed-tensors holds it" in " ".join(wrong.split())
    run("export", tmp_path / "saved", tmp_path / "no", "--to", "dense", "--shard-size", "0", code=2)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("kind", "to", "reason"),
    [
        ("mlx", "compressed-tensors", "codes with offsets"),
        ("mlx", "gptq", "codes with offsets"),
        ("hqq", "awq", "scales in float32"),
        ("gptq, desc_act", "awq", "rows in an order"),
        ("gptq, desc_act", "compressed-tensors", "rows in an order of their own"),
        ("gptq, desc_act", "gguf", "dense"),
    ],
)
def test_what_no_layout_holds_is_refused_before_anything_is_written(
    kind, to, reason, tmp_path, rng
):
    foreign.model(kind, tmp_path / "model", rng)
    with pytest.raises(CheckpointError, match=reason):
        fdq.export(tmp_path / "model", tmp_path / "out", to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("scheme", REFUSED_BY_AWQ)
def test_what_awq_has_not_is_refused(scheme, tmp_path):
    with pytest.raises(CheckpointError, match=REFUSED_BY_AWQ[scheme]):
        export(model_of(NARROW, scheme, method="absmax"), tmp_path / "out", to="awq")
