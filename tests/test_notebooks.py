"""The notebooks in examples/ run from top to bottom, and carry outputs that were looked at."""

import ast
import importlib
import os
import pathlib
import re

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
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
    assert ours
    for module, name in ours:
        if not hasattr(importlib.import_module(module), name):
            importlib.import_module(f"{module}.{name}")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
# The kernel's messages, of 2026-11: its zmq connection is to this machine only.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
def test_notebook_runs(path, monkeypatch):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in code), "commit the notebook with its outputs"
    # The kernel is a process of its own: it has neither this one's path nor its 8 devices.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
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
