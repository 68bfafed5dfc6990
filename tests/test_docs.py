"""The site: the code of docs/ runs, page by page; links and the reference are whole."""

import functools
import importlib
import json
import os
import re
import shlex
import subprocess
import sys

import jax
import pytest

import fdq
from docs.import_graph import ROOT
from fdq.analysis.svg import STYLE
from fdq.schemes.recipe import Recipe
from tests.cli.command import run as command
from tests.covering import slow_but
from tests.sharding.many_devices import model_of

DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
# What a page takes is compilation; the slow ones show models that others do not compile.
BY_DEFAULT = ("schemes.md",)

# In one process for several pages, since what one compiles serves the next.
DRIVER = """
import contextlib, io, json, os, pathlib, sys, time, traceback

outcomes = {}
for page in sys.argv[1:]:
    file = pathlib.Path(page).resolve()
    folder = file.with_suffix("")
    folder.mkdir()
    os.chdir(folder)
    said, start, error = io.StringIO(), time.perf_counter(), None
    try:
        with contextlib.redirect_stdout(said):
            exec(compile(file.read_text("utf-8"), str(file), "exec"), {"__name__": "__main__"})
    except BaseException:
        error = traceback.format_exc()
    seconds = time.perf_counter() - start
    outcomes[file.stem] = {"error": error, "said": said.getvalue(), "seconds": seconds}
    os.chdir(file.parent)
print(json.dumps(outcomes))
"""


def blocks(name):
    """Python of a page; blocks that say `python notest` are for reading."""
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text("utf-8"), re.DOTALL)


WITH_CODE = [name for name in PAGES if blocks(name)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs pages in a process of their own; remembers what came of each."""

    @functools.cache
    def outcomes(names):
        folder = tmp_path_factory.mktemp("pages")
        scripts = [folder / f"{name.removesuffix('.md')}.py" for name in names]
        for name, script in zip(names, scripts, strict=True):
            script.write_text("\n".join(blocks(name)), "utf-8")
        places = [str(ROOT), str(ROOT / "checkpoints"), os.environ.get("PYTHONPATH", "")]
        ran = subprocess.run(
            [sys.executable, "-W", "error", "-c", DRIVER, *map(str, scripts)],
            cwd=folder,
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join(places),
                "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr[-3000:]
        return json.loads(ran.stdout.splitlines()[-1])

    return outcomes


@pytest.mark.parametrize("name", slow_but(BY_DEFAULT, WITH_CODE))
def test_the_code_of_a_page_runs(name, run):
    group = tuple(n for n in WITH_CODE if (n in BY_DEFAULT) == (name in BY_DEFAULT))
    outcome = run(group)[name.removesuffix(".md")]
    assert outcome["error"] is None, outcome["error"]
    assert " nan" not in outcome["said"]


def test_what_needs_several_hosts_runs_on_one(tmp_path, monkeypatch, capsys):
    """The one block that is not for every reader, with two devices and a model of this test's.

    tests/sharding has programs for several processes.
    """
    found = [
        code
        for name in PAGES
        for code in re.findall(
            r"```python notest\n(.*?)```", (DOCS / name).read_text("utf-8"), re.DOTALL
        )
    ]
    assert len(found) == 1
    model, prompts, code = model_of("llama", "W4A16C8"), [[3, 1, 4]], found[0]
    fdq.save(model, tmp_path / "model")
    for said, here in (("(16,)", "(2,)"), ("/shared/model", str(tmp_path / "model"))):
        assert said in code
        code = code.replace(said, here)
    others = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda: others.append("others"))
    exec(compile(code, "several_devices.md", "exec"), {"prompts": prompts})
    assert others == ["others"]
    assert capsys.readouterr().out == f"{fdq.generate(model, prompts, 64)}\n"


@pytest.mark.slow
def test_the_picture_of_a_checkpoint_is_what_its_commands_draw(tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    commands = re.findall(
        r"```bash\n(.*?)```", (DOCS / "checkpoints.md").read_text("utf-8"), re.DOTALL
    )
    for line in commands[0].splitlines():
        assert line.startswith("fdq ")
        command(*shlex.split(line)[1:])
    drawn = (tmp_path / "layers.svg").read_text("utf-8")
    assert drawn == (DOCS / "layers.svg").read_text("utf-8"), "draw it anew, by those commands"


def test_pages_of_the_navigation_are_those_there_are():
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert sorted(re.findall(r"[\w-]+\.md", text[text.index("\nnav:") :])) == PAGES


@pytest.mark.parametrize("name", [*PAGES, "../README.md"])
def test_links_lead_somewhere(name):
    """Files that are there, and headings that those pages have."""
    text = re.sub(r"```.*?```", "", (DOCS / name).read_text("utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        assert not re.match(r"https?://(?!docs\.jax\.dev|huggingface\.co)", target), target
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        page = (DOCS / name).parent / path if path else DOCS / name
        assert page.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), flags=re.MULTILINE)
            assert anchor in {slug(head) for head in heads}, target


def test_pictures_follow_light_and_dark():
    """All of them are SVG that fdq.analysis.svg made."""
    shown = {
        target
        for name in PAGES
        for target in re.findall(r"!\[[^]]+\]\(([^)\s]+)\)", (DOCS / name).read_text("utf-8"))
    }
    assert shown == {path.name for path in DOCS.iterdir() if path.suffix in (".svg", ".png")}
    for name in shown:
        assert f"<style>{STYLE}</style>" in (DOCS / name).read_text("utf-8"), (
            f"{name}: draw it anew"
        )


def schemes_of(name):
    """Whole names in code of a page, such as `W4A16C8-g64`."""
    text = (DOCS / name).read_text("utf-8")
    return re.findall(
        r"[`\"](W(?:\d|NF|fp|MX|NV|CC|T\d)[\w.]*A\d+(?:C\w+)?(?:-[\w-]+)?)[`\"]", text
    )


@pytest.mark.parametrize("name", [*PAGES, "../README.md"])
def test_schemes_that_pages_name_are_schemes(name):
    for scheme in schemes_of(name):
        Recipe.parse(scheme)


def test_schemes_are_found_in_pages():
    assert sum(len(schemes_of(name)) for name in PAGES) > 50


def slug(head):
    """As Python-Markdown's `toc` makes it of a heading."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", head.replace("`", "")).strip().lower())


def test_the_reference_has_every_public_name():
    text = (DOCS / "api.md").read_text("utf-8")
    shown = re.findall(r"^::: ([\w.]+)$", text, flags=re.MULTILINE)
    assert len(shown) == len(set(shown))
    modules = {"linen", "models", "nn", "ops", "sharding", "requirements"}
    public = set(re.findall(r"import \w+ as ([A-Za-z]\w+)$", source(), flags=re.MULTILINE))
    assert {f"fdq.{name}" for name in public - modules} <= set(shown)
    for name in shown:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def source():
    with open(fdq.__file__, encoding="utf-8") as file:
        return file.read()
