"""docs/architecture.md says what is there: its picture is the code's, its files exist."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from docs import draw_architecture, draw_data_flow
from docs.import_graph import ROOT

PAGES = ["CONTRIBUTING.md", "README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]


def test_the_picture_is_drawn_from_this_code():
    assert draw_architecture.PICTURE.read_text() == draw_architecture.drawing(), (
        "run python -m docs.draw_architecture"
    )
    assert draw_data_flow.PICTURE.read_text() == draw_data_flow.drawing(), (
        "run python -m docs.draw_data_flow"
    )


def test_nothing_in_the_picture_overlaps():
    boxes = [
        [float(element.get(name)) for name in ("x", "y", "width", "height")]
        for element in ElementTree.fromstring(draw_architecture.drawing()).iter()
        if "box" in element.get("class", "").split()
    ]
    assert len(boxes) == len(draw_architecture.boxes()) > 20
    for i, (x, y, width, height) in enumerate(boxes):
        for left, top, *size in boxes[:i]:
            apart = (x >= left + size[0], left >= x + width, y >= top + size[1], top >= y + height)
            assert any(apart)


@pytest.mark.parametrize("page", PAGES)
def test_files_that_pages_speak_of_exist(page):
    folders = r"(?:fdq|pallas_kernels|checkpoints|benchmarks|tests|docs|examples)/"
    text = (ROOT / page).read_text("utf-8")
    # Of `fdq/ops/<op>/api.py` the part before the placeholder is looked for.
    named = re.findall(rf"(?<![\w/.-]){folders}[\w./-]*", text)
    assert named or page not in ("docs/architecture.md", "docs/gpu.md", "README.md")
    named = [name.rstrip(".") for name in named if "VERSION" not in name]
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
