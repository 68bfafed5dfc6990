"""`fdq heal`: a quantized checkpoint tuned until it says again what its original says."""

import pathlib
from typing import Annotated, Any

import typer

from fdq.cli import console
from fdq.cli.convert import ROW

NAME = "heal"
EXAMPLE = (
    "Example:  fdq heal ernie-w2 ernie-w2-healed --teacher ERNIE-4.5-0.3B-PT --text book.txt"
    "     |     fdq heal ernie-w2 healed --teacher ERNIE-4.5-0.3B-PT --codes free --plot curve.svg"
)
ROWS = 1700


@console.command
def run(
    directory: console.Directory,
    destination: Annotated[
        pathlib.Path,
        typer.Argument(metavar="DST", parser=console.path, help="Directory to make."),
    ],
    teacher: Annotated[
        pathlib.Path, typer.Option("--teacher", help="The original that it was made from.")
    ],
    text: Annotated[
        pathlib.Path | None,
        typer.Option(
            "--text",
            help="Text to tune on, UTF-8. Default: Python's standard library, without the files "
            "that fdq evaluate reads.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of 2048 tokens each.")] = 150,
    codes: Annotated[
        str,
        typer.Option(help="fixed, or free to choose codes anew: slower, better at few bits."),
    ] = "fixed",
    tune: Annotated[
        str,
        typer.Option(help="What moves: scales,norms,routers,biases, and embeddings,head as well."),
    ] = "scales,norms,routers,biases",
    learning_rate: Annotated[
        float, typer.Option(help="The most that a step moves a number, as a share of it.")
    ] = 4e-3,
    seed: Annotated[int, typer.Option(help="Of the order of rows.")] = 0,
    plot: Annotated[
        pathlib.Path | None, typer.Option("--plot", help="Draw the curve, an SVG file.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an fdq checkpoint at DST.")
    ] = False,
    json: console.Json = False,
    debug: console.Debug = False,
) -> None:
    """Tunes scales, norms, routers and biases against the original's predictions; codes stay.

    The same command goes on where a stopped one was, from the sibling DST.fdq-heal.
    """
    from fdq.decoding.tokenizer import Tokenizer
    from fdq.healing.healing import heal, optimizers
    from fdq.storage import load, save
    from fdq_checkpoints import inspect

    given = console.spelled(directory)
    directory = console.decoder_directory(directory)
    teacher = console.checkpoint_directory(teacher)
    if destination.exists() and not overwrite:
        raise FileExistsError(
            f"{destination} exists. Choose another DST, or replace an fdq checkpoint with "
            "--overwrite."
        )
    optimizers()
    console.writable("--plot", plot, ".svg")
    if codes not in ("fixed", "free"):
        raise ValueError(f"--codes {codes}: expected fixed or free.")
    tokenizer = Tokenizer.load(console.text_directory(directory))
    rows, digest = training_rows(tokenizer, text, ROWS, least=16 * ROW, purpose="healing")
    with console.progress("Loading", quiet=json, in_bytes=True) as update:
        model = load(directory, prepare=False, progress=update)
        original = load(teacher, prepare=False, progress=update)
    state = destination.with_name(destination.name + ".fdq-heal")
    with console.progress("Healing", quiet=json) as update:
        healed = heal(
            model,
            original,
            rows,
            steps=steps,
            codes=codes,  # pyright: ignore[reportArgumentType] - checked above
            tuned=[word.strip() for word in tune.split(",") if word.strip()],
            learning_rate=learning_rate,
            seed=seed,
            state=state,
            progress=update,
        )
    record = {
        "teacher": teacher.name,
        "steps": steps,
        "codes": codes,
        "tuned": tune,
        "tokens_sha256": digest,
        "kl_before": healed.before,
        "kl_after": healed.after,
    }
    before = inspect(directory).provenance
    save(healed.model, destination, overwrite=overwrite, provenance={**before, "healed": record})
    if plot is not None:
        healed.plot(plot)
    state.unlink(missing_ok=True)
    if json:
        console.print_json({"checkpoint": given, "destination": str(destination)} | record)
        return
    lines = [
        ("KL to the original before", f"{healed.before:.5f} nats per token, held-out rows"),
        ("after", f"{healed.after:.5f}"),
        ("numbers tuned", f"{healed.numbers:,}"),
        ("took", console.duration(healed.seconds)),
    ]
    console.out.print(console.table(str(destination), ["", ""], lines, left=True))


def training_rows(
    tokenizer: Any, path: pathlib.Path | None, count: int, *, least: int, purpose: str
) -> tuple[Any, str]:
    """Tokens int32 `[N, 256]` of a file, or of the library's training split; and their hash.

    At most `count` rows; ValueError for a file of fewer than `least` tokens.
    """
    import hashlib

    from fdq.analysis import sample_text

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, bos=True)

    if path is None:
        rows = sample_text.calibration_rows(encode, count, length=ROW)
    else:
        rows = sample_text.file_rows(encode, path, count, length=ROW, least=least, purpose=purpose)
    return rows, hashlib.sha256(rows.tobytes()).hexdigest()
