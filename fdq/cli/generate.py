"""`fdq generate`: text from a checkpoint, as it is decoded."""

import contextlib
import pathlib
import sys
import time
from typing import Annotated, Any

import typer

from fdq.cli import batch, console
from fdq.cli import decoding_options as options

NAME = "generate"
EXAMPLE = (
    "Example:  fdq generate ernie-w4a16c8 --prompt 'def main(' --max-new-tokens 64     |     "
    "fdq generate hf://Qwen/Qwen3-0.6B --scheme W4A16 --chat --prompt 'Why is the sky blue?'"
)


@console.command
def run(
    directory: console.Directory,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="Text to continue; - is standard input, the default."),
    ] = None,
    prompt_file: Annotated[
        pathlib.Path | None, typer.Option(help="File in UTF-8 with the text to continue.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a turn: put into the chat template.")
    ] = False,
    system: options.System = None,
    chat_template: options.Template = None,
    batch_file: Annotated[
        pathlib.Path | None,
        typer.Option(
            "--batch",
            help='Many prompts: JSONL, a line {"prompt": TEXT} or {"messages": [...]}; - is '
            "standard input.",
        ),
    ] = None,
    output: Annotated[
        pathlib.Path | None,
        typer.Option(help='With --batch: file for its lines with "text"; else standard output.'),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="With --batch: prompts decoded side by side.")
    ] = 8,
    max_new_tokens: options.MaxNewTokens = None,
    max_tokens: Annotated[int | None, typer.Option(hidden=True)] = None,
    scheme: console.LoadScheme = None,
    lora: options.Lora = None,
    cache: console.Cache = None,
    mesh: console.Mesh = None,
    context: options.Context = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.Penalty = None,
    seed: options.Seed = 0,
    dtype: console.Dtype = None,
    json: console.Json = False,
    debug: console.Debug = False,
) -> None:
    """Continues a prompt; the text appears as it is decoded."""
    import jax

    if max_tokens is not None:
        raise ValueError(f"--max-tokens is called --max-new-tokens: --max-new-tokens {max_tokens}.")
    given = [name for name, value in (("--prompt", prompt), ("--prompt-file", prompt_file),
                                      ("--batch", batch_file)) if value is not None]  # fmt: skip
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: both give prompts; drop one.")
    if output is not None and batch_file is None:
        raise ValueError("--output goes with --batch; a single text is written with > FILE.")
    if system is not None and not chat and batch_file is None:
        raise ValueError("--system goes with --chat.")
    if chat_template is not None and not chat and batch_file is None:
        raise ValueError("--chat-template goes with --chat, or with --batch.")
    if batch_file is None:
        prompt = read_prompt(prompt, prompt_file)
    lines = None if batch_file is None else batch.read(batch_file)
    directory = console.decoder_directory(directory)
    folder = console.text_directory(directory)
    template = options.chat_template(chat_template, folder) if chat or chat_template else None
    drawing = options.drawing(
        folder,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    quiet = json or lines is not None
    model = options.text_model(
        directory, scheme=scheme, cache=cache, dtype=dtype, mesh=mesh, lora=lora, quiet=quiet
    )
    # What a file says is no wish of the user's: --context is.
    fitting = max_new_tokens is None
    prompts = batch.Prompts(model, chat=chat, system=system, template=template, fitting=fitting)
    keywords: dict[str, Any] = drawing.options | {
        "max_new_tokens": drawing.config.max_new_tokens or options.DEFAULT_NEW_TOKENS,
        "key": jax.random.key(seed),
        "cache": cache,
        "max_length": context,
        "stop_tokens": prompts.stop_tokens,
    }
    if drawing.taken:
        console.say(drawing.taken)
    if lines is not None:
        with batch.writer(output) as write:
            batch.run(model, lines, prompts, write, batch_size, keywords)
        return
    assert prompt is not None
    one(model, prompt, prompts, keywords, drawing, json=json)


def read_prompt(prompt: str | None, file: pathlib.Path | None) -> str:
    """The prompt that was given, of a file without the line end of its last line."""
    if file is None:
        return console.read_prompt(prompt if prompt is not None else "-")
    try:
        text = file.read_text("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: no text in UTF-8: {error.reason}.") from error
    if not text:
        raise ValueError(f"{file}: empty; a prompt is needed.")
    return text


def one(model: Any, prompt: str, prompts: Any, keywords: Any, drawing: Any, *, json: bool) -> None:
    """Continues one prompt, on standard output as it comes; of a chat only the answer."""
    from fdq.analysis.startup_time import measured

    pieces: list[str] = []
    first_token = None
    start = time.perf_counter()
    with contextlib.ExitStack() as waiting, measured() as spent:
        if not json:
            waiting.enter_context(console.err.status("Compiling ..."))

        def show(index: int, piece: str) -> None:
            nonlocal first_token
            waiting.close()
            if first_token is None:
                first_token = time.perf_counter() - start
            if not json:
                sys.stdout.write(piece if pieces or prompts.chat else prompt + piece)
                sys.stdout.flush()
            pieces.append(piece)

        prompts.generate(model, [{"prompt": prompt}], keywords, stream=show)
    seconds = time.perf_counter() - start
    if json:
        times = {
            "seconds": seconds,
            "first_token_seconds": first_token,
            "lowering_seconds": spent.lowering,
            "compiling_seconds": spent.compiling,
            "self_check_seconds": spent.self_check,
        }
        said = {"prompt": prompt, "text": "".join(pieces), "generation": drawing.config.to_dict()}
        console.print_json(said | times)
        return
    sys.stdout.write("\n" if pieces or prompts.chat else f"{prompt}\n")
    sys.stdout.flush()
    if first_token is not None:
        parts = f"lowering {spent.lowering:.1f} s, compiling {spent.compiling:.1f} s"
        if spent.self_check:
            parts += f", self-checks of kernels {spent.self_check:.1f} s"
        console.say(f"First text after {first_token:.1f} s ({parts}); all {seconds:.1f} s.")
