"""The card script without a card: its stages, what it calls wrong, and all of it on the CPU."""

import importlib
import json

import numpy as np
import pytest

from benchmarks import gpu_cases, gpu_proof, gpu_right, gpu_steps
from benchmarks.gpu_child import Settings
from tests.covering import longest, slow

SMOKE = Settings(smoke=True, seconds=600.0)


def test_stages_fit_in_six_minutes_and_have_modules():
    names = [stage.name for stage in gpu_proof.STAGES]
    assert len(set(names)) == len(names) and names[0] == "right"
    assert sum(stage.seconds for stage in gpu_proof.STAGES) <= 300
    for stage in gpu_proof.STAGES:
        assert callable(importlib.import_module(stage.module).run)
        assert stage.environment()["FDQ_IMPLEMENTATION"] == ""
    assert "--xla_gpu_enable_command_buffer=" in gpu_proof.STAGES[6].environment()["XLA_FLAGS"]


def test_cases_are_unique_and_what_is_read_first_comes_first():
    right = gpu_right.right_cases()
    kinds = {"tensor cores", "float8", "plain", "normed", "gated", "attention", "experts"}
    assert {case.rows for case in right} == {*kinds, "decoded", "decoded experts", "prompt"}
    assert right[0].rows == "tensor cores"
    assert all(gpu_cases.on_tensor_cores(format) for format in gpu_right._FORMATS)
    steps = [
        case
        for part in ("decode", "graphs off", "prompts", "batches")
        for case in gpu_steps.step_cases(part)
    ]
    for cases in (right, steps, gpu_cases.proof_matrices(), gpu_cases.proof_attention()):
        keys = [case.key for case in cases]
        assert len(set(keys)) == len(keys) > 7
    assert {c.m for c in gpu_cases.proof_matrices()} == {1, 8}
    assert {c.slots for c in gpu_cases.proof_attention()} == {1024, 8192, 32768, 131072}
    with pytest.raises(ValueError, match="unknown part 'all'"):
        gpu_steps.step_cases("all")


@pytest.mark.parametrize("fault", ["none", "off", "changing", "not a number"])
def test_a_wrong_kernel_is_found(monkeypatch, fault):
    """Also one that is right within the tolerance, but not the same twice."""
    reference = np.asarray([[1.0, -2.0, 0.5]])
    results = iter([reference, reference])
    if fault == "off":
        results = iter([reference + 1e-3] * 2)
    elif fault == "changing":
        results = iter([reference, reference + 1e-9])
    elif fault == "not a number":
        results = iter([reference * np.nan] * 2)
    monkeypatch.setattr(gpu_right, "_product", lambda *_: (lambda: next(results), reference, 1e-5))
    case = gpu_right.right_cases()[0]
    if fault == "none":
        found = gpu_right.measure(case, SMOKE)
        assert found["difference"] == 0
        assert "right, differs by" in gpu_proof.line({"case": case.key, **found})
        return
    with pytest.raises(ValueError, match="differs from float64|two runs differ|nothing to compare"):
        gpu_right.measure(case, SMOKE)


def test_whole_models_are_told_from_slices():
    """A step of 2 ms and 0.5 ms a layer; without both slices there is no telling."""

    def slice_of(layers, model="llama-3-8b", **more):
        row = {"model": model, "scheme": "W4A16C8", "graphs": "default", "of_layers": 32}
        row |= {"batch": 1, "prompt": 0, "layers": layers, "bytes": 100 + 10 * layers}
        return row | {"seconds": 0.002 + 0.0005 * layers} | more

    rows = [slice_of(4), slice_of(12), slice_of(4, "other"), slice_of(12, batch=8, seconds=1.0)]
    (found,) = gpu_steps.whole_models(rows)
    assert found["model"] == "llama-3-8b" and found["layer_seconds"] == pytest.approx(0.0005)
    assert found["seconds"] == pytest.approx(0.018)
    assert found["tokens_per_second"] == pytest.approx(1 / 0.018)
    assert found["bytes"] == pytest.approx(420)


def test_what_is_printed_of_a_case():
    assert gpu_proof.line({"case": "a", "error": "out of memory"}) == "a: FAILED: out of memory"
    assert gpu_proof.line({"unavailable": "no torch"}) == "no torch"
    entries = {"kernel": {"seconds": 1.5e-6}, "normed": {"error": "too noisy"}}
    assert gpu_proof.line({"case": "a", "entries": entries}) == "a: kernel 1.50 us, too noisy"


def test_a_stage_that_dies_is_said_and_kept(tmp_path, monkeypatch, capsys):
    stages = (gpu_proof.Stage("right", "benchmarks.no_such_module", 5),)
    monkeypatch.setattr(gpu_proof, "STAGES", stages)
    assert gpu_proof.main(["--smoke", "--output", str(tmp_path)]) == 1
    assert "FAILED: right" in capsys.readouterr().out
    (path,) = tmp_path.glob("cpu-proof-*.json")
    (stage,) = json.loads(path.read_text())["stages"]
    assert stage["name"] == "right" and "no_such_module" in stage["failure"]


@pytest.mark.parametrize("event", ["error", "skipped", "difference", None])
def test_a_tool_that_ran_nothing_found_nothing(tmp_path, monkeypatch, capsys, event):
    """What it says of kernels that were wrong, or never ran, is no praise."""
    stages = tuple(stage for stage in gpu_proof.STAGES if stage.name == "memcheck")
    assert stages[0].environment()["XLA_PYTHON_CLIENT_ALLOCATOR"] == "platform"
    arguments = gpu_proof.parser().parse_args(["--only", "memcheck"])
    proof = gpu_proof.Proof(arguments, gpu_proof.gpu.wide_console())
    monkeypatch.setattr(gpu_proof.shutil, "which", lambda name: name)

    def start(module, settings, take, environment, tool):
        assert tool[0] == "compute-sanitizer"
        if event is not None:
            take({"case": "a", "section": "right", event: 1e-9 if event == "difference" else "no"})

    monkeypatch.setattr(gpu_proof, "start_section", start)
    proof.start(stages[0], tmp_path / "x.json")
    (stage,) = proof.run.record["stages"]
    assert (stage["failure"] is None) == (event == "difference")
    assert "1 of 1 kernels to their end" in capsys.readouterr().out or event != "difference"


@pytest.mark.parametrize(
    "only", [longest(["decode"]), slow(["right", "products"]), longest(["prompts"])]
)
def test_a_smoke_run(tmp_path, capsys, only):
    assert gpu_proof.main(["--smoke", "--only", *only, "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("cpu-proof-*.json")
    record = json.loads(path.read_text())
    assert record["finished"] and not record["counts"]
    assert [stage["name"] for stage in record["stages"]] == only
    assert all("error" not in row for row in record["results"])
    if only == ["decode"]:
        (row,) = record["results"]
        assert row["first_seconds"] >= row["compiling_seconds"] > 0
    assert "reached" not in capsys.readouterr().out
