"""`fdq kernels`, in process: tables, JSON, errors and exit codes. The compiles are children."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import aot_programs as programs
import jax
import pytest
from typer.testing import CliRunner

from fdq.analysis import decode_step
from fdq.cli.app import app
from pallas_kernels.aot import gpu_targets, kernel_cases
from pallas_kernels.aot import report_files as reports
from pallas_kernels.aot.ahead_of_time import unavailable

needs_compiler = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

PROBE = dataclasses.replace(programs.PROBE, representative=True)
HOPPER = dataclasses.replace(
    programs.HOPPER, representative=True, gpus=gpu_targets.at_least(9), report="fenced"
)
OTHER_SHAPE = dataclasses.replace(
    programs.FITS, name="sums, another shape", gpus=("h100",), representative=False
)
SPILLS = dataclasses.replace(programs.SPILLS, representative=True)


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["kernels", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def cases(monkeypatch):
    """Two kernels that run, one of them on Hopper and newer only, and another shape."""
    monkeypatch.setattr(kernel_cases, "all_cases", lambda: [PROBE, HOPPER, OTHER_SHAPE])


@pytest.fixture
def directory(monkeypatch, tmp_path):
    monkeypatch.setattr(reports, "DIRECTORY", tmp_path)
    return tmp_path


def test_a_wrong_gpu_lists_the_valid_ones():
    output = run("--gpu", "l5", code=2).stderr
    assert "Unknown GPU 'l5'" in output
    assert all(name in output for name in gpu_targets.ALL)


def test_options_that_would_go_unread_are_refused(cases):
    output = run("--layers", "2", "--scheme", "W8A16", code=2).stderr
    assert "--scheme, --layers: only with --decode-step" in output
    output = run("--decode-step", "llama-3-8b", "--all", "--kernel", "x", code=2).stderr
    assert "--all, --kernel: not with --decode-step" in output


def test_a_committed_report_without_such_a_kernel_lists_its_kernels():
    output = run("--kernel", "nosuch", code=2).stderr
    assert "'nosuch' matches no kernel" in output and "append C8" in output


def test_a_kernel_that_does_not_exist_lists_those_that_do(cases):
    output = run("--gpu", "l4", "--kernel", "nothing", code=2).stderr
    assert "'nothing'" in output and "matrix-vector probe" in output


def test_help_has_an_example():
    assert "fdq kernels --gpu l4" in run("--help").stdout


@pytest.mark.slow
@needs_compiler
def test_one_gpu(cases):
    """A kernel that is not promised to run there is no failure, and the table says why not."""
    output = run("--gpu", "T4").stdout
    assert "Tesla T4 (sm_75)" in output
    assert "matrix-vector probe" in output and "of 13.5" in output
    reason = output.partition("needs sm_90: ")[2]
    assert "sm_75 has no instruction fence.proxy" in reason
    assert "another shape" not in output


@pytest.mark.slow
@needs_compiler
def test_all_shapes_of_one_gpu_as_json(cases, tmp_path):
    file = tmp_path / "new" / "report.json"
    output = run("--gpu", "h100", "--all", "--json", "--output", file).stdout
    printed = json.loads(output)["reports"]
    assert [r["case"] for r in printed] == ["matrix-vector probe", "needs sm_90", OTHER_SHAPE.name]
    assert {r["gpu"] for r in printed} == {"h100"} and all(r["ok"] for r in printed)
    written = json.loads(file.read_text())
    assert written["jax"] == jax.__version__
    assert [r["case"] for r in written["reports"]] == [r["case"] for r in printed]
    assert all(k["mosaic"] for r in written["reports"] for k in r["kernels"])


@pytest.mark.slow
@needs_compiler
def test_a_spill_is_a_failure(monkeypatch):
    monkeypatch.setattr(kernel_cases, "all_cases", lambda: [SPILLS])
    result = run("--gpu", "a100", code=1)
    assert "spills" in result.stdout
    assert "accumulators spills 7" in result.stderr


@pytest.mark.slow
@needs_compiler
def test_without_a_gpu_the_table_is_the_one_of_the_package(cases, directory):
    run("--gpu", "t4", "--gpu", "h100", "--output", reports.path_for(jax.__version__))
    output = run().stdout
    assert "matrix-vector probe" in output and "needs sm_90 on t4: " in output
    lines = run("--markdown").stdout.splitlines()
    probe, hopper = lines[2].split("|"), lines[3].split("|")
    columns = list(gpu_targets.SHORT_NAMES)
    t4, a100, h100 = (2 + columns.index(name) for name in ("t4", "a100", "h100"))
    assert float(probe[t4]) == pytest.approx(4.3, abs=0.5)
    assert [hopper[i].strip() for i in (t4, a100, h100)] == ["–", "–", "yes"]


def test_without_a_report_it_says_how_to_make_one(directory):
    assert "fdq kernels --all" in run(code=2).stderr


def test_of_several_reports_the_nearest_version_is_shown(directory):
    for version in ("0.11.2", "0.12.0"):
        report = dataclasses.replace(_report(), jax=version)
        reports.save([report], reports.path_for(version))
    assert [r.jax for r in reports.load("0.11.2")] == ["0.11.2"]
    assert [r.jax for r in reports.load("0.13.0")] == ["0.12.0"]


def test_without_the_extra_it_says_what_to_install(cases, monkeypatch):
    unavailable = "pallas_kernels.aot.ahead_of_time.unavailable"
    monkeypatch.setattr(unavailable, lambda: "pip install x[aot]")
    assert "pip install x[aot]" in run("--gpu", "l4", code=2).stderr


def test_a_gpu_machine_without_jax_setting_prints_nothing_of_cuda():
    """With the CUDA plugin installed but no GPU, the command prints its own output only."""
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    script = "import sys; sys.argv[1:] = ['kernels', '--gpu', 'l5']; import fdq.cli; fdq.cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("Error: Unknown GPU 'l5'"), done.stderr


def _report():
    from pallas_kernels.aot.ahead_of_time import Report

    return Report(case="c", kernel="k", gpu="l4", arch="sm_89", jax="0.12.0", ok=True)


@pytest.fixture
def small_model(monkeypatch, tmp_path):
    """A directory with the config.json of a small model, which the children can read."""
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "vocab_size": 1024,
                "hidden_size": 256,
                "intermediate_size": 512,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0,
                "max_position_embeddings": 2048,
                "hidden_act": "silu",
                "tie_word_embeddings": False,
            }
        )
    )
    return tmp_path


@pytest.mark.slow
@needs_compiler
def test_a_decode_step(small_model, tmp_path):
    file = tmp_path / "steps.json"
    options = ("--decode-step", small_model, "--gpu", "l4", "--context", 256, "--output", file)
    output = run(*options, "--layers", 2).stdout
    assert "2 of 3 layers" in " ".join(output.split())  # lines break where the path is long
    (step,) = json.loads(file.read_text())["decode_steps"]
    assert step["ok"] and step["layers"] == 2 and step["jax"] == jax.__version__
    # Two layers, and one for the difference.
    assert 0 < step["launches_per_layer"] < step["launches"]
    # The whole cache, tokens and lengths are written in place.
    assert step["cache_bytes"] <= step["alias_bytes"] < step["cache_bytes"] + 4096
    assert step["weight_bytes"] > 0
    assert step["temp_fraction"] == step["temp_bytes"] / step["weight_bytes"]


@pytest.mark.slow
@pytest.mark.longest
@needs_compiler
def test_a_decode_step_of_two_gpus(small_model):
    """Kernels inside of the one `shard_map`, each GPU with half of the cache, two sums a layer."""
    config = small_model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 1}))
    options = ("--decode-step", small_model, "--gpu", "h100", "--context", 256)
    (step,) = json.loads(run(*options, "--mesh", "tensor=2", "--json").stdout)["decode_steps"]
    assert step["ok"], step["error"]
    assert step["mesh"] == "tensor=2"
    assert step["launch_kinds"]["AllReduce"] >= 3 and step["launch_kinds"]["mosaic"] >= 6
    names = {kernel["name"] for kernel in step["kernels"]}
    assert {"matrix_vector_int4_g128_m1", "append_kernel"} <= names
    a_head = 2 * 256 * (64 + 4)  # keys and values, int8 and their scales
    assert a_head <= step["cache_bytes"] < a_head + 4096


@pytest.mark.longest
@needs_compiler
@pytest.mark.parametrize(("model", "products"), [("llama-3-8b", 4), ("ernie-4.5-21b-a3b", 6)])
def test_a_prompt_decodes_a_weight_a_product(model, products):
    """Of every layer: one decoding kernel and one product each, and no other pass over weights.

    ERNIE's layers of experts are qkv, o, picked experts (gate and up, down) and shared ones.
    """
    result = decode_step.report(model, "W4A16C8", "h100", layers=3, context=2048, prefill=1920)
    assert result.ok, result.error
    assert result.weight_copies == 0, result.large_results
    assert all("decode_" in kernel.name for kernel in result.kernels)
    layer = [line.split()[0] for line in result.layer_sequence]
    assert layer.count("mosaic") == products
    assert 0 < result.launches_per_layer < 120
    # Attention's over blocks of slots, and of each product of experts for those that are full.
    assert result.unknown_loops <= 2 + 2 * (products == 6)
    # One decoded weight at a time, beside the rows of one layer.
    config = decode_step.config_for(model, "h100")
    largest = 2 * 4096 * 28672 if products == 4 else 2 * 64 * 2560 * 3072
    assert result.temp_bytes < largest + 2048 * 6 * 4 * 6 * config.hidden_size


def test_a_prompt_fits_the_cache(small_model):
    options = ("--decode-step", small_model, "--gpu", "l4", "--context", 64, "--prefill", 65)
    assert "expected 1 to 64" in run(*options, code=2).stderr


def test_a_decode_step_needs_a_gpu_by_name(small_model):
    assert "--gpu" in run("--decode-step", small_model, code=2).stderr


def test_a_decode_step_of_too_many_layers(small_model):
    options = ("--decode-step", small_model, "--gpu", "l4", "--layers", 4)
    assert "expected 1 to 3" in run(*options, code=2).stderr


def test_turing_computes_in_float16(small_model):
    assert decode_step.config_for(str(small_model), "t4").dtype == "float16"
    assert decode_step.config_for(str(small_model), "a100").dtype == "bfloat16"


def test_the_weights_of_a_step_are_abstract():
    build = functools.partial(
        decode_step.program, "ernie-4.5-300b-a47b", "W4A16C8", "h200", context=64, batch=2
    )
    program = build(layers=4)
    leaves = jax.tree.leaves(program.arguments)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
