"""Compiles for GPUs that are not there, and what is reported of them."""

import dataclasses
import importlib.util
import json
import os
import threading
import time

import aot_programs as programs
import pytest
from covering import slow

from pallas_kernels.aot import cuda_tools
from pallas_kernels.aot.ahead_of_time import (
    Report,
    _with_instructions,
    compile_cases,
    compile_for,
    compile_jobs,
    one_line,
    unavailable,
)
from pallas_kernels.aot.gpu_targets import ALL, GPUS
from pallas_kernels.aot.kernel_cases import KernelCase

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

# Another worker of pytest-xdist has the other core.
PROCESSES = 1 if os.environ.get("PYTEST_XDIST_WORKER") else 2

JOBS = [
    (programs.SPILLS, "a100"),
    (programs.FITS, "a100"),
    (programs.SHARED, "t4"),
    (programs.HOPPER, "t4"),
    (programs.HOPPER, "h100"),
    (programs.EXITS, "l4"),
    (programs.RAISES, "l4"),
    (programs.EXPONENTIAL, "l4"),
    (programs.FACTS, "rtx_pro_6000"),
    (programs.DONATED, "h200"),
    (programs.KEPT, "h200"),
    (programs.LOOPED, "l4"),
    *((programs.PROBE, gpu) for gpu in ALL),
]


# Its parameter makes every test that asks for it slow.
@pytest.fixture(scope="module", params=[slow(None)], ids=[""])
def reports():
    """The report of each job, by the name of its case and its GPU."""
    compiled = compile_jobs(JOBS, processes=PROCESSES)
    assert [(r.case, r.gpu) for r in compiled] == [(case.name, gpu) for case, gpu in JOBS]
    return {(report.case, report.gpu): report for report in compiled}


def test_a_kernel_that_spills_fails_the_check(reports):
    report = reports["spills", "a100"]
    (kernel,) = report.mosaic_kernels
    assert report.ok
    assert kernel.registers == 255
    assert kernel.spill_store_bytes > 100
    assert kernel.spill_load_bytes > 100
    (problem,) = report.problems()
    assert "accumulators spills" in problem and "255 registers" in problem


def test_the_same_kernel_with_fewer_sums_passes(reports):
    report = reports["fits", "a100"]
    (kernel,) = report.mosaic_kernels
    assert report.problems() == []
    assert not kernel.spill_bytes
    assert 64 < kernel.registers < 255  # 16 arrays of four registers, and more


@pytest.mark.parametrize("gpu", ALL)
def test_one_source_compiles_for_every_gpu(reports, gpu):
    report = reports["matrix-vector probe", gpu]
    assert report.problems() == []
    assert report.arch == GPUS[gpu].arch
    assert [kernel.name for kernel in report.mosaic_kernels] == ["probe"]
    assert report.launch_kinds == {"mosaic": 1, "kernel": 1}  # ours, and XLA's sum of the parts
    assert report.argument_bytes == 2048 * 2048 // 2 + 16 * 2048 * 4 + 2048 * 4


@pytest.mark.parametrize("gpu", ALL)
def test_instructions_per_weight(reports, gpu):
    """A step of the probe's loop takes one word of each of a thread's four columns: 32 weights,
    each with a shift, a mask and a multiply-add, and loads and sums of x that they share."""
    report = reports["matrix-vector probe", gpu]
    loop = report.mosaic_kernels[0].loop
    assert loop is not None and not loop.whole_kernel
    assert loop.opcodes["FFMA"] == 32
    assert loop.opcodes["LOP3"] >= 32
    assert loop.global_bytes >= 4 * 4 + 8 * 4
    assert 3 < report.instructions_per_weight < 5
    assert report.instructions_per_weight == pytest.approx(loop.instructions / 32, abs=1e-3)
    budget = GPUS[gpu].instruction_budget(0.5 + 4 / 128)
    assert report.instruction_budget == pytest.approx(budget, abs=0.01)


def test_dynamic_shared_memory_is_counted(reports):
    (kernel,) = reports["shared memory", "t4"].mosaic_kernels
    assert 4096 <= kernel.shared_memory_bytes < 4096 + 1024


def test_a_crash_is_that_jobs_alone(reports):
    """The compiler aborts, a process exits, a build raises: the jobs beside them are compiled."""
    crashed = reports["needs sm_90", "t4"]
    assert not crashed.ok
    assert "SIGABRT" in crashed.error and "Cannot select" in crashed.error
    assert crashed.problems() == [f"needs sm_90 on t4: {crashed.error}"]
    assert reports["needs sm_90", "h100"].ok
    assert "status 3" in reports["exits", "l4"].error
    assert reports["raises", "l4"].error == "ValueError: a reason in two lines"


def test_kernels_that_need_libdevice_compile(reports):
    assert reports["exponential", "l4"].problems() == []


def test_functions_believe_that_they_are_on_the_gpu(reports):
    """`device_facts` fails unless the default device has a compute capability and a core count."""
    assert reports["device facts", "rtx_pro_6000"].ok, reports["device facts", "rtx_pro_6000"].error


