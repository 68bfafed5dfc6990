"""Measures schemes on one model and text: convert, load, evaluate through the cache, decode.

Shared by `fdq demo` and `python -m benchmarks.schemes`.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any, Self

import numpy as np

from fdq.analysis.evaluation import RecordedLogits, Report, evaluate, record_logits
from fdq.calibration.observation import calibrate
from fdq.calibration.statistics import Calibration
from fdq.decoding.generation import generate
from fdq.quantizers.layer_inputs import moments_for
from fdq.schemes.recipe import Recipe

WINDOW = 256
NEW_TOKENS = 64
MOMENT_ROWS = 128
Progress = Callable[[float, str], None]
"""Called with the share of the work that is done, 0 to 1, and what comes next."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What one scheme costs and gives.

    The report is measured through the cache, `disk_bytes` has metadata and tokenizer in it, and
    `text` continues the prompt greedily, if that was asked for. There is no speed: it shows in
    models whose weights do not fit into a processor's cache, and is measured by `benchmarks`.
    """

    name: str
    report: Report
    disk_bytes: int
    text: str | None
    convert_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, the report's among them."""
        return vars(self) | {"report": self.report.to_dict()}


@dataclasses.dataclass(kw_only=True)
class Comparison:
    """A float model in the directory `source`, a text and the original's logits over it.

    `tokens` [length] int32 is the text after the token that begins a text, `text_bytes` its size;
    `is_reference_text` says whether it is that of docs/schemes.md. `dtype` is that of activations,
    `window` the tokens of context at most.
    """

    source: pathlib.Path
    tokenizer: Any
    tokens: np.ndarray
    text_bytes: int
    text_sha256: str
    is_reference_text: bool
    prompt: str
    dtype: str | None = None
    window: int = WINDOW
    _recorded: RecordedLogits | None = None

    @classmethod
    def of_shipped_model(
        cls, *, text_bytes: int, prompt: str, dtype: str | None = None, window: int = WINDOW
    ) -> Self:
        """The model that ships with fdq, on held-out text of the standard library."""
        from fdq.analysis import sample_text
        from fdq.analysis.shipped_model import shipped_model_path
        from fdq.decoding.tokenizer import Tokenizer

        source = shipped_model_path()
        tokenizer = Tokenizer.load(source)
        whole = sample_text.heldout_text()
        text = whole.text.encode()[:text_bytes].decode(errors="ignore")
        return cls(
            source=source,
            tokenizer=tokenizer,
            tokens=np.asarray(tokenizer.encode(text, bos=True), np.int32),
            text_bytes=len(text.encode()),
            text_sha256=whole.sha256,
            is_reference_text=whole.sha256 == sample_text.REFERENCE_SHA256,
            prompt=prompt,
            dtype=dtype,
            window=window,
        )

    def original(self, progress: Progress | None = None) -> Row:
        """The float model; also what the schemes are compared with from now on."""
        from fdq.storage import load
        from fdq_checkpoints import inspect

        tell = progress or _nobody
        tell(0.0, "loading")
        model = load(self.source, dtype=self.dtype)
        tell(0.1, "reading the text")
        self._recorded = record_logits(model, self.tokens, window=self.window)
        disk_bytes = inspect(self.source).disk_bytes
        return self._row("original", model, disk_bytes, 0.0, _part(tell, 0.4, 1.0))

    def measure(
        self,
        scheme: Any,
        directory: pathlib.Path,
        *,
        name: str | None = None,
        method: str | None = None,
        calibration: Calibration | None = None,
        decodes: bool = True,
        progress: Progress | None = None,
    ) -> Row:
        """Converts to `directory`, which must not exist, loads that, evaluates and `decodes`.

        `method` chooses the codes; `calibration` is made where it is needed and not given.
        """
        from fdq.storage import load
        from fdq_checkpoints import convert

        tell = progress or _nobody
        tell(0.0, "converting")
        recipe = Recipe.parse(scheme)
        moments = moments_for(recipe, method)
        if calibration is None and (recipe.needs_calibration or any(moments.values())):
            calibration = self.calibration(**moments)
        start = time.perf_counter()
        inspection = convert(
            self.source,
            directory,
            scheme,
            method=method,
            calibration=calibration,
            dtype=self.dtype,
            progress=lambda done, total, path: tell(0.4 * done / total, "converting"),
        )
        seconds = time.perf_counter() - start
        tell(0.4, "loading")
        model = load(directory)
        rest = _part(tell, 0.5, 1.0)
        name = name or str(scheme)
        return self._row(name, model, inspection.disk_bytes, seconds, rest, decodes=decodes)

    def calibration(
        self, *, moments: bool = False, output_moments: bool = False, rows: int | None = None
    ) -> Calibration:
        """Statistics over text that is not evaluated on: 8192 tokens, for moments 32768.

        `rows` of 256 tokens, where others are wanted.
        """
        from fdq.analysis import sample_text
        from fdq.storage import load

        if rows is None:
            rows = MOMENT_ROWS if moments or output_moments else 32
        tokens = sample_text.calibration_rows(
            lambda text: self.tokenizer.encode(text, bos=True), rows, length=WINDOW
        )
        model = load(self.source)
        return calibrate(model, tokens, moments=moments, output_moments=output_moments)

    def _row(
        self,
        name: str,
        model: Any,
        disk_bytes: int,
        seconds: float,
        tell: Progress,
        *,
        decodes: bool = True,
    ) -> Row:
        tell(0.0, "evaluating")
        report = evaluate(
            model,
            self.tokens,
            reference=self._recorded,
            text_bytes=self.text_bytes,
            window=self.window,
            through_cache=True,
            progress=lambda done, total: tell(0.6 * done / total, "evaluating"),
        )
        tell(0.6, "decoding")
        text = self._decode(model) if decodes else None
        tell(1.0, "")
        return Row(
            name=name,
            report=report,
            disk_bytes=disk_bytes,
            text=text,
            convert_seconds=seconds,
        )

    def _decode(self, model: Any) -> str:
        """The greedy continuation of the prompt."""
        (text,) = generate(
            model, [self.prompt], NEW_TOKENS, tokenizer=self.tokenizer, stream_steps=NEW_TOKENS
        )
        return text


def _nobody(share: float, note: str) -> None:
    """Nobody waits for news."""


def _part(tell: Progress, first: float, last: float) -> Progress:
    """What a part of the work, from one share of the whole to another, tells its own share to."""
    return lambda share, note: tell(first + share * (last - first), note)
