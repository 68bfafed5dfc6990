"""The code of the README runs, in order and in one namespace; the commands of all pages exist.

The code of docs/ is that of tests/test_docs.py.
"""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from typer.main import get_command

from docs.import_graph import ROOT
from fdq.cli.app import app

PAGES = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
)

# Most of the time is XLA's; what its optimizations do is none of this test's business.
QUICKLY = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)


def test_the_pages_have_code():
    assert len(blocks("README.md", "python")) == 5
    assert len(blocks("README.md", "bash")) == 3


@pytest.mark.slow
def test_code_runs_in_order_beside_files_named_like_rooms_of_fdq(tmp_path):
    """Each block after those before it, and nothing before the first but Python itself."""
    (tmp_path / "script.py").write_text("\n".join(blocks("README.md", "python")))
    for name in ("checkpoints", "models", "ops", "formats", "cache", "docs", "tests", "benchmarks"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('this is the user\\'s module')\n")
    # Where fdq is not installed, it is found where this process finds it.
    places = [str(ROOT), str(ROOT / "checkpoints"), os.environ.get("PYTHONPATH", "")]
    run = subprocess.run(
        [sys.executable, "-W", "error", "script.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places), "XLA_FLAGS": "", **QUICKLY},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "KL to the reference" in run.stdout
    assert pathlib.Path(tmp_path, "ernie-w4a16c8", "fdq.json").is_file()


def commands(page):
    """Every `fdq ...` of a page's shell blocks and of its text, as a list of arguments."""
    text = "\n".join(blocks(page, "bash")).replace("&&", "\n")
    text += "\n" + "\n".join(
        found.replace("\n", " ")
        for found in re.findall(r"`(fdq [^`]+)`", (ROOT / page).read_text("utf-8"))
    )
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [line[1:] for line in lines if line and line[0] == "fdq"]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_commands_exist_with_these_options(page):
    known = get_command(app).commands
    for name, *arguments in commands(page):
        assert name in known, name
        options = {option for one in known[name].params for option in one.opts}
        used = {argument for argument in arguments if argument.startswith("-")}
        assert used <= options, (name, used - options)


def test_the_commands_are_found():
    found = json.dumps(commands("README.md"))
    assert '["demo"]' in found
    assert '"--against"' in found
