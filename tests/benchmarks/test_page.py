"""The measured parts of pages."""

import json

import pytest

from benchmarks import cpu_table, page
from docs.import_graph import ROOT

RESULTS = ROOT / "benchmarks/results"


def test_a_part_goes_between_its_marks():
    begin, end = page.marks("speed")
    text = f"before\n{begin}\nold\n{end}\nafter\n"
    assert page.part(text, "speed") == "old"
    assert page.filled(text, "speed", "new") == f"before\n{begin}\nnew\n{end}\nafter\n"
    for lacking in ("no marks", f"{end} before {begin}"):
        with pytest.raises(ValueError, match="lacks the marks"):
            page.filled(lacking, "speed", "new")


def test_the_page_has_the_tables_of_the_committed_runs():
    found = page.part((ROOT / "docs/cpu.md").read_text("utf-8"), cpu_table.PART)
    runs = [cpu_table.Run.read(RESULTS / name) for name in cpu_table.COMMITTED]
    again = "python -m benchmarks.cpu_table --page docs/cpu.md"
    assert found == cpu_table.text(runs), f"make it again: {again}"


def test_ratios_are_of_the_same_run():
    run = cpu_table.Run.read(RESULTS / cpu_table.COMMITTED[0])
    table = run.products(1, 4096)
    dense, quantized = (table[name]["seconds"] for name in ("float32 dense", "W4A16"))
    assert f"| W4A16 | 8.7 MB | {dense / quantized:.2f} (" in cpu_table.one_row([run], 4096)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("not JSON", "found no JSON"),
        ("[1]", "benchmarks.cpu --json FILE` wrote"),
        (json.dumps({"machine": {"cpu": "x"}}), "no table 'matmul"),
    ],
)
def test_other_files_are_refused_by_name(content, said, tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(SystemExit):
        cpu_table.main([str(path)])
    error = capsys.readouterr().err
    assert said in error and "other.json" in error
