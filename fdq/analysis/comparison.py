"""Measures schemes on one model and text: convert, load, evaluate through the cache, decode.

Shared by `fdq demo` and `python -m benchmarks.schemes`.
"""

import dataclasses
import pathlib
import time
from typing import Any, Self

import jax
import numpy as np

from fdq.analysis.evaluation import RecordedLogits, Report, evaluate, record_logits
from fdq.calibration.observation import calibrate
from fdq.calibration.statistics import Calibration
from fdq.decoding.loop import decode, prefill
from fdq.schemes.recipe import Recipe

WINDOW = 256
# Timed decoding; the loop is compiled and run once before.
DECODE_STEPS = 64
CACHE_SLOTS = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What one scheme costs and gives.

    The report is measured through the cache, `disk_bytes` has metadata and tokenizer in it, and
    `text` continues the prompt greedily, at `tokens_per_second` of one sequence, compiled before.
    """

    name: str
    report: Report
    disk_bytes: int
    tokens_per_second: float
    text: str
    convert_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, the report's among them."""
        return vars(self) | {"report": self.report.to_dict()}


@dataclasses.dataclass(kw_only=True)
class Comparison:
    """A float model in the directory `source`, a text and the original's logits over it.

    `tokens` [length] int32 is the text after the token that begins a text, `text_bytes` its size;
    `is_reference_text` says whether it is the one of the README. `dtype` is that of activations.
    """

    source: pathlib.Path
    tokenizer: Any
    tokens: np.ndarray
    text_bytes: int
    text_sha256: str
    is_reference_text: bool
    prompt: str
    dtype: str | None = None
    _recorded: RecordedLogits | None = None

    @classmethod
    def of_shipped_model(cls, *, text_bytes: int, prompt: str, dtype: str | None = None) -> Self:
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
        )

    def original(self) -> Row:
        """The float model; also what the schemes are compared with from now on."""
        from fdq.storage import load
        from fdq_checkpoints import inspect

        model = load(self.source, dtype=self.dtype)
        self._recorded = record_logits(model, self.tokens, window=WINDOW)
        return self._row("original", model, inspect(self.source).disk_bytes, 0.0)

    def measure(self, scheme: Any, directory: pathlib.Path, *, name: str | None = None) -> Row:
        """Converts to `directory`, which must not exist, loads that, evaluates and decodes."""
        from fdq.storage import load
        from fdq_checkpoints import convert

        calibration = self._calibration() if Recipe.parse(scheme).needs_calibration else None
        start = time.perf_counter()
        inspection = convert(
            self.source, directory, scheme, calibration=calibration, dtype=self.dtype
        )
        seconds = time.perf_counter() - start
        return self._row(name or str(scheme), load(directory), inspection.disk_bytes, seconds)

    def _calibration(self) -> Calibration:
        """Statistics over 8192 tokens of text that is not evaluated on."""
        from fdq.analysis import sample_text
        from fdq.storage import load

        ids: list[int] = []
        for _, text in sample_text.source_files(held_out=False):
            ids += self.tokenizer.encode(text[:4096], bos=True)
            if len(ids) >= 32 * WINDOW:
                break
        tokens = np.asarray(ids[: 32 * WINDOW], np.int32).reshape(-1, WINDOW)
        return calibrate(load(self.source), tokens)

    def _row(self, name: str, model: Any, disk_bytes: int, seconds: float) -> Row:
        report = evaluate(
            model,
            self.tokens,
            reference=self._recorded,
            text_bytes=self.text_bytes,
            window=WINDOW,
            through_cache=True,
        )
        text, speed = self._decode(model)
        return Row(
            name=name,
            report=report,
            disk_bytes=disk_bytes,
            tokens_per_second=speed,
            text=text,
            convert_seconds=seconds,
        )

    def _decode(self, model: Any) -> tuple[str, float]:
        """(greedy continuation of the prompt, tokens per second of a second run)."""
        ids = np.asarray([self.tokenizer.encode(self.prompt, bos=True)], np.int32)
        for _ in range(2):
            cache = model.init_cache(1, CACHE_SLOTS)
            state = jax.block_until_ready(prefill(model, ids, cache))
            start = time.perf_counter()
            state = jax.block_until_ready(decode(model, state, DECODE_STEPS))
            seconds = time.perf_counter() - start
        return self.tokenizer.decode(state.generated()[0]), DECODE_STEPS / seconds
