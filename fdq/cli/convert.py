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
from fdq.cli.preparing import convert_prepared, say_of_experts
from fdq.quantizers.layer_inputs import moments_for
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
        typer.Option(
            help="What chooses the codes: search, absmax, signed_max, hqq; gptq or gptq2 (ldlq, "
            "ldlq2 for trellis codes, ccq, ccq2 for WINT2), which are calibrated. Default: by bits."
        ),
    ] = None,
    prepare: Annotated[
        list[str] | None,
        typer.Option(
            help="Change the model first, which stays the same function: rotate, smooth (8-bit "
            "activations) or awq; also several times. It is in memory as a whole then."
        ),
    ] = None,
    compat: console.Compat = None,
    calibration_text: Annotated[
        pathlib.Path | None,
        typer.Option(
            help="Text to calibrate on: for static scales, guided searches, and gptq, which "
            "without it takes Python's standard library."
        ),
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
    moments = {} if recipe is None else moments_for(Recipe.parse(recipe, compat=compat), method)
    if prepare:
        if recipe is None or calibration_file is not None or subtree or config:
            raise ValueError(
                "--prepare changes a model that is then calibrated and quantized: it needs "
                "--scheme, and takes no --calibration FILE, --config or --subtree."
            )
    elif calibration_text is not None or (calibration_file is None and any(moments.values())):
        with console.err.status("Calibrating ..."):
            calibration = calibrated(
                source, calibration_text, moments, config=config, subtree=subtree
            )
        if not json:
            say_of_experts(calibration)
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
    if prepare:
        assert recipe is not None
        with contextlib.redirect_stdout(printed):
            after = convert_prepared(
                source,
                destination,
                Recipe.parse(recipe, compat=compat),
                prepare,
                tokens=lambda model: sample(source, model, calibration_text, moments),
                moments=moments,
                method=method,
                compat=compat,
                dtype=dtype,
                overwrite=overwrite,
                quiet=json,
            )
    else:
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


MOMENT_ROWS, ROWS, ROW = 128, 32, 256
FEWEST_TOKENS = 512
"""Of less text second moments say nothing."""


def calibrated(
    source: pathlib.Path,
    text_file: pathlib.Path | None,
    moments: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Statistics of the float model over the beginning of a text file, 32 rows of 256 tokens.

    For `moments`, arguments of `calibrate`, 128 rows. Without a file the text is that of Python's
    standard library. `options` are those of `fdq.load`.
    """
    from fdq.calibration.observation import calibrate
    from fdq.storage import load

    model = load(source, **options)
    return calibrate(model, sample(source, model, text_file, moments), **(moments or {}))


def sample(
    source: pathlib.Path,
    model: Any,
    text_file: pathlib.Path | None,
    moments: dict[str, Any] | None = None,
) -> Any:
    """Tokens `[rows, length]` to calibrate a model on."""
    from fdq.analysis import sample_text
    from fdq.decoding.tokenizer import Tokenizer

    gathers = moments is not None and any(moments.values())
    rows = MOMENT_ROWS if gathers else ROWS
    tokenizer = Tokenizer.load(getattr(model, "tokenizer_path", None) or source)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, bos=True)

    if text_file is None:
        return sample_text.calibration_rows(encode, rows)
    least, purpose = (FEWEST_TOKENS, "second moments") if gathers else (1, "calibration")
    return sample_text.file_rows(encode, text_file, rows, length=ROW, least=least, purpose=purpose)
