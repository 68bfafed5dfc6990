"""The GPU benchmark without a GPU: cases, harness, report, and kernels in the interpreter."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu, gpu_cases, gpu_model, gpu_report, gpu_table, gpu_timing
from benchmarks.gpu_attention import measure as measure_attention
from benchmarks.gpu_attention import small
from benchmarks.gpu_child import Settings, start_section
from benchmarks.gpu_products import cut, expert_indices, measure_matrix, timed
from benchmarks.gpu_timing import Timing, Work
from benchmarks.gpu_weights import random_cache, random_weight, weight_spec
from fdq.kv_cache import parse_format
from fdq.models import CONFIGS
from fdq.qtensor import dequantize
from fdq.quantizers import quantize_array
from pallas_kernels import reports

ROOT = pathlib.Path(__file__).parent.parent.parent

SMOKE = Settings(smoke=True, seconds=600.0)


def test_cases_are_unique_and_begin_with_what_figures_depend_on():
    for cases in (
        gpu_cases.matrix_cases(),
        gpu_cases.expert_cases(),
        gpu_cases.attention_cases(),
        gpu_model.CASES,
    ):
        keys = [case.key for case in cases]
        assert len(set(keys)) == len(keys)
    matrices = gpu_cases.matrix_cases()
    urgent = [case.urgent for case in matrices]
    assert urgent == sorted(urgent, reverse=True)
    for case in matrices:
        if case.urgent and case.format == "W4":
            assert gpu_cases.packed_bytes("W4", case.k, case.n) >= gpu_cases.LARGE
    shapes = {(case.model, case.layer, case.m, case.format) for case in matrices}
    for model in gpu_cases.MODELS:
        for layer in gpu_cases.linear_layers(CONFIGS[model]):
            for m in (1, 2, 4, 8):
                assert (model, layer, m, "W4") in shapes and (model, layer, m, "W8") in shapes


def test_layer_shapes():
    assert gpu_cases.linear_layers(CONFIGS["llama-3-8b"]) == {
        "qkv": (4096, 6144),
        "o": (4096, 4096),
        "gate_up": (4096, 28672),
        "down": (14336, 4096),
    }
    ernie = gpu_cases.linear_layers(CONFIGS["ernie-4.5-21b-a3b"])
    assert ernie["shared gate_up"] == (2560, 6144)


@pytest.mark.parametrize("name", ["W4", "W8", "WCC2", "WNVFP4", "Wfp8", "W4-asym"])
def test_random_weights_are_as_quantized_ones(name):
    spec = weight_spec(name)
    made = random_weight(jax.random.key(3), (256, 1280), spec)
    like = quantize_array(jax.ShapeDtypeStruct((256, 1280), jnp.float32), spec)
    shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (made, like)]
    assert jax.tree.leaves(shapes[0]) == jax.tree.leaves(shapes[1])
    assert np.isclose(float(dequantize(made).std()), 256**-0.5, rtol=0.2)
    stack = random_weight(jax.random.key(3), (5, 256, 384), spec)
    assert stack.shape == (5, 256, 384)


@pytest.mark.parametrize("name", ["C16", "C8", "Cfp8", "C4", "C8-kvchannel"])
def test_random_caches_have_the_shapes_of_the_cache(name):
    spec = parse_format(name)
    codes, scale, zero = random_cache(jax.random.key(0), (2, 3, 700, 64), spec, "bfloat16")
    assert codes.shape == (2, 3, 700, 32 if name == "C4" else 64)
    assert (scale is None) == (spec is None) and (zero is None) == (name != "C4")
    if name in ("C8", "C4"):
        assert scale.shape == (2, 3, 700)


def test_expert_indices_read_all_experts_before_one_again():
    case = gpu_cases.expert_cases()[0]
    links = case.experts // case.top_k
    rows = np.concatenate(expert_indices(case, links))
    assert len(set(rows.tolist())) == len(rows)


def test_a_chain_is_timed_and_a_broken_one_says_why():
    w = [jnp.ones((256, 256), jnp.float32) * i for i in range(3)]
    x = jnp.ones((1, 256), jnp.float32)

    def broken(x, w):
        raise RuntimeError("no such kernel")

    found = gpu_timing.time_all({"dot": Work(jnp.dot, x, w), "broken": Work(broken, x, w)})
    assert found["broken"] == "RuntimeError: no such kernel"
    # A busy machine may be too noisy for such a small product; then it says so.
    dot = found["dot"]
    assert dot.seconds > 0 and dot.links == 3 if isinstance(dot, Timing) else "noisy" in dot


def test_a_chain_may_hand_on_what_it_donates():
    def step(x, a):
        return a.sum(), a + x

    operands = [jnp.zeros((4,)), jnp.ones((4,))]
    found = gpu_timing.time_all({"add": Work(step, jnp.float32(1), operands, threads=True)})
    assert not (isinstance(found["add"], str) and "noisy" not in found["add"])
    assert operands[0].sum() == 0  # not donated: the timing works on copies


def test_a_wrong_result_gets_no_time():
    x = jnp.ones((1, 8))
    works = {"right": Work(jnp.multiply, x, [x]), "wrong": Work(jnp.add, x, [x])}
    works["absent"] = "ImportError: nobody has it"
    checks = dict.fromkeys(works, lambda y: gpu_timing.difference(y, x))
    entries = timed(works, checks, {}, SMOKE)
    assert "seconds" in entries["right"] and entries["right"]["difference"] == 0
    assert "seconds" not in entries["wrong"] and entries["wrong"]["error"].startswith("wrong")
    assert entries["absent"] == {"error": "ImportError: nobody has it"}


def test_zeros_prove_nothing():
    with pytest.raises(ValueError, match="nothing to compare"):
        gpu_timing.difference(jnp.zeros(3), jnp.zeros(3))


def test_a_section_survives_a_case_that_kills_its_process():
    events = []
    failure = start_section(
        "tests.benchmarks.dying_section",
        Settings(smoke=True, seconds=60.0, more={"cases": "abcd"}),
        events.append,
        {"JAX_PLATFORMS": "cpu"},
    )
    assert failure is None
    by_case = {event["case"]: event for event in events}
    assert sorted(by_case) == list("abcd") and len(events) == 4
    assert "exit code 7" in by_case["b"]["error"]
    assert by_case["c"]["error"] == "ValueError: not this one"
    assert by_case["d"]["section"] == "test"


def test_a_case_that_hangs_costs_its_own_time():
    events = []
    settings = Settings(smoke=False, seconds=60.0, case_seconds=2.0, more={"cases": "had"})
    environment = {"JAX_PLATFORMS": "cpu"}
    assert (
        start_section("tests.benchmarks.dying_section", settings, events.append, environment)
        is None
    )
    assert [event["case"] for event in events] == ["h", "a", "d"]
    assert "Timeout" in events[0]["error"]


def test_a_section_without_time_skips():
    events = []
    settings = Settings(smoke=True, seconds=-1.0, more={"cases": "abcd"})
    start_section("tests.benchmarks.dying_section", settings, events.append, {})
    assert [sorted(event) for event in events] == [["case", "skipped"]] * 4


def test_a_matrix_case_runs_interpreted():
    case = next(c for c in gpu_cases.matrix_cases() if c.format == "W4" and c.m == 2)
    report = measure_matrix(cut(case), SMOKE)
    assert json.loads(json.dumps(report))["entries"]["kernel"]["difference"] < 5e-6
    assert {"kernel", "fdq", "xla", "cuBLAS"} == set(report["entries"])
    assert not [e for e in report["entries"].values() if "error" in e]


def test_an_attention_case_runs_interpreted():
    case = next(c for c in gpu_cases.attention_cases() if c.format == "C8")
    report = measure_attention(small(case), SMOKE)
    assert not [e for e in report["entries"].values() if "error" in e]


def test_a_model_that_does_not_fit_loses_layers():
    config = CONFIGS["llama-3-8b"]
    assert gpu_model.fit(config, "W4A16C8", 80 << 30) == (config, "")
    smaller, note = gpu_model.fit(config, None, 12 << 30)
    assert 2 < smaller.num_layers < 32 and f"{smaller.num_layers} of 32" in note


def test_flags_of_a_model_case(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_one=1")
    assert gpu_model.CASES[0].environment()["XLA_FLAGS"] == "--xla_one=1"
    off = dataclasses.replace(gpu_model.CASES[0], graphs="off").environment()["XLA_FLAGS"]
    assert off == "--xla_one=1 --xla_gpu_enable_command_buffer="


def row(section, scheme, size, **entries):
    fields = {"case": f"{section} {scheme} {size}", "section": section, "scheme": scheme}
    fields |= {"model": "llama-3-8b", "layer": "down", "k": 1, "n": 1, "m": 1, "slots": 8192}
    timings = {name: {"seconds": seconds} for name, seconds in entries.items()}
    return {**fields, "bytes": size, "entries": timings}


def record(*rows, counts=True, kind="NVIDIA H200"):
    machine = {"device_kind": kind, "copy_bandwidth": 1e12}
    fields = {"counts": counts, "date": "2026-01-01", "machine": machine}
    return {**fields, "results": list(rows), "skipped": [], "notes": []}


LARGE = 100_000_000


def test_figures_that_must_be_reached():
    found = gpu_report.checks(
        record(
            row("matmul", "W4A16", LARGE, kernel=1e-4, fdq=1.2e-4, xla=2e-4, gemlite=1.1e-4),
            row("matmul", "W4A16", 1000, kernel=1e-4),  # too small for the bar
            row("matmul", "W8A16", LARGE, kernel=1.3e-4),
            row("attention", "C8", LARGE, kernel=1.3e-4),
        )
    )
    assert [check.met for check in found] == [True, False, False, None, True, None, None]
    assert "100.0% at worst" in found[0].measured
    assert "0.92x" in found[1].measured and "gemlite" in found[1].measured
    assert found[3].measured == ""


def test_a_kernel_without_a_time_misses_its_figure():
    broken = row("matmul", "W4A16", LARGE)
    found = gpu_report.checks(record(row("matmul", "W4A16", LARGE, kernel=1e-4), broken))
    assert found[0].met is False and "1 without a time" in found[0].measured


def test_tokens_a_second_are_judged_on_the_card_that_the_bar_is_for():
    model = {"section": "model", "model": "llama-3-8b", "scheme": "W4A16C8", "note": ""}
    model |= {"case": "x", "implementation": "fdq's choice", "tokens_per_second": 501.0}
    assert gpu_report.checks(record(model))[-1].met is True
    other = gpu_report.checks(record(model, kind="Tesla T4"))[-1]
    assert other.met is None and "501" in other.measured
    assert gpu_report.checks(record(model, counts=False))[-1].measured == ""


def test_wrong_results_are_found():
    bad = row("matmul", "W4A16", LARGE, xla=1e-4)
    bad["entries"]["kernel"] = {"error": "wrong: differs from the reference by 0.5"}
    assert len(gpu_report.wrong_results(record(bad))) == 1
    assert not gpu_report.wrong_results(record(row("matmul", "W4A16", LARGE, kernel=1e-4)))


def test_the_plot_is_drawn(tmp_path):
    rows = [row("matmul", "W4A16", LARGE, kernel=1e-4), row("attention", "C8", LARGE, kernel=1e-4)]
    gpu_report.plot(record(*rows), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--help"])
    assert "python -m benchmarks.gpu --smoke" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_benchmark_runs_without_a_gpu(tmp_path, capsys):
    assert gpu.main(["--smoke", "--output", str(tmp_path), "--budget-minutes", "60"]) == 0
    assert "no figure above counts" in capsys.readouterr().out
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert {r["section"] for r in found["results"] if "section" in r} == set(gpu.SECTIONS)
    assert not found["counts"]
    assert not [check for check in found["checks"] if check["met"] is not None]


def test_readme_has_the_table_of_the_committed_report():
    if not reports.DIRECTORY.exists():
        pytest.skip("the package has no ahead-of-time report yet")
    found = gpu_table.in_readme((ROOT / "README.md").read_text("utf-8"))
    again = "python -m benchmarks.gpu_table --readme README.md"
    assert found == gpu_table.table(reports.load()), f"make it again: {again}"


def test_a_table_goes_between_the_marks():
    begin, end = gpu_table.MARKS
    text = f"before\n{begin}\nold\n{end}\nafter\n"
    assert gpu_table.in_readme(text) == "old"
    assert gpu_table.filled(text, "new") == f"before\n{begin}\nnew\n{end}\nafter\n"
    with pytest.raises(ValueError, match="lacks the marks"):
        gpu_table.in_readme("no marks")
