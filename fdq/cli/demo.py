"""`fdq demo`: the main job on the shipped model, in one table."""

import contextlib
import pathlib
import tempfile
import time
from typing import Annotated

import typer

from fdq.cli import console

NAME = "demo"
EXAMPLE = "Example:  fdq demo --scheme W4A16C8 --scheme wint2"
SCHEMES = ("W8A16C8", "W4A16C8", "WINT2")
PROMPT = 'def main(argv=None):\n    """'


@console.command
def run(
    scheme: Annotated[
        list[str] | None,
        typer.Option("--scheme", "-s", help="Repeat it. Default: " + ", ".join(SCHEMES) + "."),
    ] = None,
    prompt: console.Prompt = PROMPT,
    text_bytes: Annotated[
        int, typer.Option(min=256, help="Bytes of held-out text to evaluate on.")
    ] = 16_384,
    out: Annotated[
        pathlib.Path | None,
        typer.Option(help="Keep the checkpoints in this new directory. Default: removed."),
    ] = None,
    json: console.Json = False,
    debug: console.Debug = False,
) -> None:
    """Converts the small model that ships with fdq, decodes with it, and compares.

    The text is held-out Python source code. All tokens attend to a quantized cache.
    """
    from fdq.analysis.comparison import Comparison

    start = time.perf_counter()
    names = tuple(scheme or SCHEMES)
    with contextlib.ExitStack() as stack:
        if out is None:
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fdq-")))
        else:
            if out.exists():
                raise FileExistsError(f"{out} exists; choose another --out or remove it.")
            folder = out
            folder.mkdir(parents=True)
        steps = 2 + len(names)
        update = stack.enter_context(console.progress("Demo", quiet=json))
        update(0, steps, "evaluating the original")
        comparison = Comparison.of_shipped_model(text_bytes=text_bytes, prompt=prompt)
        rows = [comparison.original()]
        for index, name in enumerate(names):
            update(1 + index, steps, name)
            rows.append(comparison.measure(name, folder / name))
    seconds = time.perf_counter() - start
    if json:
        console.print_json(
            {
                "text_sha256": comparison.text_sha256,
                "reference_text": comparison.is_reference_text,
                "seconds": seconds,
                "rows": [row.to_dict() for row in rows],
            }
        )
        return
    columns = ["scheme", "size", "bits/weight", "bits/byte", "KL", "tokens/s", "cache"]
    cells = [
        (
            row.name,
            console.size(row.report.weight_bytes or 0),
            f"{row.report.bits_per_weight or 0:.3f}",
            f"{row.report.bits_per_byte or 0:.4f}",
            f"{row.report.kl_nats_per_token or 0:.5f}",
            f"{row.tokens_per_second:,.0f}",
            console.size(row.report.cache_bytes_per_token or 0),
        )
        for row in rows
    ]
    console.out.print(console.table(None, columns, cells))
    console.out.print(
        "bits/weight: of the quantized weights. KL: to the original, in nats per token. cache: per "
        "token.\n"
    )
    for row in rows:
        console.out.rule(row.name, align="left", style="dim")
        console.out.print(prompt + row.text, markup=False)
    console.out.print()
    if not comparison.is_reference_text:
        console.out.print(
            "Another Python's standard library is another text: bits per byte differ a little "
            "from those in the README.",
            style="dim",
        )
    console.out.print(f"{seconds:.0f} s, compilation included.", style="dim")
    if out is not None:
        console.out.print(f"Checkpoints: {out}. Try: fdq inspect {out / names[0]}", markup=False)
