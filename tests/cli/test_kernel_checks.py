"""`fdq kernels --check`: what ends a process or hangs is one line, and what is found is read."""

import json
import logging
import sys
import textwrap

import jax
import pytest
from typer.testing import CliRunner

from fdq.cli import kernel_checks
from fdq.cli.app import app
from fdq.ops import self_check, verdicts
from fdq.ops.self_check import Check

ENVIRONMENT = {"device": "NVIDIA Test", "driver": "1", "jax": "0", "jaxlib": "0", "kernels": "ab"}
WORKER = """
    import json, os, signal, sys, time
    names = ["right", "wrong", "crash", "hang", "half", "memory", "after"]
    hello = {"platform": PLATFORM, "environment": ENVIRONMENT}
    print(json.dumps(hello | {"checks": {name: "a kernel" for name in names}}), flush=True)
    for line in sys.stdin:
        name = json.loads(line)
        if name == "crash":
            print("CUDA_ERROR_ILLEGAL_ADDRESS", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "hang":
            time.sleep(100)
        if name == "half":
            print('{"reason": nu', end="", flush=True)
            sys.exit(3)
        reason = {"wrong": "it differs", "memory": "RESOURCE_EXHAUSTED: no memory"}.get(name)
        print(json.dumps({"reason": reason, "seconds": 0.5}), flush=True)
"""


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["kernels", "--check", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FDQ_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def worker(monkeypatch):
    """A worker that knows seven checks; called with the platform of its device."""

    def use(platform):
        text = textwrap.dedent(WORKER).replace("ENVIRONMENT", repr(ENVIRONMENT))
        text = text.replace("PLATFORM", repr(platform))
        monkeypatch.setattr(kernel_checks, "_WORKER", (sys.executable, "-c", text))

    use("gpu")
    return use


def test_what_ends_a_process_or_hangs_is_one_line(worker, cache):
    found = json.loads(run("--limit", 1, "--json", code=1).stdout)
    assert found["device"] == "NVIDIA Test"
    assert {one["name"]: one["reason"] for one in found["checks"]} == {
        "right": None,
        "wrong": "it differs",
        "crash": "the process ended with SIGKILL: CUDA_ERROR_ILLEGAL_ADDRESS",
        "hang": "it took longer than 1 seconds",
        "half": "the process ended with status 3",
        "memory": "RESOURCE_EXHAUSTED: no memory",
        "after": None,
    }
    assert [one["ok"] for one in found["checks"]] == [True, *[False] * 5, True]
    (file,) = (cache / "kernels").iterdir()
    assert found["remembered_in"] == str(file)
    # For want of memory once is not for ever.
    reasons = {one["name"]: one["reason"] for one in found["checks"] if one["name"] != "memory"}
    assert verdicts.load(ENVIRONMENT) == reasons
    assert verdicts.load(ENVIRONMENT | {"driver": "2"}) == {}
    # One more run changes what it has looked at.
    output = run("--kernel", "RIGHT").stdout
    assert "NVIDIA Test" in output and "models start without these checks" in output
    assert len(verdicts.load(ENVIRONMENT)) == 6


def test_a_machine_without_a_gpu_is_offered_the_interpreter(worker, cache):
    worker("cpu")
    output = " ".join(run(code=2).stderr.split())
    assert "JAX found none here" in output and "fdq kernels --check --interpret" in output
    assert not (cache / "kernels").exists()
    assert run("--interpret", "--kernel", "right").stdout
    assert (
        "matches no check. There are: a kernel"
        in run("--interpret", "--kernel", "x", code=2).stderr
    )


def test_a_worker_that_cannot_start_says_why(monkeypatch):
    broken = (sys.executable, "-c", "raise ImportError('no driver')")
    monkeypatch.setattr(kernel_checks, "_WORKER", broken)
    assert "ended with status 1: ImportError: no driver" in run(code=1).stderr


def test_options_that_would_go_unread_are_refused():
    assert "--gpu, --all: not with --check" in run("--gpu", "l4", "--all", code=2).stderr
    result = CliRunner().invoke(app, ["kernels", "--interpret"])
    assert result.exit_code == 2 and "--interpret: only with --check" in result.stderr


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[" * 100_000, json.dumps({"environment": ENVIRONMENT, "checks": 3})]
)
def test_a_file_that_cannot_be_read_is_none(text, cache):
    verdicts.save(ENVIRONMENT, {"a": None, "b": "wrong"})
    assert verdicts.load(ENVIRONMENT) == {"a": None, "b": "wrong"}
    (file,) = (cache / "kernels").iterdir()
    file.write_text(text)
    assert verdicts.load(ENVIRONMENT) == {}
    verdicts.save(ENVIRONMENT, {"a": None})
    assert verdicts.load(ENVIRONMENT) == {"a": None}
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]


def test_without_a_directory_nothing_is_remembered(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("", str(tmp_path / "file")):
        monkeypatch.setenv("FDQ_CACHE_DIR", place)
        assert verdicts.save(ENVIRONMENT, {"a": None}) is None
        assert verdicts.load(ENVIRONMENT) == {}


def test_a_model_reads_what_was_found(monkeypatch, caplog):
    """Nothing runs; a kernel that failed is left alone with one warning."""
    device = jax.devices("cpu")[0]
    right = Check("append", "int8", lambda: pytest.fail("it ran"))
    wrong = Check("append", "int4", lambda: pytest.fail("it ran"))
    reason = "the process ended with SIGSEGV"
    verdicts.save(verdicts.environment_of(device), {right.name: None, wrong.name: reason})
    monkeypatch.setattr(self_check, "_RESULTS", {})
    with caplog.at_level(logging.WARNING, logger="fdq"):
        assert right.failure(device) is None
        assert [wrong.failure(device) for _ in range(2)] == [reason] * 2
    assert caplog.text.count("append[int4] is switched off on cpu: the process ended") == 1


@pytest.mark.longest
@pytest.mark.slow
def test_a_kernel_in_the_interpreter():
    found = json.loads(run("--interpret", "--kernel", "append[float8", "--json").stdout)
    (one,) = found["checks"]
    assert one["ok"] and found["device"] == "cpu" and one["seconds"] > 0
    assert verdicts.load(verdicts.environment_of(jax.devices("cpu")[0])) == {one["name"]: None}
