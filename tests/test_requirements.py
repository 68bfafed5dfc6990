"""`import fdq` says in one line what is installed, what is needed and what to run."""

import importlib.metadata
import subprocess
import sys
import tomllib

import pytest

from docs.import_graph import ROOT
from fdq import requirements


def test_the_ranges_are_those_of_the_distribution():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for name, range in requirements.NEEDED.items():
        assert name + range in project["dependencies"]
    assert project["requires-python"] == ">=" + ".".join(map(str, requirements.PYTHON))


@pytest.mark.parametrize(
    ("version", "good"),
    [("0.11.2", True), ("0.11.10", True), ("0.12.0.1", True), ("0.12.3.dev20260101+abc", True),
     ("0.11.1", False), ("0.10.2", False), ("0.13.0", False), ("0.13.0rc1", False), ("1.0", False),
     ("0.9", False), ("unknown", False), (None, False)],
)  # fmt: skip
def test_versions_are_numbers_not_text(version, good):
    assert requirements.suits(version, ">=0.11.2,<0.13") == good


FAKES = {
    "old jax": ("metadata", {"jax": "0.10.0"}, "found jax 0.10.0 and flax"),
    "new jax": ("metadata", {"jax": "0.14.1"}, "found jax 0.14.1 and flax"),
    "old flax": ("metadata", {"flax": "0.10.4"}, "flax 0.10.4. Run: pip install"),
    "no jax": ("metadata", {"jax": None}, "found jax (none)"),
    "old jax in memory": ("module", {"jax": "0.10.0"}, "then restart Python"),
    "old Python": ("python", {}, "fdq needs Python 3.12 or newer; this is Python 3.11.4."),
}


@pytest.mark.parametrize("case", FAKES)
def test_import_refuses_in_one_line_before_jax_is_imported(case, tmp_path):
    """In a process whose installation pretends to have these versions."""
    kind, versions, message = FAKES[case]
    script = ["import importlib.metadata as metadata, sys, types"]
    if kind == "python":
        script += ["sys.version_info = (3, 11, 4, 'final', 0)"]
    elif kind == "module":
        script += ["sys.modules['jax'] = jax = types.ModuleType('jax')"]
        script += [f"jax.__version__ = {versions['jax']!r}"]
    else:
        script += [
            f"fakes, real = {versions!r}, metadata.version",
            "def version(name):",
            "    found = fakes.get(name, 'real')",
            "    if found is None: raise metadata.PackageNotFoundError(name)",
            "    return real(name) if found == 'real' else found",
            "metadata.version = version",
        ]
    script += [
        "try: import fdq",
        "except ImportError as error: print(error)",
        "print('jax.numpy' in sys.modules)",
    ]
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(script)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    said, imported = run.stdout.splitlines()
    assert message in said, run.stderr
    assert imported == "False"
    if kind != "python":
        for name, range in requirements.NEEDED.items():
            assert f"'{name}{range}'" in said


def test_what_is_installed_here_suits():
    assert requirements.problem() is None
    assert requirements.installed("jax") == importlib.metadata.version("jax")
