"""What the commands share: output, errors and exit codes, options, sizes, progress."""

import contextlib
import functools
import json
import os
import pathlib
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NoReturn

import rich.box
import rich.console
import rich.progress
import rich.table
import rich.text
import typer

from fdq.schemes.recipe import Recipe
from fdq.text_table import size as size

# Done; a check found something; what was asked cannot be done; a fault of fdq; Ctrl-C.
OK, FAILED_CHECK, WRONG_USE, DEFECT, INTERRUPTED = 0, 1, 2, 3, 130


class _Console(rich.console.Console):
    """Wide enough for a table's lines where no screen limits them: in a pipe, in a file."""

    @property
    def size(self) -> rich.console.ConsoleDimensions:
        """The terminal's or what `COLUMNS` says."""
        if self.is_terminal or "COLUMNS" in os.environ:
            return super().size
        return rich.console.ConsoleDimensions(_PIPED_COLUMNS, 25)

    def on_broken_pipe(self) -> None:
        """Whoever read has left: `command` ends as it does for what is not a table."""
        raise BrokenPipeError


_PIPED_COLUMNS = 200
out = _Console(highlight=False)
err = _Console(stderr=True, highlight=False)


def path(text: str) -> pathlib.Path:
    """A path as it is given; an empty one, say of a variable that is not set, is not `.`."""
    if not text:
        raise typer.BadParameter("an empty path. For the current directory give a dot.")
    return pathlib.Path(text)


Directory = Annotated[
    pathlib.Path,
    typer.Argument(
        parser=path,
        help="A checkpoint: Hugging Face or made by fdq convert; hf://owner/name is downloaded.",
    ),
]
Destination = Annotated[
    pathlib.Path,
    typer.Argument(metavar="DST", parser=path, help="Directory to make; must not exist."),
]
LoadScheme = Annotated[
    str | None, typer.Option("--scheme", "-s", help="Quantize a float checkpoint while loading it.")
]
Mesh = Annotated[
    str | None,
    typer.Option(
        "--mesh",
        help="Spread the model over devices: axes tensor, expert and data with their sizes, as in "
        "tensor=4,expert=2.",
    ),
]
Cache = Annotated[
    str | None, typer.Option(help="Cache format (C16, C8, Cfp8, C4). Default: the scheme's.")
]


def read_prompt(text: str) -> str:
    """A prompt from standard input where it is `-`, without the line end of its last line.

    Raises:
      ValueError: it is empty, or no text in UTF-8.
    """
    if text != "-":
        try:
            text.encode()
        except UnicodeEncodeError:  # of bytes of the command line that are none
            raise ValueError("--prompt: no text in UTF-8.") from None
        return text
    stream = typer.get_text_stream("stdin")
    if stream.isatty():
        typer.echo("The prompt, then Ctrl-D on a line of its own:", err=True)
    try:
        read = stream.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        said = f"The prompt from standard input is no text in UTF-8: {error.reason}."
        raise ValueError(said) from error
    if not read:
        raise ValueError(
            "The prompt comes from standard input, which is empty: pipe a text into the command or "
            "give --prompt TEXT."
        )
    return read


def _prompt_option(text: str) -> str:
    try:
        return read_prompt(text)
    except ValueError as error:  # options are read before `command` listens
        fail(str(error), WRONG_USE)


