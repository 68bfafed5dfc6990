"""`fdq chat`: a conversation with a chat model."""

import contextlib
import json as text
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any, TextIO

import rich.text
import typer

from fdq.cli import console
from fdq.cli import decoding_options as options

NAME = "chat"
EXAMPLE = "Example:  fdq chat qwen3-w4     |     echo 'Why is the sky blue?' | fdq chat hf://Qwen/Qwen3-0.6B"
HELP = "/reset begins anew, /system TEXT tells the model something first, /exit or Ctrl-D leaves."


@console.command
def run(
    directory: console.Directory,
    system: options.System = None,
    chat_template: options.Template = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of an answer at most. Default: as many as fit."),
    ] = None,
    scheme: console.LoadScheme = None,
    lora: options.Lora = None,
    cache: console.Cache = None,
    mesh: console.Mesh = None,
    context: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a conversation. Default: the model's, at most 8192."),
    ] = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.Penalty = None,
    seed: options.Seed = 0,
    dtype: console.Dtype = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object an answer, on one line.")
    ] = False,
    debug: console.Debug = False,
) -> None:
    """A conversation: your lines, and answers as they are decoded; earlier turns stay in the cache.

    Ctrl-C ends an answer. Without a terminal each line of standard input is a turn.
    """
    import jax

    from fdq.decoding.conversation import Conversation

    directory = console.decoder_directory(directory)
    folder = console.text_directory(directory)
    template = options.chat_template(chat_template, folder)
    drawing = options.drawing(
        folder,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    model = options.text_model(
        directory, scheme=scheme, cache=cache, dtype=dtype, mesh=mesh, lora=lora, quiet=json
    )
    longest = getattr(model.config, "max_position", None) or 8192
    talk = Conversation(
        model,
        template=template,
        system=system,
        max_length=context or min(longest, 8192),
        cache=cache,
        key=jax.random.key(seed),
        **drawing.options,
    )
    if drawing.taken:
        console.say(drawing.taken)
    if is_terminal():
        console.say(HELP)
    for line in _turns():
        if line.startswith("/") and not line.startswith("//"):
            if not _command(talk, line):
                return
            continue
        line = line.removeprefix("/") if line.startswith("//") else line
        try:
            _answer(talk, line, drawing.config.max_new_tokens, json)
        except ValueError as error:  # the conversation is as it was
            if not is_terminal():
                raise
            console.complain(str(error))


def is_terminal() -> bool:
    """Whether somebody sits there."""
    return sys.stdin.isatty()


def _turns() -> Iterator[str]:
    """What is typed, or the lines of standard input; empty ones are skipped."""
    stream = typer.get_text_stream("stdin")  # once: another would miss what this one has read ahead
    while True:
        try:
            line = _read_line(stream)
        except KeyboardInterrupt:
            if not is_terminal():
                raise
            console.say(f"\n{HELP}")
            continue
        if line is None:
            return
        if line.strip():
            yield line.strip()


def _read_line(stream: TextIO) -> str | None:
    if is_terminal():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # arrows and history
        console.err.print("[bold cyan]> [/]", end="")
        try:
            return input()
        except EOFError:
            console.say("")
            return None
        except UnicodeDecodeError as error:
            raise ValueError(f"no text in UTF-8: {error.reason}.") from error
    try:
        line = stream.readline()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input: no text in UTF-8: {error.reason}.") from error
    return line or None


def _command(talk: Any, line: str) -> bool:
    """What a line with a slash says; False to leave."""
    name, _, argument = line.partition(" ")
    match name:
        case "/exit" | "/quit" | "/bye":
            return False
        case "/reset":
            system = next((m["content"] for m in talk.messages if m["role"] == "system"), None)
            talk.reset(system)
            console.say("A new conversation.")
        case "/system":
            talk.reset(argument.strip() or None)
            said = "with another system message" if argument.strip() else "without one"
            console.say(f"A new conversation, {said}.")
        case "/help" | "/?":
            console.say(f"{HELP} A turn that begins with a slash is written with two.")
        case _:
            console.complain(f"{name}: no such command. {HELP}")
    return True


def _answer(talk: Any, line: str, most: int | None, json: bool) -> None:
    start = time.perf_counter()
    first: float | None = None
    with contextlib.ExitStack() as waiting, _interrupts() as interrupted:
        if not json:
            waiting.enter_context(console.err.status("Reading ..."))

        def show(piece: str) -> None:
            nonlocal first
            waiting.close()
            first = first or time.perf_counter()
            if not json:
                sys.stdout.write(piece)
                sys.stdout.flush()

        try:
            answer = talk.ask(line, most, stream=show, interrupted=interrupted)
        except KeyboardInterrupt:  # a second one, which does not wait for the next look
            waiting.close()
            sys.stdout.write("\n")
            console.say("Interrupted; that turn is forgotten.")
            return
    seconds = time.perf_counter() - start
    if json:
        said = {"prompt": line, "text": answer.text, "tokens": len(answer.tokens)}
        said |= {"read": answer.read, "kept": answer.kept, "ended": answer.ended}
        typer.echo(text.dumps(said | {"seconds": seconds}, ensure_ascii=False))
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    if is_terminal():
        pace = len(answer.tokens) / max(time.perf_counter() - (first or start), 1e-9)
        ended = "" if answer.ended == "stop token" else f", ended by {answer.ended}"
        note = (
            f"{len(answer.tokens)} tokens, {pace:.1f} a second; read {answer.read}, kept "
            f"{answer.kept}; {talk.length} of {talk.max_length} in the cache{ended}"
        )
        console.err.print(rich.text.Text(note, style="dim"))


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """A first Ctrl-C is a wish that is asked for between tokens; a second one interrupts."""
    seen = False

    def note(number: int, frame: Any) -> None:
        nonlocal seen
        if seen:
            raise KeyboardInterrupt
        seen = True

    try:
        usual = signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread, which no signal reaches
        yield lambda: False
        return
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, usual)
