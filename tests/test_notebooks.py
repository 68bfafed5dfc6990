"""The notebooks in examples/ run from top to bottom, and carry outputs that were looked at."""

import ast
import importlib
import os
import pathlib
import re
import sys
import tomllib

import nbclient
import nbformat
import pytest

from tests.covering import longest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
# The others take minutes; what they show is also in tests of benchmarks and of examples/qlora.py.
IN_CI = ("quickstart", "own_model", "which_scheme")
OURS = {"fdq", "fdq_checkpoints", "pallas_kernels", "benchmarks"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_what_a_notebook_imports_of_this_project_is_there(path):
    """A name that moved is noticed here, without running the notebook."""
    cells = nbformat.read(path, as_version=4).cells
    source = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    tree = ast.parse(re.sub(r"^(\s*)[%!].*", r"\1pass", source, flags=re.MULTILINE))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = [(n.module, alias.name) for n in nodes if n.module for alias in n.names]
    ours = [pair for pair in names if pair[0].split(".")[0] in OURS]
    ours += [
        ("fdq", node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "fdq"
    ]
    assert ours
    for module, name in ours:
        if not hasattr(importlib.import_module(module), name):
            importlib.import_module(f"{module}.{name}")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_installs_what_it_uses(path):
    """Imports are Python's own, what fdq needs, or in the extras that the first cell asks for."""
    cells = nbformat.read(path, as_version=4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    (extras,) = re.findall(r"%pip install --quiet -e '\{folder\}\[([a-z0-9,]+)\]'", code[0])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = list(project["dependencies"])
    for extra in extras.split(","):
        wanted += project["optional-dependencies"][extra]
    installed = {re.match(r"[\w-]+", one)[0].replace("-", "_") for one in wanted}
    source = re.sub(r"^(\s*)[%!].*", r"\1pass", "\n".join(code), flags=re.MULTILINE)
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.split(".")[0])
    assert imported - OURS - sys.stdlib_module_names <= installed
    assert "tokenizers" in installed  # for prompts


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_looks_at_its_environment_and_shows_a_plot(path):
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert "if not suits():" in code[0].source
    assert code[0].source.startswith("import") and "import jax" not in code[0].source
    assert all(cell.outputs for cell in code), "commit the notebook with its outputs"
    kinds = {kind for cell in code for output in cell.outputs for kind in output.get("data", ())}
    assert "image/png" in kinds
    words = "\n".join(cell.source for cell in cells)
    assert 'CLONE_URL = ""' in words  # there is no public repository to name
    assert "colab.research.google.com" not in words


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [path if path.stem in IN_CI else longest(path) for path in NOTEBOOKS],
    ids=lambda p: p.stem,
)
# The kernel's messages, of 2026-11: its zmq connection is to this machine only.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
def test_notebook_runs(path, monkeypatch):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in code), "commit the notebook with its outputs"
    # The kernel is a process of its own: it has neither this one's path nor its 8 devices.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # as for the README's code
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.get("name") == "stderr"], "a warning or an error"
    text = "".join(o.get("text", "") for o in outputs)
    assert " nan" not in text


def test_there_are_notebooks():
    assert NOTEBOOKS
