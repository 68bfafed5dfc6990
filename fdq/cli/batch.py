"""Many prompts of `fdq generate`: lines of JSON in, the same lines with their texts out."""

import contextlib
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import typer

from fdq.cli import console

_MAX_BYTES = 1 << 30
Line = dict[str, Any]


def read(path: pathlib.Path) -> list[Line]:
    """The objects of a JSONL file, or of standard input where it is `-`.

    Raises:
      ValueError: a line that is no object with a text `prompt` or a list `messages`; says which.
    """
    standard_input = str(path) == "-"
    name = "standard input" if standard_input else str(path)
    if standard_input:
        data = typer.get_binary_stream("stdin").read(_MAX_BYTES + 1)
    else:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"{name}: larger than {_MAX_BYTES >> 20} MiB; cut it into several.")
    lines = []
    for number, text in enumerate(data.split(b"\n"), start=1):
        if text.strip():
            lines.append(_line(text, f"{name}, line {number}"))
    if not lines:
        raise ValueError(f'{name}: no lines; expected one {{"prompt": TEXT}} a prompt.')
    return lines


def _line(text: bytes, where: str) -> Line:
    from fdq.decoding.chat_template import check_messages

    try:
        value = json.loads(text.decode("utf-8"))
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # halves of a character are no text
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f'{where}: expected an object such as {{"prompt": TEXT}}.')
    if ("prompt" in value) == ("messages" in value):
        raise ValueError(f"{where}: expected one of `prompt` and `messages`.")
    if "prompt" in value and not (isinstance(value["prompt"], str) and value["prompt"]):
        raise ValueError(f"{where}: prompt: expected a text, found {value['prompt']!r:.60}.")
    if "messages" in value:
        try:
            check_messages(value["messages"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
    return value


class Prompts:
    """Makes tokens of prompts and messages, and texts of what is generated.

    Args:
      model: with a tokenizer.
      chat: prompts are turns of a person.
      system: goes before those turns.
      template: a `ChatTemplate`; where it is needed and not given, that of the checkpoint.
      fitting: generate no more tokens than fit beside the prompts into `max_length`.
    """

    def __init__(
        self,
        model: Any,
        *,
        chat: bool,
        system: str | None,
        template: Any = None,
        fitting: bool = False,
    ):
        from fdq.decoding import special_tokens
        from fdq.decoding.tokenizer import Tokenizer

        self.chat, self._system, self._model, self._fitting = chat, system, model, fitting
        self._tokenizer = Tokenizer.load(model.tokenizer_path)
        self._template, self._known_stop = template, False
        self.stop_tokens = special_tokens.union(
            model.config.eos_token_ids, self._tokenizer.stop_token_ids
        )
        if chat:
            self._load_template()

    def _load_template(self) -> Any:
        from fdq.decoding.chat_template import ChatTemplate
        from fdq.decoding.conversation import token_after_an_answer

        if self._template is None:
            self._template = ChatTemplate.load(self._model.tokenizer_path)
        if not self._known_stop:
            self._known_stop = True
            more = token_after_an_answer(self._template, self._tokenizer)
            self.stop_tokens = tuple(dict.fromkeys([*self.stop_tokens, *more]))
        return self._template

    def generate(
        self,
        model: Any,
        lines: Sequence[Line],
        keywords: dict[str, Any],
        stream: Callable[[int, str], None] | None = None,
    ) -> list[str]:
        """The texts that follow the prompts of `lines`."""
        from fdq.decoding.generation import generate

        chats = [index for index, line in enumerate(lines) if self.chat or "messages" in line]
        if not chats:
            prompts = [line["prompt"] for line in lines]
            keywords = self._within(keywords, prompts)
            return generate(
                model,
                prompts,
                tokenizer=self._tokenizer,
                stream=stream,
                stream_steps=16,
                **keywords,
            )
        rows = [
            [] if index in chats else self._tokenizer.encode(line["prompt"], bos=True)
            for index, line in enumerate(lines)
        ]
        texts = self._load_template().render_all([self._messages(lines[i]) for i in chats])
        for index, text in zip(chats, texts, strict=True):
            rows[index] = self._tokenizer.encode(text)  # its template writes a BOS or does not
        decoders = [self._tokenizer.stream() for _ in lines]
        pieces: list[list[str]] = [[] for _ in lines]

        def take(index: int, piece: str) -> None:
            if piece:
                pieces[index].append(piece)
                if stream is not None:
                    stream(index, piece)

        def feed(index: int, tokens: list[int]) -> None:
            take(index, decoders[index].feed(tokens))

        keywords = self._within(keywords, rows) | {"stop_tokens": self.stop_tokens}
        generate(model, rows, stream=feed, stream_steps=16, **keywords)
        for index, decoder in enumerate(decoders):
            take(index, decoder.finish())
        return ["".join(each) for each in pieces]

    def _within(
        self, keywords: dict[str, Any], prompts: Sequence[str | list[int]]
    ) -> dict[str, Any]:
        """Fewer new tokens, where nobody asked for so many and the cache has no room for them."""
        if not self._fitting or keywords["max_length"] is None:
            return keywords
        rows = [self._tokenizer.encode(p, bos=True) if isinstance(p, str) else p for p in prompts]
        room = keywords["max_length"] - max(map(len, rows))
        if room < 1:
            return keywords
        return keywords | {"max_new_tokens": min(keywords["max_new_tokens"], room)}

    def _messages(self, line: Line) -> list[Any]:
        if "messages" in line:
            return line["messages"]
        told = [{"role": "system", "content": self._system}] if self._system else []
        return [*told, {"role": "user", "content": line["prompt"]}]


@contextlib.contextmanager
def writer(output: pathlib.Path | None) -> Iterator[Callable[[Line], None]]:
    """Writes lines as they are done, to a file that must not exist or to standard output."""
    if output is not None and output.exists():
        raise FileExistsError(f"{output} exists. Choose another --output, or remove it.")
    with contextlib.ExitStack() as stack:
        file = sys.stdout
        if output is not None:
            file = stack.enter_context(open(output, "x", encoding="utf-8"))

        def write(line: Line) -> None:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()

        yield write


def run(
    model: Any,
    lines: Sequence[Line],
    prompts: Prompts,
    write: Callable[[Line], None],
    size: int,
    keywords: dict[str, Any],
) -> None:
    """Continues all prompts, `size` side by side, and writes each line with its `text`."""
    import jax

    with console.progress("Generating") as update:
        update(0, len(lines), "")
        for start in range(0, len(lines), size):
            part = lines[start : start + size]
            own = {"key": jax.random.fold_in(keywords["key"], start)}  # or parts would draw alike
            texts = prompts.generate(model, part, keywords | own)
            for line, text in zip(part, texts, strict=True):
                write({**line, "text": text})
            update(min(start + size, len(lines)), len(lines), f"{start + len(part)} prompts")