Prompt = Annotated[
    str,
    typer.Option(
        "--prompt", "-p", callback=_prompt_option, help="Text to continue; - is standard input."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error (also FDQ_DEBUG=1).")
]
SCHEME_HELP = (
    "What weights, activations and cache are stored in: W4A16C8, wint4, block_wise_fp8 ..., or a "
    'JSON file: FastDeploy\'s quantization_config, or rules such as {"*.experts": "W4A16", '
    '"*": "W8A16"}.'
)
Scheme = Annotated[str, typer.Option("--scheme", "-s", help=SCHEME_HELP)]
_DTYPES = ("bfloat16", "float16", "float32")


def check_dtype(name: str | None) -> str | None:
    """The name of a dtype that models compute in, or None; else it ends the program."""
    if name is not None and name not in _DTYPES:
        fail(f"--dtype {name!r}: expected one of {', '.join(_DTYPES)}.", WRONG_USE)
    return name


Dtype = Annotated[
    str | None,
    typer.Option(
        callback=check_dtype,
        help="Dtype of what is not quantized: " + ", ".join(_DTYPES) + ". Default: the file's.",
    ),
]
Compat = Annotated[
    str | None, typer.Option(help="'fastdeploy' follows its rounding and layer rules.")
]

# Errors of these types are the user's to act on: their message says what to do.
_USER_ERRORS = (ValueError, OSError, NotImplementedError, ModuleNotFoundError)
_PASSED_ON = (typer.Exit, typer.Abort, typer.BadParameter)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Turns errors into one clear line and an exit code; `function` has a `debug` parameter."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with _warnings_in_one_line():
                function(*args, **kwargs)
        except KeyboardInterrupt as error:  # a conversion says what it kept
            text = f"Interrupted. {error}".strip()
            err.print(rich.text.Text(text, style="red"), soft_wrap=True)
            raise typer.Exit(128 + getattr(error, "number", INTERRUPTED - 128)) from None
        except BrokenPipeError:
            # The reader (head, less) has left; nothing is wrong and nobody listens.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise typer.Exit(OK) from None
        except _USER_ERRORS as error:
            if is_debugging(kwargs):
                err.print(traceback.format_exc(), markup=False)
            _end(_one_line(error), WRONG_USE, kwargs)
        except _PASSED_ON:
            raise
        except Exception as error:
            if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
                said = (
                    f"out of memory: {_one_line(error)[:300]}. Take fewer bits or less --context."
                )
                _end(said, WRONG_USE, kwargs)
            # A screen holds the last frames; the others with --debug.
            limit = None if is_debugging(kwargs) else -3
            err.print(traceback.format_exc(limit=limit), markup=False)
            said = f"a defect of fdq: {type(error).__name__}: {_one_line(error)[:300]}"
            _end(f"{said}. Please report it, with what --debug shows.", DEFECT, kwargs)

    return run


def is_debugging(kwargs: dict[str, Any]) -> bool:
    """Whether somebody asked for tracebacks."""
    return bool(kwargs.get("debug") or os.environ.get("FDQ_DEBUG"))


def _end(message: str, code: int, kwargs: dict[str, Any]) -> NoReturn:
    """`fail`; with --json programs get an object too, on one line as those of chats and batches."""
    if kwargs.get("json"):
        typer.echo(json.dumps({"error": message, "exit_code": code}))
    fail(message, code)


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Warnings of fdq are for the user, not for whoever reads its sources: no file, no line."""
    usual = warnings.showwarning

    def show(message: Any, category: Any, *where: Any, **more: Any) -> None:
        if issubclass(category, UserWarning):
            err.print(rich.text.Text(f"Warning: {message}", style="yellow"), soft_wrap=True)
        else:
            usual(message, category, *where, **more)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def fail(message: str, code: int) -> NoReturn:
    """One red line on standard error, and the exit code."""
    err.print(rich.text.Text(f"Error: {message}", style="red"), soft_wrap=True)
    raise typer.Exit(code) from None


def say(text: str) -> None:
    """A line for people, on standard error, beside what is printed."""
    err.print(text, style="dim", markup=False, soft_wrap=True)


def complain(text: str) -> None:
    """An error after which the command goes on."""
    err.print(rich.text.Text(f"Error: {text}", style="red"), soft_wrap=True)


def spelled(path: pathlib.Path) -> str:
    """As it was given: pathlib makes one slash of two."""
    return re.sub(r"^hf:/+", "hf://", str(path))


def print_json(value: Any) -> None:
    """One JSON object on standard output, without colours or wrapping."""
    typer.echo(json.dumps(value, indent=2, default=str))


def table(
    title: str | None, columns: list[str], rows: list[tuple[str, ...]], *, left: bool = False
) -> rich.table.Table:
    """A table whose first column is text and whose others are right-aligned figures, or text."""
    result = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD)
    for index, name in enumerate(columns):
        result.add_column(name, justify="right" if index and not left else "left", overflow="fold")
    for row in rows:
        result.add_row(*(rich.text.Text(cell) for cell in row))
    return result


@contextlib.contextmanager
def progress(
    label: str, *, quiet: bool = False, in_bytes: bool = False
) -> Iterator[Callable[..., None]]:
    """A progress bar on standard error; yields `update(done, total, note="")`.

    It says how long it has run and how much longer it will; `in_bytes` also how many of how many,
    and at which rate.
    """
    if quiet or not err.is_terminal:
        yield lambda done, total, note="": None
        return
    bar = rich.progress.Progress(
        rich.progress.SpinnerColumn(),  # moves while XLA compiles, of which no share is known
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        *(_of_bytes() if in_bytes else ()),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("left:"),
        rich.progress.TimeRemainingColumn(),
        console=err,
        transient=True,
    )
    with bar:
        task = bar.add_task(label, total=None)

        def update(done: float, total: float | None, note: str = "") -> None:
            bar.update(task, completed=done, total=total, description=f"{label} {note}".strip())

        yield update


def _of_bytes() -> tuple[rich.progress.ProgressColumn, ...]:
    return rich.progress.DownloadColumn(), rich.progress.TransferSpeedColumn()


def duration(seconds: float) -> str:
    """In the two largest units that count: "45 s", "12 min", "3 h 50 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def read_scheme(text: str) -> Any:
    """What `--scheme` names: the scheme name itself, or the `Recipe` of a JSON file.

    The file holds FastDeploy's `quantization_config`, a config.json that has one, or rules.
    """
    if not text.lower().endswith(".json"):
        Recipe.parse(text)  # a wrong name is found before a model is read
        return text
    try:
        value = json.loads(pathlib.Path(text).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{text}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{text}: expected a JSON object, got {type(value).__name__}.")
    return Recipe.parse(value.get("quantization_config", value))


def loading_scheme(text: str | None) -> Any:
    """The scheme to load a checkpoint in; None keeps its own. ValueError for static scales."""
    if text is None:
        return None
    recipe = read_scheme(text)
    if Recipe.parse(recipe).needs_calibration:
        raise ValueError(
            f"--scheme {text} has static scales, which are calibrated: fdq convert SRC DST "
            f"--scheme {text} --calibration-text FILE makes a checkpoint that has them."
        )
    return recipe


def writable(option: str, path: pathlib.Path | None, suffix: str = "") -> None:
    """Wrong names and folders of what is going to be written are found before any work."""
    if path is None:
        return
    if not path.name.lower().endswith(suffix):
        raise ValueError(f"{option} {path}: expected a name that ends with {suffix}.")
    if not (folder := path.absolute().parent).is_dir():
        raise FileNotFoundError(f"{option} {path}: there is no folder {folder}.")
    if path.is_dir():
        raise IsADirectoryError(f"{option} {path}: is a directory; give the name of a file.")


def checkpoint_directory(path: pathlib.Path) -> pathlib.Path:
    """The checkpoint at `path`, of a run its last; else an error that says what a checkpoint is."""
    from fdq_checkpoints.sources import runs

    return runs.checkpoint_directory(path)


def text_directory(path: pathlib.Path) -> pathlib.Path:
    """Where the tokenizer of a checkpoint is; of a model in GGUF it is made of what that says."""
    from fdq_checkpoints.readers.file_names import text_folder
    from fdq_checkpoints.sources import open_source
    from fdq_checkpoints.sources.gguf import GGUF_MODELS

    if not GGUF_MODELS.claims(path):
        return path
    with open_source(path) as source:
        return text_folder(source.companions(), path)


def decoder_directory(path: pathlib.Path) -> pathlib.Path:
    """`path`, if it is the directory of a model that decodes, and not one of a tree of arrays."""
    from fdq_checkpoints.sources import open_source
    from fdq_checkpoints.store import manifest, orbax_store
    from fdq_checkpoints.store.restore import StoredTensors

    folder = checkpoint_directory(path)
    if os.path.lexists(folder / manifest.FILE_NAME):
        is_tree = StoredTensors(folder).manifest.kind == "params"
    else:
        is_tree = orbax_store.is_orbax(folder) or bool(orbax_store.steps(folder))
    if is_tree:
        raise ValueError(
            f"{folder}: a tree of arrays, not a model that decodes. If it is that of one, convert "
            "it with its config: fdq convert SRC DST --config config.json."
        )
    files = (manifest.FILE_NAME, "config.json")
    if folder.is_dir() and not any((folder / name).exists() for name in files):
        open_source(folder).close()  # it says what is missing, before a tokenizer is missed
    return folder


def _one_line(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}."
    notes = [n for n in getattr(error, "__notes__", ()) if "JAX has removed" not in n]
    return " ".join(" ".join([text, *notes]).split())
