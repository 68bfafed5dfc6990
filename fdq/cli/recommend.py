"""`fdq recommend`: how many bits each layer of a model should get, for a size of the whole."""

import math
import pathlib
from typing import Annotated

import typer

from fdq.cli import console
from fdq.cli.convert import ROW

NAME = "recommend"
EXAMPLE = (
    "Example:  fdq recommend Qwen3-8B --bits 3 --out recipe.json     |     "
    "fdq convert Qwen3-8B qwen3-3bit --scheme recipe.json"
)
ROWS = 8


@console.command
def run(
    directory: console.Directory,
    bits: Annotated[
        float | None,
        typer.Option(min=1, help="By quantized weight on average, scales included. Default: 3."),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(help="In its place: GB (10^9 bytes) for all weights, without the cache."),
    ] = None,
    candidates: Annotated[
        str, typer.Option(help="Schemes to choose from, with commas.")
    ] = "W2A16,W3A16,W4A16,W8A16",
    by: Annotated[
        str, typer.Option(help="layer: each tensor by itself; kind: alike in all layers.")
    ] = "layer",
    text: Annotated[
        pathlib.Path | None,
        typer.Option("--text", help="Text to measure on. Default: Python's standard library."),
    ] = None,
    out: Annotated[
        pathlib.Path | None, typer.Option("--out", help="Write the recipe, for convert --scheme.")
    ] = None,
    plot: Annotated[
        pathlib.Path | None, typer.Option("--plot", help="Draw costs and choices, an SVG file.")
    ] = None,
    json: console.Json = False,
    debug: console.Debug = False,
) -> None:
    """Measures what quantizing each layer costs, and picks the best mixture of a size.

    Nothing is converted.
    """
    from fdq.analysis.sensitivity import measure
    from fdq.cli.heal import training_rows
    from fdq.decoding.tokenizer import Tokenizer
    from fdq.storage import load

    if bits is not None and memory is not None:
        raise ValueError("--bits and --memory both give a size; drop one.")
    if by not in ("layer", "kind"):
        raise ValueError(f"--by {by}: expected layer or kind.")
    console.writable("--out", out, ".json")
    console.writable("--plot", plot, ".svg")
    if bits is not None and not math.isfinite(bits):
        raise ValueError(f"--bits {bits}: expected a number of bits.")
    if memory is not None and not 0 < memory < math.inf:
        raise ValueError(f"--memory {memory}: expected a positive number of GB.")
    directory = console.decoder_directory(directory)
    tokenizer = Tokenizer.load(console.text_directory(directory))
    rows, _ = training_rows(tokenizer, text, ROWS, least=ROWS * ROW, purpose="measuring layers")
    with console.progress("Loading", quiet=json, in_bytes=True) as update:
        model = load(directory, prepare=False, progress=update)
    with console.progress("Measuring", quiet=json) as update:
        names = [name.strip() for name in candidates.split(",") if name.strip()]
        found = measure(model, rows, candidates=names, by=by, progress=update)  # pyright: ignore[reportArgumentType] - checked above
    nbytes = None if memory is None else int(memory * 1e9)
    chosen = found.chosen(bits=3.0 if bits is None and memory is None else bits, nbytes=nbytes)
    recipe = found.recipe_of(chosen)
    if out is not None:
        out.write_text(recipe.to_json() + "\n", "utf-8")
    if plot is not None:
        found.plot(plot, chosen)
    if json:
        figures = {"bits_per_weight": found.bits_of(chosen), "kl_estimate": found.kl_of(chosen)}
        console.print_json({"recipe": recipe.to_dict()} | figures | {"tokens": ROWS * ROW})
        return
    columns = ["tensors", "weights", "scheme", "bits/weight", "KL alone"]
    console.out.print(console.table(str(directory), columns, found.rows(chosen)))
    console.out.print(
        f"bits per quantized weight: {found.bits_of(chosen):.3f}; KL about "
        f"{found.kl_of(chosen):.5f} nats per token, the sum of the last column"
    )
    if out is None:
        console.out.print(recipe.to_json(), markup=False, soft_wrap=True)
