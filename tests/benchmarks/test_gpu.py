"""The GPU benchmark without a GPU: cases, harness, report, and kernels in the interpreter."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    atomic_file,
    gpu,
    gpu_cases,
    gpu_model,
    gpu_report,
    gpu_table,
    gpu_timing,
    page,
)
from benchmarks.gpu_attention import measure as measure_attention
from benchmarks.gpu_attention import small
from benchmarks.gpu_child import Settings
from benchmarks.gpu_products import (
    by_cublas,
    cut,
    expert_indices,
    matrix_kernel,
    measure_experts,
    measure_matrix,
    prepare,
    random_weights,
    small_experts,
    timed,
)
from benchmarks.gpu_timing import Timing, Work
from benchmarks.gpu_weights import random_cache, random_weight, weight_spec
from fdq.cache.kv_cache import parse_format
from fdq.formats.qtensor import dequantize
from fdq.models import CONFIGS
from fdq.quantizers import quantize_array
from pallas_kernels.aot import report_files as reports
from pallas_kernels.attention import decode_attention
from pallas_kernels.tuning import choices
from tests.covering import longest, slow

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


@pytest.mark.parametrize(
    "name", [*map(slow, ("W4", "WCC2")), *map(longest, ("W8", "WNVFP4", "Wfp8", "W4-asym"))]
)
def test_random_weights_are_as_quantized_ones(name):
    spec = weight_spec(name)
    made = random_weight(jax.random.key(3), (256, 1280), spec)
    like = quantize_array(jax.ShapeDtypeStruct((256, 1280), jnp.float32), spec)
    shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (made, like)]
    assert jax.tree.leaves(shapes[0]) == jax.tree.leaves(shapes[1])
    assert np.isclose(float(dequantize(made).std()), 256**-0.5, rtol=0.2)
    stack = random_weight(jax.random.key(3), (5, 256, 384), spec)
    assert stack.shape == (5, 256, 384)


@pytest.mark.parametrize("name", ["C4", *map(slow, ("C16", "C8", "Cfp8", "C8-kvchannel"))])
def test_random_caches_have_the_shapes_of_the_cache(name):
    spec = parse_format(name)
    cache = random_cache(jax.random.key(0), (2, 3, 700, 64), spec, "bfloat16")
    codes, scale, zero = cache.codes, cache.scale, cache.zero
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


def test_a_step_is_traced_once_whatever_the_length_of_the_chain():
    traced = []

    def step(x, w):
        traced.append(1)
        return x @ w

    works = {"dot": Work(step, jnp.ones((1, 8)), [jnp.ones((8, 8))] * 20)}
    gpu_timing.time_all(works, smoke=True)
    assert len(traced) == 1


def test_operands_exceed_the_l2_cache_four_times():
    l2, short_c4 = 50 << 20, 2 * 8 * 1024 * 64 + 4 * 8 * 1024 * 5 // 2
    assert gpu_timing.links_for(short_c4, l2) * short_c4 >= 4 * l2
    assert gpu_timing.links_for(1, l2) == gpu_timing.MOST_LINKS
    assert gpu_timing.links_for(1 << 30, l2) == 3
    assert gpu_timing.l2_ratio(100 << 20, l2) == 2.0


def test_what_the_l2_cache_holds_has_no_bandwidth():
    report = record(row("attention", "C8", LARGE, kernel=1e-4))
    found = report["results"][0]
    machine = report["machine"]
    for ratio, part in ((3.99, None), (4.0, 1.0)):
        found["l2_ratio"] = ratio
        assert gpu_report.share(found, "kernel", machine) == part
    # An entry with operands of its own goes by those.
    found["entries"]["kernel"] |= {"bytes": LARGE // 2, "l2_ratio": 1.0}
    assert gpu_report.share(found, "kernel", machine) is None


def test_cublas_is_what_it_says():
    work = by_cublas(Work(jnp.dot, jnp.ones((1, 8)), [jnp.ones((8, 8))]))
    found = gpu_timing.time_all({"cuBLAS": work}, smoke=True)["cuBLAS"]
    assert found == "ValueError: XLA compiled it without a call of __cublas$"  # on a CPU


def table_with(monkeypatch, *rows):
    """The tuning table of this device."""
    monkeypatch.setattr(choices, "_rows", lambda file: list(rows))


@pytest.mark.slow
def test_a_product_is_cut_as_the_tuning_table_says(monkeypatch):
    row = {"kernel": "matrix_vector", "formats": ["int4"], "use": "mosaic_gpu"}
    table_with(monkeypatch, {**row, "config": {"split": 2}})
    case = next(c for c in gpu_cases.matrix_cases() if c.format == "W4" and c.m == 8)
    case = dataclasses.replace(cut(case), k=256)  # two groups to split
    entries = json.loads(json.dumps(measure_matrix(case, SMOKE)))["entries"]
    # cuBLAS is there on GPUs alone.
    assert {"kernel", "fdq", "xla", "jnp.dot 16-bit"} == set(entries)
    assert not [e for e in entries.values() if "error" in e]
    assert entries["kernel"]["config"] == {"split": 2}
    assert entries["kernel"]["difference"] < 5e-6
    w = prepare(random_weights(case, 1)[0]).data
    x = jnp.ones((8, 256), jnp.bfloat16)
    for split in (1, 2):
        assert matrix_kernel(None, {"split": split})(x, w).shape[0] == split


@pytest.mark.slow
@pytest.mark.longest
def test_experts_are_cut_as_the_tuning_table_says(monkeypatch):
    row = {"kernel": "gathered_matrix_vector", "formats": ["int4"], "use": "mosaic_gpu"}
    table_with(monkeypatch, {**row, "config": {"split": 2}})
    report = measure_experts(small_experts(gpu_cases.expert_cases()[0]), SMOKE)
    assert report["entries"]["kernel"]["config"] == {"split": 2}
    assert not [e for e in report["entries"].values() if "error" in e]
    assert report["experts"] == 4  # tokamax makes as many


@pytest.mark.slow
@pytest.mark.longest
def test_attention_is_cut_as_the_tuning_table_says(monkeypatch):
    row = {"kernel": "decode_attention", "formats": ["int8"], "use": "mosaic_gpu"}
    table_with(monkeypatch, {**row, "config": {"parts": 2}})
    parts = []
    kernel = decode_attention.decode_attention

    def record_parts(*arguments, **more):
        parts.append(more.get("parts"))
        return kernel(*arguments, **more)

    monkeypatch.setattr(decode_attention, "decode_attention", record_parts)
    case = next(c for c in gpu_cases.attention_cases() if c.format == "C8")
    report = measure_attention(small(case), SMOKE)
    assert report["entries"]["kernel"]["config"] == {"parts": 2} and set(parts) == {2}
    assert not [e for e in report["entries"].values() if "error" in e]


@pytest.mark.slow
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


class Parts:
    """A run whose processes report what they are told to, by a clock of its own."""

    def __init__(self, monkeypatch, *arguments, took=0.0, failing=()):
        self.now, self.started, self.failing, self.took = 0.0, [], dict(failing), took
        self.settings = {}
        monkeypatch.setattr(gpu.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(gpu, "start_section", self.start)
        self.run = gpu.Run(gpu.parser().parse_args(arguments), gpu.wide_console())
        self.run.record["machine"] = {"device_kind": "Some GPU", "copy_bandwidth": 1e12}

    def start(self, module, settings, emit, env):
        self.started.append(module.removeprefix("benchmarks.gpu_"))
        self.settings[self.started[-1]] = settings
        self.now += self.took
        if self.started[-1] in self.failing:
            raise self.failing[self.started[-1]]
        if self.started[-1] == "products":
            emit(row("matmul", "W4A16", LARGE, kernel=1e-4))
        return None


def test_whole_models_come_last_and_have_the_time_that_they_need(monkeypatch):
    parts = Parts(monkeypatch, "--no-peers", took=80.0)
    parts.run.run(lambda: None)
    assert parts.started[:4] == ["products", "attention", "products", "attention"]
    # 8 minutes less 4 parts of 80 s are two models; in 0 s there is no third.
    assert parts.started[4:] == ["model"] * 2
    assert len(parts.run.record["skipped"]) == len(gpu_model.CASES) - 2
    parts = Parts(monkeypatch, "--no-peers", "--only", "model", took=190.0)
    parts.run.run(lambda: None)
    assert parts.started == ["model"] * 2  # 100 s are left, and the last took 190


def test_parts_without_time_are_not_started(monkeypatch):
    parts = Parts(monkeypatch, "--no-peers", took=233.0)
    parts.run.run(lambda: None)
    assert parts.started == ["products", "attention"]
    assert next(n for n in parts.run.record["notes"] if "lack of time" in n).startswith("experts")


def test_small_parts_get_the_least_time_that_is_worth_a_process(monkeypatch):
    parts = Parts(monkeypatch)
    parts.run.run(lambda: None)
    assert parts.settings["torch"].seconds >= 15.0


def test_peers_are_told_what_they_need(monkeypatch):
    parts = Parts(monkeypatch, "--only", "matmul")
    parts.run.run(lambda: None)
    (told,) = parts.settings["torch"].more["cases"]
    assert told["scheme"] == "W4A16" and told["k"] == 1 and "entries" not in told


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a bug")])
def test_what_was_measured_is_in_the_file_when_a_run_dies(monkeypatch, tmp_path, error):
    parts = Parts(monkeypatch, failing={"attention": error})
    monkeypatch.setattr(gpu, "Run", lambda *_: parts.run)
    monkeypatch.setattr(parts.run, "find_machine", lambda: None)
    monkeypatch.setattr(gpu, "plot", lambda *_: None)
    arguments = ["--no-peers", "--output", str(tmp_path)]
    if isinstance(error, KeyboardInterrupt):
        assert gpu.main(arguments) == 130
    else:
        with pytest.raises(ValueError, match="a bug"):
            gpu.main(arguments)
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert [r["scheme"] for r in found["results"]] == ["W4A16"] and not found["finished"]
    assert found["checks"][0]["met"]
    assert gpu.result_path(found, tmp_path) != path  # the next run of the day keeps it


def test_a_file_is_written_as_a_whole(tmp_path):
    path = tmp_path / "new" / "file.json"
    atomic_file.write(path, "first")
    with pytest.raises(UnicodeEncodeError):
        atomic_file.write(path, "second\ud800")
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]


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
@pytest.mark.longest
def test_the_whole_benchmark_runs_without_a_gpu(tmp_path, capsys):
    assert gpu.main(["--smoke", "--output", str(tmp_path), "--budget-minutes", "60"]) == 0
    assert "no figure above counts" in capsys.readouterr().out
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert {r["section"] for r in found["results"] if "section" in r} == set(gpu.SECTIONS)
    assert not found["counts"]
    assert not [check for check in found["checks"] if check["met"] is not None]


def test_the_page_has_the_table_of_the_committed_report():
    if not reports.DIRECTORY.exists():
        pytest.skip("the package has no ahead-of-time report yet")
    found = page.part((ROOT / "docs/gpu.md").read_text("utf-8"), gpu_table.PART)
    again = "python -m benchmarks.gpu_table --page docs/gpu.md"
    assert found == gpu_table.table(reports.load()), f"make it again: {again}"
