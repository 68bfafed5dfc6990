from fdq.text_table import aligned, markdown


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
