"""A conversation as the text that a chat model was trained on, by the template of its checkpoint.

Templates are Jinja (extra `cli`) and come with a checkpoint, so they are run as what they are:
programs by somebody else. See `fdq.decoding.template_process`.
"""

import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, Self

from fdq.decoding import special_tokens, template_process

SECONDS = 10  # for all conversations of a call; a template takes milliseconds
MEMORY_BYTES = 1 << 29
_MAX_TEMPLATE_BYTES = 1 << 20
_MOST_TEMPLATES = 64  # in a folder of them
_MAX_CHARACTERS = 1 << 24  # of all texts of a call
_KEPT = ("LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT")  # of the environment
_JINJA = "jinja2>=3.1.6"  # older ones have known ways out of the sandbox

FILE_NAME, FOLDER = "chat_template.jinja", "additional_chat_templates"
_PROCESSORS = "chat_template.json"
_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# Names of what a model thought before it answered; templates read one or the other.
_REASONING = ("reasoning_content", "thinking", "reasoning")

Message = Mapping[str, Any]
"""`{"role": "user", "content": "..."}`, and what else the template knows."""


class TemplateError(ValueError):
    """A template that cannot be rendered, or that refuses the messages; says which and why."""


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """The templates of a checkpoint by name, mostly one, `default`.

    Attributes:
      templates: Jinja source by name.
      tokens: `bos_token` and the others that templates write, by name.
      origin: where they are from, for errors.
    """

    templates: Mapping[str, str]
    tokens: Mapping[str, str]
    origin: str

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Self:
        """The templates of the checkpoint in `directory`, or whose tokenizer.json it is.

        From chat_template.jinja and additional_chat_templates/, else from tokenizer_config.json,
        else from chat_template.json, as transformers looks for them.

        Raises:
          ValueError: there is none, or a file of another kind than it must be.
        """
        folder = pathlib.Path(directory)
        folder = folder.parent if folder.name == "tokenizer.json" else folder
        found = cls.find(folder)
        if found is None:
            raise ValueError(
                f"{folder}: no chat template ({FILE_NAME}, or chat_template in "
                "tokenizer_config.json): it is no chat model, or the file was left out. Give "
                "another (--chat-template FILE), or the prompt as text (fdq generate --prompt)."
            )
        return found

    @classmethod
    def of_file(cls, path: str | os.PathLike[str], directory: str | os.PathLike[str]) -> Self:
        """The template in a file, for the checkpoint in `directory`, whose tokens it writes."""
        text = _read(pathlib.Path(path))
        return cls({"default": text}, _tokens(pathlib.Path(directory)), os.fspath(path))

    @classmethod
    def find(cls, folder: pathlib.Path) -> Self | None:
        """`load`, or None where a checkpoint has no template."""
        for templates, origin in (
            (_of_files(folder), folder / FILE_NAME),
            (_of_json(folder / "tokenizer_config.json"), folder / "tokenizer_config.json"),
            (_of_json(folder / _PROCESSORS), folder / _PROCESSORS),
        ):
            if templates:
                return cls(templates, _tokens(folder), str(origin))
        return None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        now: datetime.datetime | None = None,
        **variables: Any,
    ) -> str:
        """The text of one conversation, special tokens spelled out; encode it without a BOS.

        Args:
          messages: in the order of the conversation.
          add_generation_prompt: whether the text ends where the model's answer begins.
          tools: JSON schemas of functions that the model may call; chooses the template
            `tool_use` where there is one.
          documents: to answer from, for templates that know them.
          now: what `strftime_now` tells; the present where not given.
          variables: what else a template knows, such as `enable_thinking=False`.

        Raises:
          TemplateError: the template refuses the messages, cannot be rendered, or takes more than
            a few seconds or half a gigabyte.
          TypeError: messages that are none, or values that JSON does not have.
          ModuleNotFoundError: without the package `jinja2`.
        """
        variables = {
            "add_generation_prompt": add_generation_prompt,
            "tools": tools,
            "documents": documents,
            **variables,
        }
        return self.render_all([messages], now=now, **variables)[0]

    def render_all(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        now: datetime.datetime | None = None,
        **variables: Any,
    ) -> list[str]:
        """`render` of many conversations, in one process."""
        for messages in conversations:
            check_messages(messages)
        common = {**self.tokens, "add_generation_prompt": True, "tools": None, "documents": None}
        common |= variables
        each = [{**common, "messages": _plain(messages)} for messages in conversations]
        request = {
            "template": self._chosen(common["tools"] is not None),
            "variables": each,
            "now": (now or datetime.datetime.now()).isoformat(),
            "paths": _paths_of_jinja(),
            "seconds": SECONDS,
            "bytes": MEMORY_BYTES,
            "characters": _MAX_CHARACTERS,
        }
        answer = self._answer(json.dumps(request))
        texts = answer.get("texts")
        if not isinstance(texts, list) or len(texts) != len(each):
            raise TemplateError(f"{self.origin}: {answer.get('error', 'no text came back')}.")
        return texts

    def _chosen(self, with_tools: bool) -> str:
        for name in ("tool_use", "default") if with_tools else ("default",):
            if name in self.templates:
                return self.templates[name]
        raise TemplateError(
            f"{self.origin}: its templates are {', '.join(sorted(self.templates))}, and none of "
            "them is the default."
        )

    def _answer(self, request: str) -> dict[str, Any]:
        """What the process says; TemplateError where it had to be ended."""
        # -I: neither the working directory nor PYTHON* has a say in what it imports.
        command = [sys.executable, "-I", template_process.__file__]
        # A file, for its size is bounded.
        with tempfile.TemporaryFile("w+", encoding="utf-8") as out:
            try:
                done = subprocess.run(
                    command,
                    input=request,
                    encoding="utf-8",
                    stdout=out,
                    stderr=subprocess.DEVNULL,
                    timeout=SECONDS + 5,
                    check=False,
                    # Nobody's secrets, and Ctrl-C is for the answer.
                    env={name: os.environ[name] for name in _KEPT if name in os.environ},
                    start_new_session=os.name == "posix",
                )
            except subprocess.TimeoutExpired:
                raise TemplateError(self._ended(f"did not end within {SECONDS} s")) from None
            out.seek(0)
            try:
                answer = json.load(out)
            except ValueError:
                answer = None
        if done.returncode in (-9, -24):  # at the limit of its time
            raise TemplateError(self._ended(f"did not end within {SECONDS} s"))
        if done.returncode or not isinstance(answer, dict):
            raise TemplateError(self._ended(f"ended its process (code {done.returncode})"))
        return answer

    def _ended(self, how: str) -> str:
        return f"{self.origin}: the chat template {how}, and was stopped. Do not use it."


