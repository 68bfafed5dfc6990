"""From measured times to rows of a tuning table."""

import json

import pytest

from benchmarks import gpu_tuning, tune
from pallas_kernels import choices


def measured(kernel="matrix_vector", format="int4", rows=1, bound=None, *shapes):
    entries = [
        {"shape": (1, 1), "entries": {name: {"seconds": s} for name, s in one.items()}}
        for one in shapes
    ]
    fields = {"case": "x", "kernel": kernel, "format": format, "rows": rows, "bound": bound}
    return {**fields, "shapes": entries}


SPLIT = '{"split": 8}'


def test_the_kernels_own_choice_stays_unless_something_is_clearly_faster():
    row = tune.row_of(measured("matrix_vector", "int4", 1, 99, {"{}": 1.0, SPLIT: 0.98, "xla": 2}))
    assert row == {
        "kernel": "matrix_vector",
        "formats": ["int4"],
        "max_rows": 1,
        "max_weights": 99,
        "use": "mosaic_gpu",
    }


def test_a_faster_cut_is_taken_if_it_is_faster_over_all_shapes():
    fast = {"{}": 1.0, SPLIT: 0.8, "xla": 2}
    assert tune.row_of(measured("matrix_vector", "int4", 1, None, fast))["config"] == {"split": 8}
    slow = {"{}": 1.0, SPLIT: 1.3, "xla": 2}
    row = tune.row_of(measured("matrix_vector", "int4", 1, None, fast, slow))
    assert "config" not in row


def test_xla_takes_over_where_it_is_faster_or_the_kernel_fails():
    assert tune.row_of(measured("matrix_vector", "int8", 8, None, {"{}": 1.0, "xla": 0.5}))[
        "use"
    ] == ("xla")
    assert tune.row_of(measured("matrix_vector", "int8", 8, None, {"xla": 0.5}))["use"] == "xla"
    assert tune.row_of(measured("matrix_vector", "int8", 8, None, {"{}": 1.0, "xla": 0.99}))[
        "use"
    ] == ("mosaic_gpu")
    assert tune.row_of(measured("matrix_vector", "int8", 8, None, {})) is None


def test_rows_are_looked_up_from_small_to_large(monkeypatch):
    times = {"{}": 1.0, "xla": 2.0}
    rows = tune.table_rows(
        [
            measured("decode_attention", "int8", 1, 100, times),
            measured("matrix_vector", "int4", 8, None, times),
            measured("matrix_vector", "int4", 1, None, {"{}": 1.0, SPLIT: 0.5}),
            measured("matrix_vector", "int4", 1, 1000, {"{}": 1.0, "xla": 0.5}),
        ]
    )
    assert choices.check({"choices": rows}, "test") == rows
    monkeypatch.setattr(choices, "_rows", lambda file: rows if file == "some_gpu.json" else [])

    def choose(rows, weights):
        return choices.choose("Some GPU", "matrix_vector", "int4", rows=rows, weights=weights)

    assert choose(1, 500).use == "xla"
    assert choose(1, 5000).config == {"split": 8}
    assert choose(4, 500).use == "mosaic_gpu" and not choose(4, 500).config


def test_cases_are_unique_and_their_kernels_known():
    cases = gpu_tuning.tune_cases()
    assert len({case.key for case in cases}) == len(cases)
    assert {case.kernel for case in cases} == set(tune.KERNELS) <= set(choices.KERNELS)
    names = {case.format_name("float16") for case in cases}
    assert {"int4", "int8", "float16", "float8_e4m3", "cc2"} <= names


@pytest.mark.slow
def test_the_tuner_runs_without_a_gpu(tmp_path):
    path = tmp_path / "table.json"
    assert tune.main(["--smoke", "--output", str(path)]) == 0
    table = json.loads(path.read_text())
    assert table["measured"] is False
    assert {row["kernel"] for row in table["choices"]} == set(tune.KERNELS)
