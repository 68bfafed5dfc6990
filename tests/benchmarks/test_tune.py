"""From measured times to rows of a tuning table."""

import itertools
import json

import pytest

from benchmarks import gpu_timing, gpu_tuning, tune
from benchmarks.gpu_products import entry
from pallas_kernels.tuning import choices

NOISY, FAILED = {"error": "too noisy to time", "noisy": True}, {"error": "ValueError: no"}


def measured(kernel="matrix_vector", format="int4", rows=1, bound=None, *shapes, least=None):
    def entry(found):
        return found if isinstance(found, dict) else {"seconds": found}

    entries = [
        {"shape": (1, 1), "entries": {name: entry(found) for name, found in one.items()}}
        for one in shapes
    ]
    fields = {"case": "x", "kernel": kernel, "format": format, "rows": rows}
    return {**fields, "min_weights": least, "max_weights": bound, "shapes": entries}


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
    failed = measured("matrix_vector", "int8", 8, None, {"{}": FAILED, SPLIT: NOISY, "xla": 0.5})
    assert tune.row_of(failed)["use"] == "xla"
    assert tune.row_of(measured("matrix_vector", "int8", 8, None, {"{}": 1.0, "xla": 0.99}))[
        "use"
    ] == ("mosaic_gpu")
    assert tune.row_of(measured("matrix_vector", "int8", 8, None, {})) is None


def row_of(*shapes):
    return tune.row_of(measured("matrix_vector", "int4", 1, None, *shapes))


def test_what_is_too_noisy_to_time_says_nothing():
    assert row_of({"{}": NOISY, SPLIT: 0.9, "xla": 0.5}) is None
    assert row_of({"{}": 1.0, "xla": 0.5}, {"{}": NOISY, "xla": 0.5}) is None
    assert row_of({"{}": FAILED, "xla": NOISY}) is None
    assert row_of({"{}": {"error": "RESOURCE_EXHAUSTED: out of memory"}, "xla": 0.5}) is None
    # The others are compared where a candidate, or XLA, is noisy.
    assert row_of({"{}": 1.0, SPLIT: NOISY, "xla": 0.5})["use"] == "xla"
    row = row_of({"{}": 1.0, SPLIT: 0.5, "xla": NOISY})
    assert row["use"] == "mosaic_gpu" and row["config"] == {"split": 8}


def test_noise_is_told_from_failure_where_it_is_timed(monkeypatch):
    steady, noisy = [1.0] * 9, [0.1, 3.0] * 9
    assert "noisy" not in entry(gpu_timing._timing(steady, 1, 0.0, smoke=False))
    found = entry(gpu_timing._timing(noisy, 1, 0.0, smoke=False))
    assert found["noisy"] and "too noisy" in found["error"]
    assert "noisy" not in entry("ValueError: no")
    assert row_of({"{}": found, "xla": 0.5}) is None


def chooser(monkeypatch, rows):
    """Looks a matrix of int4 up in a table with ``rows``, and in the real defaults."""
    read = choices._rows
    monkeypatch.setattr(choices, "_rows", lambda f: rows if f == "some_gpu.json" else read(f))

    def choose(rows, weights):
        return choices.choose("Some GPU", "matrix_vector", "int4", rows=rows, weights=weights)

    return choose


def table_rows(*measured):
    return tune.merged([], [row for one in measured if (row := tune.row_of(one)) is not None])


def test_a_row_rules_its_own_class_alone(monkeypatch):
    slow = {"{}": 1.0, "xla": 0.5}
    choose = chooser(
        monkeypatch,
        table_rows(
            measured("matrix_vector", "int4", 1, None, slow, least=1001),
            measured("matrix_vector", "int4", 8, None, slow, least=1001),
        ),
    )
    for rows, use in ((1, "xla"), (2, "mosaic_gpu"), (4, "mosaic_gpu"), (5, "xla"), (8, "xla")):
        assert choose(rows, 5000).use == use, rows
        assert choose(rows, 1000).source.startswith("tuning/defaults.json")


def test_a_gap_between_rows_is_filled_by_what_is_measured_later(monkeypatch):
    slow = {"{}": 1.0, "xla": 0.5}
    first = table_rows(measured("matrix_vector", "int4", 8, None, slow))
    row = tune.row_of(measured("matrix_vector", "int4", 4, None, slow))
    rows = tune.merged(first, [row])
    assert [(row["max_rows"], row["use"]) for row in rows] == [
        (2, "mosaic_gpu"),
        (4, "xla"),
        (8, "xla"),
    ]
    assert choices.check({"choices": rows}, "test") == rows


