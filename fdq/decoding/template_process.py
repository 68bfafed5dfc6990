"""Renders chat templates in a process of its own, which may be ended: a program, not imported.

A template is a program by whoever made the checkpoint. Jinja's sandbox keeps it from Python's
internals, and nothing inside of one process keeps it from memory and time. Here a process has
little of both, starts no other, and writes no large file. `fdq.decoding.chat_template` runs it:
a JSON object on standard input, one on standard output.
"""

import datetime
import json
import sys
from typing import Any


def main() -> None:
    """Answers the one request on standard input."""
    request = json.load(sys.stdin)
    sys.path += request["paths"]
    _limit(request["seconds"], request["bytes"])
    json.dump(answer(request), sys.stdout)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """`{"texts": [...]}`, or `{"error": ...}` in a line."""
    try:
        return {"texts": _texts(request)}
    except MemoryError:
        return {"error": f"it needs more than {request['bytes'] >> 20} MiB of memory"}
    except RecursionError:
        return {"error": "it is nested too deeply, or calls itself without end"}
    except Exception as error:
        return {"error": _said(error)}


def _limit(seconds: int, memory: int) -> None:
    try:
        import resource
    except ModuleNotFoundError:  # no POSIX: the time is bounded by who waits
        return
    for name, value in (
        ("RLIMIT_CPU", seconds),
        ("RLIMIT_AS", memory),
        ("RLIMIT_FSIZE", memory),
        ("RLIMIT_NPROC", 0),
        ("RLIMIT_CORE", 0),
    ):
        kind = getattr(resource, name, None)
        if kind is not None:
            hard = resource.getrlimit(kind)[1]
            most = value if hard == resource.RLIM_INFINITY else min(value, hard)
            try:
                resource.setrlimit(kind, (most, most))
            except (ValueError, OSError):  # macOS bounds no address space
                if sys.platform == "linux":
                    raise


def _texts(request: dict[str, Any]) -> list[str]:
    now = datetime.datetime.fromisoformat(request["now"])
    template = _environment(now).from_string(request["template"])
    texts, left = [], request["characters"]
    for variables in request["variables"]:
        pieces = []
        for piece in template.generate(variables):
            left -= len(piece)
            if left < 0:
                raise MemoryError
            pieces.append(piece)
        texts.append("".join(pieces))
    return texts


def _said(error: Exception) -> str:
    """The error in a line, with the line of the template where it is known."""
    from jinja2 import exceptions

    text = " ".join(str(error).split()).removesuffix(".") or type(error).__name__
    text = "".join(c for c in text if c.isprintable())[:300]
    if isinstance(error, exceptions.TemplateSyntaxError):
        return f"line {error.lineno}: {text}"
    if isinstance(error, exceptions.SecurityError):
        return f"it does what a template may not do: {text}"
    is_its_own = isinstance(error, exceptions.TemplateError)
    return text if is_its_own else f"{type(error).__name__}: {text}"


def _environment(now: datetime.datetime) -> Any:
    """Jinja with what templates of chat models are written for, as transformers gives it."""
    from jinja2 import exceptions, ext, nodes, sandbox, utils

    class Generation(ext.Extension):
        """`{% generation %}` marks what the model wrote, for training; here it is only text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.CallBlock(self.call_method("text"), [], [], body).set_lineno(line)

        def text(self, caller: Any) -> str:
            return caller()

    class Namespace(utils.Namespace):
        """Jinja's, without names that begin with an underscore."""

        def __init__(*args: Any, **named: Any):  # `namespace(self=...)` is allowed
            for name in (values := dict(*args[1:], **named)):
                _refuse(name)
            utils.Namespace.__init__(args[0], values)

        def __setitem__(self, name: str, value: Any) -> None:
            _refuse(name)
            super().__setitem__(name, value)

    def _refuse(name: Any) -> None:
        if str(name).startswith("_"):
            raise exceptions.SecurityError(f"a namespace with the name {name!r}.")

    def raise_exception(message: str) -> None:
        raise exceptions.TemplateError(message)

    def tojson(
        x: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own escapes what HTML would read.
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    made = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda format: now.strftime(format),
        "dict": lambda *args, **named: dict(*args, **named),
        "namespace": Namespace,
    }
    return made


if __name__ == "__main__":
    main()
