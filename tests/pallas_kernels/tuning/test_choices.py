"""Tuning tables: what is wrong in one is named; the first row that fits decides."""

import pytest

from pallas_kernels.tuning import choices

ROW = {"kernel": "matrix_vector", "formats": ["int4"], "use": "mosaic_gpu"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (3, r"choices\[0\] is 3, expected an object"),
        (ROW | {"colour": 1}, "unknown fields"),
        (ROW | {"kernel": "gemm"}, "kernel is 'gemm', expected one of"),
        (ROW | {"use": "cuda"}, "use is 'cuda'"),
        (ROW | {"formats": "int4"}, "formats is not a list"),
        (ROW | {"max_rows": "8"}, "expected whole numbers.*found max_rows"),
        (ROW | {"config": {"spllit": 3}}, "only .'block_columns'.*found spllit"),
        (ROW | {"kernel": "router", "config": {"split": 3}}, "for 'router' only .*found split"),
        (ROW | {"config": {"split": 2.5}}, "found split"),
    ],
)
def test_a_wrong_row_is_named(row, message):
    with pytest.raises(ValueError, match=message):
        choices.check({"choices": [row]}, "test.json")


def test_the_first_row_that_fits_decides(monkeypatch):
    rows = [
        ROW | {"max_rows": 1, "min_weights": 10, "max_weights": 20, "config": {"split": 4}},
        ROW | {"use": "xla"},
    ]
    choices.check({"choices": rows}, "test.json")
    monkeypatch.setattr(choices, "_rows", lambda file: rows if file == "a.json" else [])
    fits = choices.choose("A", "matrix_vector", "int4", rows=1, weights=15)
    assert (fits.use, fits.config, fits.source) == (
        "mosaic_gpu",
        {"split": 4},
        "tuning/a.json, row 0",
    )
    for rows_, weights in ((2, 15), (1, 9), (1, 21)):
        assert (
            choices.choose("A", "matrix_vector", "int4", rows=rows_, weights=weights).use == "xla"
        )
    assert choices.choose("B", "matrix_vector", "int4", rows=1, weights=15).source.startswith(
        "no row"
    )
