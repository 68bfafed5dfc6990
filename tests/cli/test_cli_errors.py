"""Wrong input on the command line: one clear line, and exit code 2."""

import json
import sys

import numpy as np
import pytest

import fdq.cli
import fdq_checkpoints
from tests.cli.command import ROOT, TEXT, run


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        (("--prompt", "-"), b"\xff\xfe", "is no text in UTF-8"),
        (("--prompt", "\udcff"), None, "--prompt: no text in UTF-8"),
        (("--prompt", "a", "--temperature", 1, "--seed", 10**20), None, "--seed"),
        (("--prompt", "a", "--temperature", 1, "--seed", -1), None, "--seed"),
    ],
)
def test_prompts_and_seeds_that_are_none(converted, arguments, stdin, said):
    assert said in run("generate", converted, *arguments, stdin=stdin, code=2).stderr


def test_an_empty_path_is_not_the_current_directory(converted, monkeypatch):
    monkeypatch.chdir(converted)
    for arguments in (("inspect", ""), ("convert", "", "out"), ("convert", ".", "")):
        assert "an empty path" in run(*arguments, code=2).stderr


def test_a_tree_of_arrays_is_no_model(tmp_path):
    fdq.save({"w": np.ones((64, 32), np.float32)}, tmp_path / "tree")
    for command in ("generate", "evaluate"):
        said = run(command, tmp_path / "tree", code=2, stdin="a").stderr
        assert "a tree of arrays, not a model that decodes" in said


def test_a_shell_that_is_not_known():
    assert "tcsh: expected one of bash, zsh, fish" in run("completion", "tcsh", code=2).stderr


def test_an_error_is_an_object_for_programs(tmp_path):
    for arguments in (("inspect", tmp_path / "absent"), ("plan", "ernie-4.5-0.3b", "-s", "W5")):
        result = run(*arguments, "--json", code=2)
        content = json.loads(result.stdout)
        assert content["exit_code"] == 2
        assert content["error"] in result.stderr
        assert result.stdout.count("\n") == 1  # as lines of chats and batches are


