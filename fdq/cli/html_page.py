"""What `fdq evaluate --html` writes: the report, with what it needs measured beside it."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from fdq.cli import console

BESIDE = ("W8A16", "W4A16", "W3A16", "W2A16")


@dataclasses.dataclass(frozen=True)
class Measured:
    """A model and its original (None where there is none), and what was measured of it."""

    name: str
    model: Any
    report: Any
    original_name: str | None
    original: Any


def schemes(beside: Sequence[str] | None) -> list[str]:
    """Names of schemes, of options that may have several each; `BESIDE` of none."""
    if beside is None:
        return list(BESIDE)
    return [name.strip() for one in beside for name in one.split(",") if name.strip()]


def check(page: pathlib.Path, beside: Sequence[str]) -> None:
    """Wrong names and folders are found before anything is measured."""
    console.writable("--html", page)
    for name in beside:
        console.loading_scheme(name)


def check_original(page: pathlib.Path | None, name: str | None, original: Any) -> None:
    """ValueError for an original that is quantized, which --html cannot compare layers with."""
    if page is not None and getattr(original, "scheme", None) is not None:
        raise ValueError(
            f"--html compares with an original in floats, and {name} is quantized "
            f"({original.scheme}). Give that --against, or drop --html."
        )


def written(
    subject: Measured,
    tokens: Any,
    text: str,
    beside: Sequence[str],
    settings: dict[str, Any],
    update: Callable[..., None],
) -> str:
    """The page. `settings` are those of `evaluate`; `text` says in words which one it was."""
    import numpy as np

    import fdq
    from fdq.analysis import html_report
    from fdq.analysis.evaluation import evaluate
    from fdq.analysis.layer_errors import ROWS, layer_errors
    from fdq.analysis.planner import weight_table
    from fdq.quantizers.quantization import quantize

    layers: Sequence[Any] = ()
    others: dict[str, Any] = {}
    steps = len(beside) + 1
    if subject.original is not None:
        length = min(settings["window"], len(tokens))
        count = min(ROWS, len(tokens) // length)
        rows = np.asarray(tokens[: count * length], np.int32).reshape(count, length)
        update(0, steps, "layers")
        one, other = (getattr(m, "prepared", None) for m in (subject.model, subject.original))
        # Weights that were rotated or scaled before are others than the original's.
        if getattr(subject.model, "scheme", None) is not None and one == other:
            layers = layer_errors(_on_one_device(subject.model), subject.original, rows)
        for done, scheme in enumerate(beside):
            update(done + 1, steps, scheme)
            others[scheme] = evaluate(
                quantize(subject.original, scheme),
                tokens,
                reference=subject.original,
                through_cache=True,
                **settings,
            )
    facts = [("fdq", fdq.__version__)]
    facts += [(key, str(value)) for key, value in _made(subject.model).items()]
    return html_report.page(
        html_report.Subject(
            name=subject.name,
            scheme=getattr(subject.model, "scheme", None),
            original=subject.original_name,
            text=text,
            facts=facts,
        ),
        subject.report,
        weight_table(subject.model),
        original=None if subject.original is None else weight_table(subject.original),
        layers=layers,
        beside=others,
    )


def _on_one_device(model: Any) -> Any:
    from fdq.sharding import unshard

    return model if getattr(model, "placement", None) is None else unshard(model)


def _made(model: Any) -> dict[str, Any]:
    """What the checkpoint's record says about how it was made, where it came from one."""
    folder = getattr(model, "tokenizer_path", None)
    if folder is None:
        return {}
    from fdq_checkpoints import CheckpointError, inspect

    path = pathlib.Path(folder)
    try:
        return inspect(path if path.is_dir() else path.parent).made_how()
    except (CheckpointError, OSError):
        return {}