def test_donated_buffers_are_aliased_and_others_copied(reports):
    donated, kept = reports["donated cache", "h200"], reports["cache not donated", "h200"]
    size = 4096 * 1024 * 2
    assert donated.alias_bytes == size
    assert donated.copies == () and donated.large_results == ()
    assert kept.alias_bytes == 0
    assert [copy.bytes for copy in kept.copies] == [size]
    assert [result.bytes for result in kept.large_results] == [size]


def test_loops_count_as_often_as_they_run(reports):
    report = reports["loop", "l4"]
    assert report.unknown_loops == 0
    assert report.launch_kinds["gemm fusion"] == 5


def test_reports_survive_json(reports):
    for report in reports.values():
        assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_a_compile_that_hangs_is_ended():
    (report,) = compile_cases([programs.SLEEPS], ["l4"], processes=1, timeout=1)
    assert report.error == "still compiling after 1 s, ended"


def test_ctrl_c_ends_the_children(monkeypatch):
    """The wait is interrupted while a child sleeps for a minute: it ends, and at once."""
    join = threading.Thread.join
    calls = []

    def interrupted(thread, timeout=None):
        calls.append(thread)
        if len(calls) == 1:
            join(thread, 3)
            raise KeyboardInterrupt
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        compile_cases([programs.SLEEPS], ["l4"], processes=1)
    assert time.monotonic() - start < 30


def test_more_instructions_than_promised_are_a_failure(reports):
    report = reports["matrix-vector probe", "h200"]
    (problem,) = dataclasses.replace(report, instruction_limit=4.0).problems()
    assert "4.344 instructions per weight, the limit is 4.0" in problem
    assert dataclasses.replace(report, instruction_limit=4.5).problems() == []


@pytest.mark.slow
def test_a_quick_report_finds_the_same_spills(reports):
    """Two of the jobs again, of which one wants its machine code counted."""
    probe = dataclasses.replace(programs.PROBE, instruction_limit=5.0)
    quick = compile_jobs(
        [(programs.SPILLS, "a100"), (probe, "l4"), (programs.SHARED, "t4")],
        processes=PROCESSES,
        thorough=False,
    )
    for report in quick:
        (kernel,) = report.mosaic_kernels
        (same,) = reports[report.case, report.gpu].mosaic_kernels
        assert kernel.name == same.name and kernel.registers == same.registers
        assert kernel.spill_store_bytes == same.spill_store_bytes
    assert [r.instructions_per_weight is None for r in quick] == [True, False, True]


def test_compile_for_takes_a_function():
    program = programs.PROBE.build()
    report = compile_for(program.function, program.arguments, "L4")
    assert report.problems() == []
    assert report.mosaic_kernels[0].name == "probe"


def test_a_case_that_no_other_process_can_import_is_explained():
    case = KernelCase(name="here only", kernel="k", build=lambda: programs.PROBE.build())
    (report,) = compile_cases([case], ["l4"], processes=1)
    assert "'here only' is not in kernel_cases.all_cases()" in report.error
    assert "functools.partial" in report.error


def test_an_unknown_gpu_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match="Unknown GPU 'p100'"):
        compile_cases([programs.PROBE], ["p100"])


@pytest.mark.slow
def test_updates_come_one_by_one():
    seen = []
    compile_cases([programs.FACTS], ["t4", "l4"], processes=PROCESSES, update=seen.append)
    assert sorted(report.gpu for report in seen) == ["l4", "t4"]


def test_errors_are_one_line_without_the_module():
    text = "INTERNAL: no\nroom\nmodule @k {\n  a\n}"
    assert one_line(text) == "INTERNAL: no room"


def test_missing_tools_are_explained(monkeypatch):
    monkeypatch.setattr(cuda_tools.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(cuda_tools.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"ptxas is not installed: pip install 'jax\["):
        cuda_tools.find("ptxas")
    assert "CUDA plugin is not installed" in str(unavailable())
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jax\[.*pip install -e '.\[aot\]'"):
        compile_cases([programs.PROBE], ["l4"])


def test_cases_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        programs.PROBE.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("missing", ["jax_plugins", "jax_plugins.xla_cuda13"])
def test_without_the_plugin_the_reason_says_how_to_install_it(monkeypatch, missing):
    def find_spec(name):
        if name == missing:
            return None
        if name.startswith(missing):
            raise ModuleNotFoundError(f"No module named {missing!r}")
        return object()

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    assert "nvidia-cuda-nvcc" in str(unavailable())


def test_a_limit_on_a_loop_that_is_not_there_is_a_problem():
    case = dataclasses.replace(programs.FITS, report="no_such_kernel", instruction_limit=5.0)
    case = dataclasses.replace(case, weights_per_iteration=4.0)
    report = Report(case=case.name, kernel=case.kernel, gpu="l4", arch="sm_89", jax="0", ok=True)
    counted = _with_instructions(report, case, GPUS["l4"], {})
    assert counted.problems()
