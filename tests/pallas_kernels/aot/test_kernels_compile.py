"""Every kernel and format, compiled for GPU generations that it claims: no spills.

With --slow one representative shape of each on Hopper (of the products of experts, which decode as
the others do, four formats), on the oldest generation one kernel of each kind and more of attention
and of appends, which are of float16 there, and on the others three kernels. Without --slow two
kernels on Hopper. `fdq kernels --all` compiles the rest.
"""

import os

import pytest
from covering import slow

from pallas_kernels.aot.ahead_of_time import compile_jobs, unavailable
from pallas_kernels.aot.kernel_cases import all_cases

# One GPU of each architecture: sm_75, sm_80, sm_89, sm_90a, sm_120a.
GENERATIONS = ("t4", "a100", "l4", "h100", "rtx_pro_6000")
CASES = all_cases()
ONE_OF_A_KIND = (
    "matrix-vector int4 groups of 128",
    "matrix-vector WINT2's code",
    "int8 x int4 groups of 128",
    "experts int4 groups of 128",
    "attention C8",
    "append C8",
    "router",
    "top-k experts",
)
ON_TENSOR_CORES = (
    ("16 rows x experts", "h100"),
    ("64 rows x int4 groups of 128", "h100"),
    ("8 rows x int8 per channel", "a100"),
    ("64 int8 rows x int4 groups of 128", "h100"),
    ("16 int8 rows x int8 per channel", "a100"),
    ("float8 rows x fp8 blocks of 128", "h100"),
)
ON_EVERY_GENERATION = ("matrix-vector int4 groups of 128", "attention C8", "append C8")
EXPERTS = tuple(
    f"experts {format}"
    for format in ("int4 groups of 128", "WINT2's code", "fp8 blocks of 128", "NVFP4")
)


def is_compiled(kernel, gpu):
    if " rows x " in kernel:
        return (kernel, gpu) in ON_TENSOR_CORES
    if gpu == "h100":
        return kernel in EXPERTS or not kernel.startswith("experts ")
    if gpu == "t4":
        return kernel in (*ONE_OF_A_KIND, "attention C4", "append C4")
    return kernel in ON_EVERY_GENERATION


JOBS = [
    (case, gpu)
    for gpu in GENERATIONS
    for case in CASES
    if case.representative and gpu in case.gpus and is_compiled(case.kernel, gpu)
]
ALWAYS = ("matrix-vector int4 groups of 128", "attention C8")
QUICK = [job for job in JOBS if job[0].kernel in ALWAYS and job[1] == "h100"]
needs_compiler = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


@pytest.fixture(scope="module")
def reports(request):
    jobs = JOBS if request.config.getoption("--slow") else QUICK
    # Another worker of pytest-xdist has the other core.
    processes = 1 if os.environ.get("PYTEST_XDIST_WORKER") else 2
    compiled = compile_jobs(jobs, processes=processes, thorough=False)
    return {(report.case, report.gpu): report for report in compiled}


@needs_compiler
@pytest.mark.parametrize(
    ("case", "gpu"),
    [
        (pytest.param if job in QUICK else slow)(*job, id=f"{job[0].kernel}-{job[1]}")
        for job in JOBS
    ],
)
def test_compiles_without_spills(reports, case, gpu):
    report = reports[case.name, gpu]
    assert report.problems() == []
    assert report.mosaic_kernels, "nothing of ours was compiled: the wrapper fell back to XLA"
    if case.kernel.startswith("attention "):  # `choose_parts` counts on so many at a time
        resident = 2 if gpu == "t4" or case.kernel == "attention C4" else 3
        registers = max(kernel.registers for kernel in report.mosaic_kernels)
        assert 65536 // (128 * (-(-registers // 8) * 8)) >= resident


def test_some_are_compiled_without_slow_too():
    assert len(QUICK) == len(ALWAYS)


def test_every_name_above_is_that_of_a_kernel():
    compiled = {(case.kernel, gpu) for case, gpu in JOBS}
    assert {(kernel, gpu) for kernel in ON_EVERY_GENERATION for gpu in GENERATIONS} <= compiled
    assert {(kernel, gpu) for kernel in ONE_OF_A_KIND for gpu in ("t4", "h100")} <= compiled
    assert compiled.issuperset(ON_TENSOR_CORES)
    assert {(kernel, "h100") for kernel in EXPERTS} <= compiled


def test_every_kernel_has_one_representative():
    counts = {case.kernel: 0 for case in CASES}
    for case in CASES:
        counts[case.kernel] += case.representative
    assert {kernel: n for kernel, n in counts.items() if n != 1} == {}
