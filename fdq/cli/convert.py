"""`fdq convert`: a float checkpoint to a quantized one."""

import collections
import contextlib
import io
import pathlib
import time
from typing import Annotated, Any

import typer

from fdq.calibration.statistics import Calibration
from fdq.cli import console
from fdq.schemes.recipe import Recipe

NAME = "convert"
EXAMPLE = (
    "Example:  fdq convert ERNIE-4.5-0.3B-PT ernie-w4a16c8 --scheme W4A16C8     |     "
    "fdq convert Qwen3-8B-AWQ qwen3-w4"
)


@console.command
def run(
    source: Annotated[
        pathlib.Path,
        typer.Argument(
            metavar="SRC",
            parser=console.path,
            help="Hugging Face, Paddle or Orbax checkpoint.",
        ),
    ],
    destination: console.Destination,
    scheme: Annotated[
        str | None,
        typer.Option(
            "--scheme",
            "-s",
            help=f"{console.SCHEME_HELP} Without it, what another tool quantized stays as it is.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="What chooses the codes: search, absmax, signed_max. Default: by bits."),
    ] = None,
    compat: console.Compat = None,
    calibration_text: Annotated[
        pathlib.Path | None,
        typer.Option(help="Text to calibrate on, for static scales and guided searches."),
    ] = None,
    calibration_file: Annotated[
        pathlib.Path | None,
        typer.Option("--calibration", help="Statistics that Calibration.save wrote, in its place."),
    ] = None,
    dtype: console.Dtype = None,
    subtree: Annotated[
        str | None,
        typer.Option(help="Of an Orbax checkpoint, only what is below this path, such as params."),
    ] = None,
    config: Annotated[
        pathlib.Path | None,
        typer.Option(help="config.json (or its directory) of the model whose tree Orbax holds."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an fdq checkpoint at DST.")
    ] = False,
    json: console.Json = False,
    debug: console.Debug = False,
) -> None:
    """Quantizes a checkpoint, tensor by tensor: about one layer is in memory.

    The same command goes on where a stopped conversion was, from the sibling DST.fdq-tmp.
    """
    from fdq_checkpoints import convert, inspect

    recipe = None if scheme is None else console.read_scheme(scheme)
    given = console.spelled(source)
    source = console.checkpoint_directory(source)
    if destination.exists() and not overwrite:
        raise FileExistsError(
            f"{destination} exists. Choose another DST, or replace an fdq checkpoint with "
            "--overwrite."
        )
    if calibration_text is not None and calibration_file is not None:
        raise ValueError("--calibration-text and --calibration both give statistics; drop one.")
    statistics = calibration_text or calibration_file
    if recipe is not None and Recipe.parse(recipe).needs_calibration and statistics is None:
        raise ValueError(
            f"{scheme} has static scales: give text to calibrate them on, --calibration-text FILE."
        )
    calibration = None
    if calibration_file is not None:
        calibration = Calibration.load(calibration_file)
    if calibration_text is not None:
        with console.err.status("Calibrating ..."):
            calibration = calibrated(source, calibration_text, config=config, subtree=subtree)
    before = inspect(source, subtree=subtree)
    if recipe is None and before.scheme is None:
        raise ValueError(
            f"{source} is not quantized: say what it is to be stored in, --scheme W4A16C8. "
            "fdq schemes lists what there is."
        )
    start = time.perf_counter()
    printed = io.StringIO()
    cost = None if json or recipe is None else said_cost(source, recipe, method, compat)
    if cost:
        console.err.print(cost, soft_wrap=True, markup=False)
    converting = console.progress("Converting", quiet=json, in_bytes=True)
    with converting as update, contextlib.redirect_stdout(printed):
        after = convert(
            source,
            destination,
            recipe,
            dtype=dtype,
            method=method,
            compat=compat,
            calibration=calibration,
            config=config,
            subtree=subtree,
            overwrite=overwrite,
            verbose=True,
            progress=update,
        )
    seconds = time.perf_counter() - start
    if json:
        console.print_json(
            {
                "source": given,
                "destination": str(destination),
                "scheme": after.scheme,
                "seconds": seconds,
                "bytes_before": before.nbytes,
                "bytes_after": after.nbytes,
                "weights": after.size,
                "bits_per_weight": after.bits_per_weight,
                "quantized_bits_per_weight": after.quantized_bits_per_weight,
                "formats": summary(after),
            }
        )
        return
    console.out.print(printed.getvalue().rstrip(), markup=False, soft_wrap=True)
    rows = [
        (row["format"], f"{row['tensors']}", f"{row['weights']:,}", console.size(row["bytes"]),
         f"{8 * row['bytes'] / max(1, row['weights']):.3f}")
        for row in summary(after)
    ]  # fmt: skip
    columns = ["stored as", "tensors", "weights", "size", "bits/weight"]
    console.out.print(console.table(f"{destination}: {after.scheme}", columns, rows))
    quantized = after.quantized_bits_per_weight
    console.out.print(
        f"bits per weight: {after.bits_per_weight:.3f} of all"
        + ("" if quantized is None else f", {quantized:.3f} of the quantized ones")
    )
    console.out.print(
        f"{console.size(before.nbytes)} -> {console.size(after.nbytes)} "
        f"({before.nbytes / after.nbytes:.2f} times smaller) in {seconds:.1f} s",
        markup=False,
    )


def summary(inspection: Any) -> list[dict[str, Any]]:
    """What is stored in which format: tensors, weights and bytes, the most bytes first."""
    groups = collections.defaultdict(list)
    for row in inspection.rows:
        groups[row.format].append(row)
    rows = [
        {
            "format": name,
            "quantized": members[0].quantized,
            "tensors": len(members),
            "weights": sum(row.size for row in members),
            "bytes": sum(row.nbytes for row in members),
        }
        for name, members in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])


def said_cost(
    source: pathlib.Path, recipe: Any, method: str | None, compat: str | None
) -> str | None:
    """How long codes will take to choose, in a line; None where that is soon or not known."""
    from fdq.analysis.conversion_cost import conversion_cost

    cost = conversion_cost(source, recipe, method=method, compat=compat)
    if cost is None or cost.seconds < 20:
        return None
    faster = " --method absmax is faster and less accurate." if cost.has_faster else ""
    return (
        f"Choosing the codes of {cost.weights / 1e9:.1f} billion weights takes about "
        f"{console.duration(cost.seconds)} on this machine ({', '.join(cost.quantizers)}).{faster}"
    )


def calibrated(
    source: pathlib.Path, text_file: pathlib.Path, *, rows: int = 32, **options: Any
) -> Any:
    """Statistics of the float model over the first rows x 256 tokens of a text file.

    `options` are those of `fdq.load`.
    """
    import numpy as np

    from fdq.calibration.observation import calibrate
    from fdq.decoding.tokenizer import Tokenizer
    from fdq.storage import load

    model = load(source, **options)
    tokenizer = getattr(model, "tokenizer_path", None) or source
    ids = Tokenizer.load(tokenizer).encode(text_file.read_text("utf-8"), bos=True)[: rows * 256]
    if not ids:
        raise ValueError(f"{text_file}: empty; calibration needs text.")
    length = min(256, len(ids))
    tokens = np.asarray(ids[: len(ids) // length * length], np.int32).reshape(-1, length)
    return calibrate(model, tokens)
