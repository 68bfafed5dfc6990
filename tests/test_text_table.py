import pytest

from fdq.text_table import aligned, folded, markdown, size


def test_aligned_columns():
    rows = [("name", "bytes", "why"), ("a", "1,024"), ("longer", "8", "kept")]
    assert aligned(rows, right={1}, indent="  ").splitlines() == [
        "  name    bytes  why",
        "  a       1,024",
        "  longer      8  kept",
    ]
    assert aligned([]) == ""


def test_markdown_puts_figures_on_the_right():
    assert markdown(["kernel", "T4", "L4"], [("router", "yes", "–")]).splitlines() == [
        "| kernel | T4 | L4 |",
        "|---|---:|---:|",
        "| router | yes | – |",
    ]


def test_rows_that_differ_in_numbers_of_their_path_become_one():
    rows = [(f"layers.{i}.norm", "[8]") for i in (0, 1, 2, 5)] + [("norm", "[8]")]
    assert folded(rows) == [(4, ("layers.{0..2,5}.norm", "[8]")), (1, ("norm", "[8]"))]
    experts = [(f"layers.{i}.experts.{e}.up", "[8]") for i in (3, 4) for e in (0, 1, 2)]
    assert folded(experts) == [(6, ("layers.{3..4}.experts.{0..2}.up", "[8]"))]
    other = [("layers.0.norm", "[8]"), ("layers.1.norm", "[9]")]
    assert folded(other) == [(1, row) for row in other]
    assert folded([("a1.b", ""), ("a2.b", "")]) == [(1, ("a1.b", "")), (1, ("a2.b", ""))]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1234, "1.23 kB"), (12_340_000, "12.3 MB"),
     (4_200_000_000, "4.20 GB"), (-1500, "-1.50 kB")],
)  # fmt: skip
def test_sizes_are_in_the_unit_that_has_digits(count, text):
    assert size(count) == text