def test_classes_of_sizes_begin_where_others_end():
    for table in (gpu_tuning.MATRIX_CLASSES, gpu_tuning.ATTENTION_CLASSES):
        found = gpu_tuning.classes(table)
        assert found[0][1] is None and found[-1][2] is None
        for (_, _, most), (shapes, least, _) in itertools.pairwise(found):
            assert least == most + 1
            assert table is gpu_tuning.ATTENTION_CLASSES or all(a * b > most for a, b in shapes)


def test_rows_are_looked_up_from_small_to_large(monkeypatch):
    times = {"{}": 1.0, "xla": 2.0}
    rows = table_rows(
        measured("decode_attention", "int8", 1, 100, times),
        measured("matrix_vector", "int4", 8, None, times, least=1001),
        measured("matrix_vector", "int4", 1, None, {"{}": 1.0, SPLIT: 0.5}, least=1001),
        measured("matrix_vector", "int4", 1, 1000, {"{}": 1.0, "xla": 0.5}),
    )
    assert choices.check({"choices": rows}, "test") == rows
    choose = chooser(monkeypatch, rows)
    assert choose(1, 500).use == "xla"
    assert choose(1, 5000).config == {"split": 8}
    assert choose(4, 500).use == "mosaic_gpu" and not choose(4, 500).config


def test_cases_are_unique_and_their_kernels_known():
    cases = gpu_tuning.tune_cases()
    assert len({case.key for case in cases}) == len(cases)
    assert {case.kernel for case in cases} == set(tune.KERNELS) <= set(choices.KERNELS)
    names = {case.format_name("float16") for case in cases}
    assert {"int4", "int8", "float16", "float8_e4m3", "cc2"} <= names


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """``tuned(*events)`` runs the tuner over them and returns the rows of its table."""
    path = tmp_path / "some_gpu.json"

    def find_machine(run):
        run.record["machine"] = {"device_kind": "Some GPU", "versions": {}}

    monkeypatch.setattr(tune.Run, "find_machine", find_machine)

    def run(*events, arguments=()):
        def start_section(module, settings, emit, env):
            for event in events:
                if isinstance(event, BaseException):
                    raise event
                emit(event)

        monkeypatch.setattr(tune, "start_section", start_section)
        tune.main(["--output", str(path), *arguments])
        return json.loads(path.read_text())["choices"]

    return run


def test_a_run_for_one_kernel_keeps_the_rows_of_the_others(tuned):
    times = {"{}": 1.0, SPLIT: 0.5, "xla": 2.0}
    before = tuned(
        measured("matrix_vector", "int4", 1, 1000, times),
        measured("decode_attention", "int8", 1, 100, {"{}": 1.0, "xla": 2.0}),
    )
    assert len(before) == 2
    slow = {"{}": 1.0, "xla": 0.5}
    rows = tuned(
        measured("decode_attention", "int8", 1, 100, slow),
        measured("decode_attention", "int4", 1, 100, {"{}": NOISY, "xla": 0.5}),
        arguments=("--only", "decode_attention"),
    )
    assert [row["use"] for row in rows] == ["mosaic_gpu", "xla"]
    assert rows[0] == before[0] and rows[0]["config"] == {"split": 8}


def test_what_was_measured_is_in_the_table_when_a_run_dies(tuned):
    times = {"{}": 1.0, "xla": 2.0}
    one, two = (measured("matrix_vector", name, 1, None, times) for name in ("int4", "int8"))
    assert len(tuned(one, KeyboardInterrupt())) == 1
    with pytest.raises(RuntimeError, match="of something else"):
        tuned(two, RuntimeError("of something else"))
    assert [row["formats"] for row in tuned(one)] == [["int4"], ["int8"]]


def test_a_table_of_something_else_is_not_written_to(tmp_path):
    path = tmp_path / "table.json"
    tune.write_table(path, {"device_kind": "Some GPU", "measured": True}, [])
    assert tune.read_table(path, "Some GPU", counts=True) == []
    for kind, counts in (("Other GPU", True), ("Some GPU", False)):
        with pytest.raises(ValueError, match="name another file"):
            tune.read_table(path, kind, counts=counts)


def test_runs_end_before_commands_do(capsys):
    with pytest.raises(SystemExit):
        tune.main(["--help"])
    assert "(9)" in capsys.readouterr().out


@pytest.mark.slow
def test_the_tuner_runs_without_a_gpu(tmp_path):
    path = tmp_path / "table.json"
    assert tune.main(["--smoke", "--output", str(path), "--only", "matrix_vector"]) == 0
    table = json.loads(path.read_text())
    assert table["measured"] is False
    assert {row["kernel"] for row in table["choices"]} == {"matrix_vector"}
