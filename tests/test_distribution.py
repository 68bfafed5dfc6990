"""What the package is called where it is installed from: `fdq` on the index is another project."""

import importlib.metadata
import pathlib
import re
import subprocess
import tomllib

import pytest

import fdq
from docs.import_graph import ROOT
from fdq_checkpoints import saving

NAME = "fdq-jax"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
TEXTS = {".ipynb", ".md", ".py", ".toml", ".txt", ".yaml", ".yml", ".sh", ""}
# What an installer is given, up to the end of the command.
INSTALLS = re.compile(r"(?:pip|pipx|uv|poetry|conda)\s+(?:tool\s+)?(?:install|add)\b([^\n`;&|]*)")
ANOTHER = re.compile(r"""(?:^|[\s'"\\(])fdq(?:\[[^\]]*\])?(?:[=<>~!@][^\s'"]*)?(?=$|[\s'",.\\)])""")


def wrong_commands(text):
    """Commands that would install the other project, and requirements that name it."""
    commands = [found[0] for found in INSTALLS.finditer(text) if ANOTHER.search(found[1])]
    lookups = re.findall(r"""(?:metadata\.)?(?:version|distribution)\(["']fdq["']\)""", text)
    return commands + lookups + re.findall(r"(?<![\w.-])fdq\[[a-z0-9,]+\]", text)


@pytest.mark.parametrize(
    "text",
    ["pip install fdq", "pip install -U fdq", "%pip install 'fdq[cli]'", "pip install fdq==0.1",
     "uv add fdq", "the extra `fdq[aot]`", 'importlib.metadata.version("fdq")',
     "pip install jax fdq.", r"%pip install \"fdq\"\n"],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(text):
    assert wrong_commands(text)


@pytest.mark.parametrize(
    "text",
    ["pip install -e '.[cli]' && fdq demo", "pip install fdq-jax", "pip install 'fdq-jax[cli]'",
     "pip install -e '.[aot]', then `fdq kernels`", "the fdq command: pip install typer"],
)  # fmt: skip
def test_the_search_finds_nothing_else(text):
    assert not wrong_commands(text)


def test_nothing_sends_people_to_the_other_project():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    names = listed.stdout.split("\n") if listed.returncode == 0 else map(str, ROOT.rglob("*"))
    files = [ROOT / name for name in names if pathlib.Path(name).suffix in TEXTS]
    files = [path for path in files if path.is_file() and path != pathlib.Path(__file__)]
    assert len(files) > 100
    wrong = {}
    for path in files:
        commands = wrong_commands(path.read_text("utf-8", errors="replace"))
        if commands:
            wrong[str(path.relative_to(ROOT))] = commands
    assert not wrong


def test_the_distribution_its_extras_and_its_command_have_their_names():
    assert PROJECT["name"] == NAME
    assert PROJECT["scripts"] == {"fdq": "fdq.cli:main"}
    assert PROJECT["version"] == fdq.__version__
    extras = PROJECT["optional-dependencies"]
    named = [one for extra in extras.values() for one in extra if one.startswith("fdq")]
    assert len(named) == 2
    for one in named:
        found = re.fullmatch(rf"{NAME}\[([a-z0-9,]+)\]", one)
        assert found, one
        assert set(found[1].split(",")) <= extras.keys()


def test_the_version_in_a_checkpoint_is_ours_whatever_is_installed_as_fdq(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"{name} of the index")
    monkeypatch.setattr(saving.metadata, "version", lambda name: f"{name} of the index")
    versions = saving.versions()
    assert versions["fdq"] == fdq.__version__
    assert versions["jax"] == "jax of the index"
