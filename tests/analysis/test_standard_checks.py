"""The checks of `fdq kernels --check`: every kernel that a model may ask about is among them."""

import pathlib
import re

import pytest

import fdq
from fdq.analysis import standard_checks
from fdq.ops.attention import cudnn

ROOT = pathlib.Path(fdq.__file__).parent / "ops"


@pytest.fixture
def checks(monkeypatch):
    monkeypatch.setattr(standard_checks, "compute_capability", lambda: 9.0)
    return list(standard_checks.standard_checks())


def test_every_kernel_has_checks(checks):
    """As the sources of ops name them: in a `Check`, or as what the tuning table calls them."""
    sources = "\n".join(path.read_text("utf-8") for path in sorted(ROOT.rglob("*.py")))
    named = set(re.findall(r'\bCheck\(\s*"(\w+)"', sources))
    named |= set(re.findall(r'^_?(?:KERNEL|INTEGERS|GATHERED) = "(\w+)"', sources, re.MULTILINE))
    assert {"append", "float8_product", "decode_weight", "gathered_mma"} < named
    assert named | {"matrix_vector", "integer_matrix_vector"} == {one.kernel for one in checks}
    names = [one.name for one in checks]
    assert len(set(names)) == len(names)


def test_libraries_are_checked_where_they_multiply(checks, monkeypatch):
    prompts = [one for one in checks if one.kernel == "prompt_attention"]
    assert len(prompts) == len(standard_checks.HEADS)
    assert {one.tolerance for one in prompts} == {cudnn._TOLERANCE}
    monkeypatch.setattr(standard_checks, "compute_capability", lambda: 7.5)
    others = {one.kernel for one in standard_checks.standard_checks()}
    assert {one.kernel for one in checks} - others == {"float8_product", "prompt_attention"}