def check_messages(messages: Any) -> None:
    """TypeError for what is no list of messages, ValueError for an empty one."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise TypeError(
            'messages: expected a list such as [{"role": "user", "content": "Hello"}], found '
            f"{messages!r:.100}."
        )
    if not messages:
        raise ValueError("messages: an empty list; there is nothing to answer.")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(
                'messages: expected objects such as {"role": "user", "content": "Hello"}, found '
                f"{message!r:.100}."
            )


def _plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as transformers hands them on: no None, and what was thought under all names."""
    result = []
    for message in messages:
        said = {key: value for key, value in message.items() if value is not None}
        thought = next((said[key] for key in _REASONING if key in said), None)
        if thought is not None:
            said = {"thinking": thought, **said, "reasoning_content": thought}
        result.append(said)
    return result


def _tokens(folder: pathlib.Path) -> dict[str, str]:
    found = {name: special_tokens.spelling(folder, name) for name in _TOKENS}
    return {name: text for name, text in found.items() if text is not None}


def _of_files(folder: pathlib.Path) -> dict[str, str]:
    files = {"default": folder / FILE_NAME}
    if (folder / FOLDER).is_dir():
        more = sorted((folder / FOLDER).glob("*.jinja"))[:_MOST_TEMPLATES]
        files |= {path.stem: path for path in more}
    return {name: _read(path) for name, path in files.items() if path.is_file()}


def _read(path: pathlib.Path) -> str:
    if path.stat().st_size > _MAX_TEMPLATE_BYTES:
        raise ValueError(f"{path}: larger than {_MAX_TEMPLATE_BYTES >> 10} KiB.")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no text in UTF-8: {error.reason}.") from error


def _of_json(path: pathlib.Path) -> dict[str, str]:
    match special_tokens.read_json(path).get("chat_template"):
        case None:
            return {}
        case str(text):
            found = {"default": text}
        case [*named] if all(isinstance(one, dict) for one in named):
            found = {one.get("name"): one.get("template") for one in named}
        case {**named}:
            found = dict(named)
        case other:
            found = {"default": other}
    for name, text in found.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(
                f"{path}: chat_template: expected a text, or a list of objects with `name` and "
                f"`template`, found {text!r:.80}."
            )
        if len(text) > _MAX_TEMPLATE_BYTES:
            raise ValueError(f"{path}: chat_template: larger than {_MAX_TEMPLATE_BYTES >> 10} KiB.")
    return found


def _paths_of_jinja() -> list[str]:
    """Where the process finds Jinja, which this one need not import."""
    paths = []
    for name in ("jinja2", "markupsafe"):
        found = importlib.util.find_spec(name)
        if found is None or not found.origin:
            raise ModuleNotFoundError(
                f"Chat templates need the package `{name}`: pip install '{_JINJA}' (of the extra "
                "`cli`). Prompts as text work without it.",
                name=name,
            )
        paths.append(str(pathlib.Path(found.origin).parent.parent))
    version = importlib.metadata.version("jinja2")
    if tuple(map(int, re.findall(r"[0-9]+", version)[:3])) < (3, 1, 6):
        raise ModuleNotFoundError(
            f"Chat templates need {_JINJA}; jinja2 {version} has known ways out of its sandbox. "
            f"pip install '{_JINJA}'.",
            name="jinja2",
        )
    return list(dict.fromkeys(paths))