def test_a_defect_is_told_from_wrong_use_in_one_screen(original, monkeypatch):
    def broken(depth):
        return broken(depth - 1) if depth else {}["key"]

    monkeypatch.setattr(fdq_checkpoints, "inspect", lambda *_, **__: broken(50))
    result = run("inspect", original, code=3)
    last = result.stderr.splitlines()[-1]
    assert (
        last
        == "Error: a defect of fdq: KeyError: 'key'. Please report it, with what --debug shows."
    )
    assert len(result.stderr.splitlines()) < 20
    assert "Traceback" in (whole := run("inspect", original, "--debug", code=3).stderr)
    assert "fdq/cli/inspect.py" in whole
    assert "fdq/cli/inspect.py" not in result.stderr

    def full(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(fdq_checkpoints, "inspect", full)
    assert "Error: out of memory: RES" in run("inspect", original, code=2).stderr


_BOTH = ("--calibration", "{text}", "--calibration-text", "{text}")
WRONG = {
    "unknown scheme": (["convert", "{original}", "{new}", "-s", "W4A16C9"], "Did you mean"),
    "unknown scheme of plan": (["plan", "ernie-4.5-0.3b", "-s", "W5"], "Unknown"),
    "a mesh that does not divide": (
        ["plan", "ernie-4.5-0.3b", "-s", "W4", "--mesh", "tensor=3"],
        "over tensor=3 does not divide",
    ),
    "a mesh that is none": (["plan", "ernie-4.5-0.3b", "-s", "W4", "--mesh", "8"], "tensor=4"),
    "sequences that a mesh does not divide": (
        ["plan", "ernie-4.5-0.3b", "-s", "W4", "--mesh", "data=3", "--batch", "4", "--gpu", "l4"],
        "Decode 6 at once, or use 1 there and the other devices for another axis.\n",
    ),
    "an axis without rules": (
        ["plan", "ernie-4.5-0.3b", "-s", "W4", "--mesh", "tp=2"],
        "no rule uses the axis 'tp'",
    ),
    "an unknown GPU": (["plan", "ernie-4.5-0.3b", "-s", "W4", "--gpu", "h1000"], "'h100'"),
    "a plot of nothing": (["plan", "ernie-4.5-0.3b", "-s", "W4", "--plot", "{new}"], "--gpu h100"),
    "unknown model": (["plan", "ernie-4.5-0.3c", "-s", "W4"], "Did you mean 'ernie-4.5-0.3b'"),
    "destination exists": (["convert", "{original}", "{original}", "-s", "W4A16"], "exist"),
    "how to replace it": (["convert", "{original}", "{original}", "-s", "W4A16"], "--overwrite"),
    "unknown dtype": (["generate", "{original}", "-p", "a", "--dtype", "float12"], "float12"),
    "part of a name": (["plan", "ernie-4.5-300b", "-s", "W4"], "mean 'ernie-4.5-300b-a47b'"),
    "missing source": (["convert", "{new}", "{new}2", "-s", "W4A16"], "does not exist"),
    "not a checkpoint": (["inspect", "{empty}"], "config.json"),
    "a file": (["generate", "{text}", "-p", "a"], "is a file"),
    "missing directory": (["evaluate", "{new}"], "does not exist"),
    "empty text": (["evaluate", "{original}", "--text", "{blank}"], "empty"),
    "binary text": (["evaluate", "{original}", "--text", "{binary}"], "not UTF-8"),
    "static scheme": (
        ["convert", "{original}", "{new}", "-s", "W8A8-static"],
        "--calibration-text",
    ),
    "no calibration": (
        ["convert", "{original}", "{new}", "-s", "W8A8-static", "--calibration", "{text}"],
        "text.txt: not a calibration",
    ),
    "two calibrations": (
        ["convert", "{original}", "{new}", "-s", "W4", *_BOTH],
        "drop one",
    ),
    "missing text": (["evaluate", "{original}", "--text", "{new}"], "No such file"),
    "prompt longer than the cache": (
        ["generate", "{original}", "-p", "a" * 50, "--context", "8"],
        "do not fit",
    ),
    "empty prompt with top-k only": (
        ["generate", "{original}", "-p", "a", "--top-k", "5"],
        "--temp",
    ),
    "bad probability": (
        ["generate", "{original}", "-p", "a", "--temperature", "1", "--top-p", "2"],
        "top_p",
    ),
    "quantized already": (["convert", "{converted}", "{new}", "-s", "W4A16"], "quantized already"),
    "group does not divide": (["convert", "{original}", "{new}", "-s", "W4A16-g96"], "96"),
    "scheme file is no JSON": (["convert", "{original}", "{new}", "-s", "{bad_json}"], "JSON"),
    "scheme file is missing": (["convert", "{original}", "{new}", "-s", "{new}.json"], "No such"),
    "unknown key": (["convert", "{original}", "{new}", "-s", "{unknown_key}"], "surprise"),
    "int4": (["convert", "{original}", "{new}", "-s", "int4"], "Did you mean 'wint4'?"),
    "another word for new tokens": (
        ["generate", "{original}", "-p", "a", "--max-tokens", "8"],
        "--max-new-tokens 8",
    ),
    "empty standard input": (["generate", "{original}", "-p", "-"], "which is empty: pipe a text"),
    "no model to chat with": (["chat", "{empty}"], "no config.json (nor fdq.json)"),
    "no model to evaluate": (["evaluate", "{empty}"], "no config.json (nor fdq.json)"),
    "no prompt at all": (["generate", "{original}"], "or give --prompt TEXT"),
    "another tokenizer": (
        ["evaluate", "{original}", "--text", "{text}", "--against", "{stranger}"],
        "differ in 2 tokens: 'a' is ",
    ),
    "a prompt without a tokenizer": (
        ["generate", str(ROOT / "tests" / "oracles" / "models" / "llama"), "-p", "a"],
        "no tokenizer.json, which a prompt needs. Put that of the original",
    ),
    "unknown cache": (["evaluate", "{original}", "--cache", "C5"], "C5"),
    "two sizes": (["recommend", "{original}", "--bits", "3", "--memory", "1"], "drop one"),
    "codes of another kind": (
        ["heal", "{original}", "{new}", "--teacher", "{original}", "--codes", "some"],
        "expected fixed or free",
    ),
    "report in no folder": (["evaluate", "{original}", "--html", "{new}/a.html"], "no folder"),
    "a report that is a folder": (["evaluate", "{original}", "--html", "{empty}"], "a directory"),
    "report beside static scales": (
        ["evaluate", "{original}", "--html", "{empty}/a.html", "--beside", "W8A8-static"],
        "W8A8-static has static scales",
    ),
    "curve of another kind": (
        ["heal", "{original}", "{new}", "--teacher", "{original}", "--plot", "{empty}/a.png"],
        "--plot {empty}/a.png: expected a name that ends with .svg",
    ),
    "too little to heal on": (
        ["heal", "{original}", "{new}", "--teacher", "{original}", "--text", "{blank}"],
        "empty; healing needs text",
    ),
    "recipe in no folder": (["recommend", "{original}", "--out", "{new}/a.json"], "no folder"),
    "bits that are no number": (["recommend", "{original}", "--bits", "inf"], "a number of bits"),
    "memory that is no number": (["recommend", "{original}", "--memory", "nan"], "positive number"),
    "no text to measure on": (["recommend", "{original}", "--text", "{binary}"], "not UTF-8 text"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gets_one_clear_line_and_code_2(case, original, converted, stranger, tmp_path):
    names = {"original": original, "converted": converted, "new": tmp_path / "new"}
    names["stranger"] = stranger
    names |= {"empty": tmp_path / "empty", "text": tmp_path / "text.txt"}
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text(TEXT)
    for name, data in (
        ("blank", b" \n"),
        ("binary", b"\xff\xfe\x00"),
        ("bad_json", b"{"),
        ("unknown_key", b'{"quantization": "mix_quant", "surprise": 1}'),
    ):
        names[name] = tmp_path / f"{name}.json"
        names[name].write_bytes(data)
    arguments, message = WRONG[case]
    result = run(*(a.format(**names) for a in arguments), code=2)
    assert message.replace("{empty}", str(names["empty"])) in result.stderr
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.output
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob("new.*tmp*"))


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    arguments = ("inspect", tmp_path / "absent")
    assert "Traceback" in run(*arguments, "--debug", code=2).stderr
    monkeypatch.setenv("FDQ_DEBUG", "1")
    assert "Traceback" in run(*arguments, code=2).stderr


def test_interrupt_is_quiet(original, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(fdq_checkpoints, "load", interrupted)
    result = run("generate", original, "-p", "a", code=130)
    assert result.stderr.strip() == "Interrupted."


def test_missing_extra_is_named(monkeypatch, capsys):
    for name in list(sys.modules):
        if name.startswith("fdq.cli.") or name.split(".")[0] == "typer":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as error:
        fdq.cli.main()
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert "pip install tokenizers typer rich" in message
    assert "pip install -e '.[cli]'" in message
