"""`fdq export`: a model as other programs load it."""

import pathlib
import time
from typing import Annotated

import typer

from fdq.cli import console

NAME = "export"
EXAMPLE = (
    "Example:  fdq export qwen3-w4 qwen3-vllm --to compressed-tensors     |     "
    "fdq export ernie-w2 ernie-floats --to dense"
)


@console.command
def run(
    source: Annotated[
        pathlib.Path,
        typer.Argument(
            metavar="SRC",
            parser=console.path,
            help="A model: made by fdq convert, or any other that fdq loads.",
        ),
    ],
    destination: console.Destination,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="compressed-tensors, gptq, gptq_v2, awq, mxfp4, nvfp4, fp8, bitsandbytes, gguf "
            "or dense (decoded); another name lists all that there are.",
        ),
    ],
    dtype: Annotated[
        str | None,
        typer.Option(
            callback=console.check_dtype,
            help="Of what --to dense decodes: bfloat16, float16, float32. Default: the model's.",
        ),
    ] = None,
    shard_size: Annotated[
        float, typer.Option(help="The most of tensors in one file, in GB (10^9 bytes).")
    ] = 5.0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export at DST.")
    ] = False,
    json: console.Json = False,
    debug: console.Debug = False,
) -> None:
    """Writes a model in another program's layout, its codes repacked bit for bit.

    What the layout cannot hold exactly is refused, and nothing is written.
    """
    from fdq_checkpoints.exporting import export

    source = console.checkpoint_directory(source)
    if not 0 < shard_size < 1e6:
        raise ValueError(f"--shard-size {shard_size:g}: expected a number of GB above 0.")
    if destination.exists() and not overwrite:
        raise FileExistsError(
            f"{destination} exists. Choose another DST, or replace an earlier export with "
            "--overwrite."
        )
    start = time.perf_counter()
    with console.progress("Exporting", quiet=json, in_bytes=True) as update:
        made = export(
            source,
            destination,
            to=to,
            dtype=dtype,
            shard_bytes=max(1, int(shard_size * 1e9)),
            overwrite=overwrite,
            progress=update,
        )
    seconds = time.perf_counter() - start
    if json:
        console.print_json(
            {
                "source": str(source),
                "destination": str(destination),
                "to": made.to,
                "seconds": seconds,
                "bytes": made.nbytes,
                "formats": made.formats,
                "notes": made.notes,
            }
        )
        return
    rows = [(name, f"{count}") for name, count in made.formats.items()]
    console.out.print(console.table(f"{destination}: {to}", ["stored as", "tensors"], rows))
    for note in made.notes:
        console.out.print(note, markup=False, soft_wrap=True)
    console.out.print(f"{console.size(made.nbytes)} in {seconds:.1f} s", markup=False)
