"""`fdq evaluate`: how well a checkpoint predicts a text, and how far it is from another."""

import hashlib
import pathlib
from typing import Annotated

import typer

from fdq.cli import console, html_page
from fdq.cli.decoding_options import check_cache

NAME = "evaluate"
EXAMPLE = "Example:  fdq evaluate ernie-w4a16c8 --text book.txt --against ERNIE-4.5-0.3B-PT"


@console.command
def run(
    directory: console.Directory,
    text: Annotated[
        pathlib.Path | None,
        typer.Option(
            "--text",
            help="Text file in UTF-8; - reads standard input. Default: 64 kB of Python's standard "
            "library.",
        ),
    ] = None,
    against: Annotated[
        pathlib.Path | None,
        typer.Option("--against", help="The original: its bits per byte, and the KL from it."),
    ] = None,
    scheme: console.LoadScheme = None,
    cache: console.Cache = None,
    mesh: console.Mesh = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens of context at most.")] = 256,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that a window scores; default: half of --window."),
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option(min=1, help="Read no more of the text than this.")
    ] = None,
    dtype: console.Dtype = None,
    page: Annotated[
        pathlib.Path | None,
        typer.Option(
            "--html",
            help="Write a report, one HTML file; with --against also of each layer and of "
            "the schemes that --beside names.",
        ),
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(
            help="Schemes of the original to compare with in --html: several, or with commas, or "
            "''. Default: " + ",".join(html_page.BESIDE) + "."
        ),
    ] = None,
    json: console.Json = False,
    debug: console.Debug = False,
) -> None:
    """Bits per byte and perplexity on a text, through the KV cache; KL to another checkpoint."""
    from fdq.analysis.evaluation import evaluate
    from fdq.decoding.tokenizer import Tokenizer
    from fdq.schemes.mesh_rules import parse_mesh
    from fdq.storage import load

    name = console.spelled(directory)
    directory = console.decoder_directory(directory)
    other = None if against is None else console.spelled(against)
    if against is not None:
        against = console.checkpoint_directory(against)
    content = read_text(text, max_bytes)
    if page is not None:
        html_page.check(page, html_page.schemes(beside))
    recipe = console.loading_scheme(scheme)
    devices = None if mesh is None else parse_mesh(mesh)
    tokenizer = Tokenizer.load(console.text_directory(directory))
    tokens = tokenizer.encode(content, bos=True)
    # Without a token that begins a text, the first one is context only.
    scored = content if tokenizer.bos_token_id is not None else tokenizer.decode(tokens[1:])
    with console.progress("Loading", quiet=json, in_bytes=True) as update:
        model = load(directory, scheme=recipe, dtype=dtype, mesh=devices, progress=update)
        reference = None if against is None else load(against, dtype=dtype, progress=update)
    html_page.check_original(page, other, reference)
    check_cache(cache, model)
    with console.progress("Evaluating", quiet=json) as update:
        report = evaluate(
            model,
            tokens,
            reference=reference,
            text_bytes=len(scored.encode()),
            window=window,
            stride=stride,
            through_cache=True,
            cache=cache,
            progress=update,
        )
    digest = hashlib.sha256(content.encode()).hexdigest()
    if json:
        extra = {"checkpoint": name, "against": other}
        console.print_json(extra | {"text_sha256": digest} | report.to_dict())
    else:
        console.out.print(console.table(name, ["", "value"], report.rows()))
    if text is None and not json:
        console.out.print(f"Text: Python's standard library, sha256 {digest[:16]}", style="dim")
    # After what was measured, which a page that fails does not take with it.
    if page is not None:
        origin = "Python's standard library" if text is None else text.name
        names = html_page.schemes(beside)
        with console.progress("Reporting", quiet=json) as update:
            settings = {"text_bytes": len(scored.encode()), "window": window, "stride": stride}
            written = html_page.written(
                html_page.Measured(name, model, report, other, reference),
                tokens,
                f"{origin}, sha256 {digest[:16]}",
                names if reference is not None else [],
                settings,
                update,
            )
        page.write_text(written, "utf-8", errors="replace")
        console.say(f"Written: {page}")


def read_text(path: pathlib.Path | None, max_bytes: int | None) -> str:
    """The text of a file; of None the held-out part of the standard library."""
    from fdq.analysis import sample_text

    if path is None:
        most = max_bytes or sample_text.DEFAULT_HELDOUT_BYTES
        return sample_text.heldout_text(max_bytes=most).text
    standard_input = str(path) == "-"
    data = typer.get_binary_stream("stdin").read() if standard_input else path.read_bytes()
    data = data[:max_bytes]
    try:
        # Only a cut may split a character.
        content = data.decode("utf-8", errors="strict" if max_bytes is None else "ignore")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error
    if not content.strip():
        raise ValueError(f"{path}: empty; there is nothing to evaluate on.")
    return content
