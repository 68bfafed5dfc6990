"""`fdq demo`: the main job on the shipped model, in one table."""

import contextlib
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Annotated

import rich.rule
import typer

from fdq.cli import console

NAME = "demo"
EXAMPLE = "Example:  fdq demo --scheme W4A16C8 --scheme wint2"
SCHEMES = ("W4A16C8", "W8A16C8", "WINT2")
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

    The text is held-out Python source code. All tokens attend to a quantized cache. The original
    and the first scheme also continue the prompt.
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
        update = stack.enter_context(console.progress("Demo", quiet=json))

        def told(index: int, name: str) -> Callable[[float, str], None]:
            return lambda share, note: update(index + share, 1 + len(names), f"{name}: {note}")

        comparison = Comparison.of_shipped_model(text_bytes=text_bytes, prompt=prompt)
        rows = [comparison.original(told(0, "original"))]
        for index, name in enumerate(names, start=1):
            row = comparison.measure(
                name, folder / name, decodes=index == 1, progress=told(index, name)
            )
            rows.append(row)
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
    columns = ["scheme", "size", "bits/weight", "of all", "bits/byte", "KL", "cache"]
    cells = [
        (
            row.name,
            console.size(row.report.weight_bytes or 0),
            *(
                "-" if bits is None else f"{bits:.3f}"
                for bits in (row.report.quantized_bits_per_weight, row.report.bits_per_weight)
            ),
            f"{row.report.bits_per_byte or 0:.4f}",
            f"{row.report.kl_nats_per_token or 0:.5f}",
            console.size(row.report.cache_bytes_per_token or 0),
        )
        for row in rows
    ]
    console.out.print(console.table(None, columns, cells))
    console.out.print(
        "bits/weight: of the quantized weights, and of all. KL: to the original, in nats per "
        "token. cache: per token. Speed shows in models larger than this one: see docs/cpu.md.\n"
    )
    for row in rows:
        if row.text is not None:
            rule = rich.rule.Rule(row.name, align="left", style="dim")
            console.out.print(rule, width=min(80, console.out.width))
            console.out.print(prompt + row.text, markup=False)
    console.out.print()
    if not comparison.is_reference_text:
        console.out.print(
            "Another Python's standard library is another text: bits per byte differ a little "
            "from those in docs/schemes.md.",
            style="dim",
        )
    console.out.print(f"{seconds:.0f} s, compilation included.", style="dim")
    if out is not None:
        console.out.print(f"Checkpoints: {out}. Try: fdq inspect {out / names[0]}", markup=False)
