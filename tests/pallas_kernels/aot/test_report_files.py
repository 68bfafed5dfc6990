"""The committed reports say what they promise: no spills, no copies of weights, few launches."""

import json

import pytest

from pallas_kernels.aot.gpu_targets import GPUS
from pallas_kernels.aot.kernel_cases import all_cases
from pallas_kernels.aot.report_files import DIRECTORY, by_kernel, load

VERSIONS = [path.stem.removeprefix("jax-") for path in sorted(DIRECTORY.glob("jax-*.json"))]
DECODE_STEPS = sorted(DIRECTORY.glob("decode-step-*.json"))


@pytest.mark.parametrize("version", VERSIONS)
def test_every_kernel_runs_where_it_claims_to(version):
    """`fdq kernels --all --output pallas_kernels/reports/jax-VERSION.json` renews a report."""
    reports = {(report.case, report.gpu): report for report in load(version)}
    assert {report.jax for report in reports.values()} == {version}
    for case in all_cases():
        for gpu in case.gpus if case.representative else ():
            assert (case.name, gpu) in reports, f"{case.name} on {gpu} is not in the report"
            assert reports[case.name, gpu].problems() == []


@pytest.mark.parametrize("version", VERSIONS)
def test_the_table_has_a_line_for_each_kernel(version):
    reports = load(version)
    table = by_kernel(reports)
    assert list(table) == list(dict.fromkeys(report.kernel for report in reports))
    for cells in table.values():
        assert cells.keys() <= GPUS.keys()
        assert "spills" not in cells.values()


@pytest.mark.parametrize("path", DECODE_STEPS, ids=lambda path: path.stem)
def test_decode_steps_copy_nothing(path):
    """`fdq kernels --decode-step MODEL --gpu l4 --gpu a100 --gpu h200 --output FILE` renews it."""
    steps = json.loads(path.read_text())["decode_steps"]
    assert {step["gpu"] for step in steps} >= {"l4", "a100", "h200"}
    for step in steps:
        assert step["ok"], step["error"]
        assert step["layers"] == step["of_layers"]
        assert step["weight_copies"] == 0, step["large_results"]
        assert step["alias_bytes"] >= step["cache_bytes"]
        assert step["temp_fraction"] < 0.01
        assert step["launches_per_layer"] <= 12
        assert not any(kernel["spill_store_bytes"] for kernel in step["kernels"])
