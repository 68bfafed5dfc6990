"""Sections of the GPU benchmark as processes: those that die, hang or have no time."""

import pathlib
import time

import pytest

from benchmarks import gpu_child
from benchmarks.gpu_child import Settings, start_section


def test_a_section_survives_a_case_that_kills_its_process():
    events = []
    failure = start_section(
        "tests.benchmarks.dying_section",
        Settings(smoke=True, seconds=60.0, more={"cases": "abcd"}),
        events.append,
        {"JAX_PLATFORMS": "cpu"},
    )
    assert failure is None
    by_case = {event["case"]: event for event in events}
    assert sorted(by_case) == list("abcd") and len(events) == 4
    assert "exit code 7" in by_case["b"]["error"]
    assert by_case["c"]["error"] == "ValueError: not this one"
    assert by_case["d"]["section"] == "test"


def test_a_process_that_dies_of_its_last_case_is_not_started_again(monkeypatch):
    started = []
    run = gpu_child._run
    monkeypatch.setattr(gpu_child, "_run", lambda *a: started.append(1) or run(*a))
    events = []
    settings = Settings(smoke=True, seconds=60.0, more={"cases": "ab"})
    section = "tests.benchmarks.dying_section"
    assert start_section(section, settings, events.append, {"JAX_PLATFORMS": "cpu"}) is None
    assert len(started) == 1
    assert [event["case"] for event in events] == ["a", "b"]


def test_cases_of_a_dead_process_are_skipped_without_another_if_no_time_is_left(monkeypatch):
    def run(module, settings, emit, env, tool):
        emit({"cases": ["b", "c"]})
        emit({"start": "b"})
        return "exit code 7"

    monkeypatch.setattr(gpu_child, "_run", run)
    events = []
    assert start_section("x", Settings(smoke=True, seconds=-1.0), events.append, {}) is None
    assert [sorted(event) for event in events] == [["case", "error"], ["case", "skipped"]]


@pytest.mark.slow
def test_a_section_that_a_tool_runs_ends_with_it(monkeypatch, tmp_path):
    """The tool is what is started; its child would hold the pipe, and the GPU, for a minute."""
    monkeypatch.setattr(gpu_child, "_GRACE", 8.0)
    pid = tmp_path / "pid"
    tool = ("bash", "-c", f'"$@" & echo $! > {pid}; wait', "tool")
    settings = Settings(smoke=False, seconds=1.0, more={"cases": "h"})
    section, environment = "tests.benchmarks.dying_section", {"JAX_PLATFORMS": "cpu"}
    events = []
    start_section(section, settings, events.append, environment, tool)
    assert "ended after 9 s" in events[0]["error"]
    assert _has_ended(int(pid.read_text()), within=30.0)


def _has_ended(pid: int, within: float) -> bool:
    """Whether a process is gone, or only a zombie: one that is killed goes on for a moment."""
    stop = time.monotonic() + within
    while time.monotonic() < stop:
        try:
            state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.05)
    return False


def test_settings_may_be_longer_than_an_argument():
    events = []
    more = {"cases": "a", "long": "x" * 300_000}
    settings = Settings(smoke=True, seconds=60.0, more=more)
    section = "tests.benchmarks.dying_section"
    assert start_section(section, settings, events.append, {"JAX_PLATFORMS": "cpu"}) is None
    assert [event["case"] for event in events] == ["a"]


def test_a_case_that_hangs_costs_its_own_time():
    events = []
    settings = Settings(smoke=False, seconds=60.0, case_seconds=2.0, more={"cases": "had"})
    environment = {"JAX_PLATFORMS": "cpu"}
    assert (
        start_section("tests.benchmarks.dying_section", settings, events.append, environment)
        is None
    )
    assert [event["case"] for event in events] == ["h", "a", "d"]
    assert "Timeout" in events[0]["error"]


def test_a_section_without_time_skips():
    events = []
    settings = Settings(smoke=True, seconds=-1.0, more={"cases": "abcd"})
    start_section("tests.benchmarks.dying_section", settings, events.append, {})
    assert [sorted(event) for event in events] == [["case", "skipped"]] * 4
