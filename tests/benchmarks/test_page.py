"""The measured parts of pages."""

import json
import types

import pytest

from benchmarks import cpu_table, page, plan_table, schemes_picture
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


def test_the_picture_of_schemes_has_their_figures():
    rows = json.loads(schemes_picture.MEASURED.read_text("utf-8"))["rows"]
    again = "python -m benchmarks.schemes_picture"
    assert schemes_picture.PICTURE.read_text("utf-8") == schemes_picture.drawing(rows), again


def test_the_page_says_what_fits_on_a_card():
    table = page.part((ROOT / "docs/schemes.md").read_text("utf-8"), plan_table.CARDS)
    rows = {line.split(" | ")[0].strip("| "): line for line in table.splitlines()}
    assert set(plan_table.MODELS) <= set(rows)
    small = plan_table.cell("qwen3-0.6b", plan_table.GPUS["t4"].memory_bytes)
    assert f"| qwen3-0.6b | {small} |" in rows["qwen3-0.6b"]
    assert small.startswith("bf16 ")


def test_a_card_gets_the_first_scheme_that_leaves_a_tenth_of_it(monkeypatch):
    sizes = dict(zip(plan_table.LADDER, (16e9, 8e9, 4e9, 3e9, 2e9), strict=True))
    plans = lambda model, scheme: types.SimpleNamespace(total_bytes=sizes[scheme])  # noqa: E731
    monkeypatch.setattr(plan_table, "_plan", plans)
    found = [plan_table.cell("any", int(memory)) for memory in (18e9, 17e9, 4.5e9, 4.4e9, 2e9)]
    assert found == ["bf16 16.0", "W8A16C8 8.0", "W4A16C8 4.0", "WT3A16C8 3.0", "—"]


@pytest.mark.slow
def test_the_page_has_the_sizes_of_large_models():
    found = page.part((ROOT / "docs/schemes.md").read_text("utf-8"), plan_table.SIZES)
    assert found == plan_table.sizes(), "python -m benchmarks.plan_table --page docs/schemes.md"


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
