"""What the commands share: bars that say how much longer, warnings in one line, durations."""

import io
import re
import time
import warnings

import pytest
import rich.console
import typer

from fdq.analysis.conversion_cost import Cost
from fdq.cli import console, convert


def shown(monkeypatch, updates, **options):
    """What a bar has written to a terminal, without its colours and movements."""
    file = io.StringIO()
    terminal = rich.console.Console(file=file, force_terminal=True, width=160)
    monkeypatch.setattr(console, "err", terminal)
    with console.progress("Converting", **options) as update:
        for one in updates:
            update(*one)
            time.sleep(0.02)  # a rate needs two times
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())


def test_a_bar_of_bytes_has_amount_rate_and_time_left(monkeypatch):
    text = shown(monkeypatch, [(0, 8e9, "a"), (1e9, 8e9, "a"), (2e9, 8e9, "b")], in_bytes=True)
    last = [line for line in re.split(r"[\r\n]+", text) if "25%" in line][-1]
    assert "Converting b" in last
    assert "2.0/8.0 GB" in last
    assert "/s" in last
    assert "left:" in last


def test_a_bar_of_steps_has_no_bytes(monkeypatch):
    text = shown(monkeypatch, [(0, 4, ""), (4, 4, "")])
    assert "100%" in text
    assert "left:" in text
    assert "/s" not in text


def test_nobody_sees_a_bar_without_a_terminal(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(console, "err", rich.console.Console(file=file, force_terminal=False))
    with console.progress("Converting") as update:
        update(1, 2)
    assert file.getvalue() == ""


def test_a_line_of_a_table_stays_one_in_a_pipe(capsys, monkeypatch):
    cells = ("x" * 70, "y" * 70)
    for columns, lines in ((None, 1), ("80", 2)):
        monkeypatch.delenv("COLUMNS", raising=False)
        if columns:
            monkeypatch.setenv("COLUMNS", columns)
        console.out.print(console.table(None, ["a", "b"], [cells]))
        text = capsys.readouterr().out
        assert "\x1b" not in text
        assert len([line for line in text.splitlines() if "y" in line]) == lines


def test_a_reader_that_leaves_is_no_error(monkeypatch):
    """`fdq schemes | head -1`, where a table is what is printed."""

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(console.os, "dup2", lambda *_: None)
    monkeypatch.setattr(console, "out", type(console.out)(file=Closed()))
    with pytest.raises(typer.Exit) as ended:
        console.command(lambda debug: console.out.print("a table"))(debug=False)
    assert ended.value.exit_code == console.OK


def test_a_warning_is_one_line_without_the_place_in_the_sources(capsys):
    @console.command
    def run(debug=False):
        warnings.warn("mind this", stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        run()
    assert capsys.readouterr().err == "Warning: mind this\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (45.2, "45 s"), (100, "2 min"), (3540, "59 min"), (13_800, "3 h 50 min")],
)
def test_durations(seconds, text):
    assert console.duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "faster", "line"),
    [
        (
            13_800.0, True,
            "Choosing the codes of 21.3 billion weights takes about 3 h 50 min on this machine "
            "(search). --method absmax is faster and less accurate.",
        ),
        (13_800.0, False,
         "Choosing the codes of 21.3 billion weights takes about 3 h 50 min on this machine "
         "(search)."),
        (4.0, True, None),
    ],
)  # fmt: skip
def test_the_cost_of_a_search_is_said_if_it_is_long(seconds, faster, line, monkeypatch, tmp_path):
    cost = Cost(weights=21_300_000_000, seconds=seconds, quantizers=("search",), has_faster=faster)
    monkeypatch.setattr("fdq.analysis.conversion_cost.conversion_cost", lambda *a, **k: cost)
    assert convert.said_cost(tmp_path, "WINT2", None, None) == line
