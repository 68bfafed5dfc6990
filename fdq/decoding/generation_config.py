"""What a checkpoint's generation_config.json says about drawing tokens.

Its stop tokens are read by `fdq.decoding.special_tokens`. As in transformers its temperature and
the rest count where `do_sample` is true; what the file does not name is not restricted.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any, Self

from fdq.decoding import special_tokens
from fdq.decoding.repetition import repetition_penalty
from fdq.decoding.sampling import Sampling

FILE_NAME = "generation_config.json"

# How numbers are named that change nothing.
_NO_TOP_K, _NO_TOP_P, _NO_MIN_P, _NO_PENALTY = (0, -1), (1.0,), (0.0,), (1.0,)
# What would change the text and is not followed, with values by which it does not.
_NOT_FOLLOWED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "bad_words_ids": ([],),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ([],),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1,),
    "stop_strings": ([],),
}


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Defaults of a checkpoint, None for what it does not say; `load` reads them.

    Attributes:
      do_sample: whether tokens are drawn; else the likeliest is taken.
      max_new_tokens: at most so many.
      temperature: as of `fdq.Sampling`, as are `top_k`, `top_p` and `min_p`.
      repetition_penalty: as of `fdq.decoding.repetition`.
      stop_tokens: those that the file names; a text ends at those of the other files too.
      left_out: what it says as well and fdq does not do.
    """

    do_sample: bool = False
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_tokens: tuple[int, ...] = ()
    left_out: tuple[str, ...] = ()

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Self:
        """That of the checkpoint in `directory`; without the file, one that says nothing.

        Raises:
          ValueError: it is no JSON object, or a value in it can mean nothing.
        """
        path = pathlib.Path(directory) / FILE_NAME
        content = special_tokens.read_json(path)
        read = _Reader(content, path)
        do_sample = content.get("do_sample")
        if not isinstance(do_sample, bool | None):
            raise read.error("do_sample", "true or false")
        return cls(
            do_sample=bool(do_sample),
            max_new_tokens=read.integer("max_new_tokens", ()),
            temperature=read.number("temperature", "0 or more", lambda t: t >= 0),
            top_k=read.integer("top_k", _NO_TOP_K),
            top_p=read.number("top_p", "above 0 and at most 1", lambda p: 0 < p <= 1, _NO_TOP_P),
            min_p=read.number("min_p", "from 0 to 1", lambda p: 0 <= p <= 1, _NO_MIN_P),
            repetition_penalty=read.number(
                "repetition_penalty", "above 0", lambda p: p > 0, _NO_PENALTY
            ),
            stop_tokens=special_tokens.token_ids(path, "eos_token_id"),
            left_out=tuple(
                name
                for name, without in _NOT_FOLLOWED.items()
                if content.get(name) is not None and content[name] not in without
            ),
        )

    def given(self, **arguments: Any) -> Self:
        """With what somebody asked for in place of what the file says; None says nothing.

        A temperature of 0 takes the likeliest token, whatever the file says, and any other draws.

        Raises:
          ValueError: a restriction of draws where nothing is drawn.
        """
        asked = {name: value for name, value in arguments.items() if value is not None}
        made = dataclasses.replace(self, **asked)
        if "temperature" in asked:
            made = dataclasses.replace(made, do_sample=asked["temperature"] > 0)
        restricting = [name for name in ("top_k", "top_p", "min_p") if name in asked]
        if restricting and not made.do_sample:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in restricting)
            raise ValueError(f"{names}: chooses among random draws; add --temperature 1.")
        return made

    @property
    def sampling(self) -> Sampling | None:
        """None where the likeliest token is taken."""
        temperature = 1.0 if self.temperature is None else self.temperature
        if not self.do_sample or temperature == 0:
            return None
        return Sampling(
            temperature=temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p
        )

    @property
    def logits_processor(self) -> Any:
        """What changes logits before a token is drawn, or None."""
        penalty = self.repetition_penalty
        return None if penalty in (None, *_NO_PENALTY) else repetition_penalty(penalty)

    def to_dict(self) -> dict[str, Any]:
        """What counts, by name: without what is not said, or has no part in it."""
        of_draws = ("temperature", "top_k", "top_p", "min_p")
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
            if value not in (None, ()) and (self.do_sample or name not in of_draws)
        }


class _Reader:
    """Values of the file, checked."""

    def __init__(self, content: dict[str, Any], path: pathlib.Path):
        self._content, self._path = content, path

    def error(self, key: str, expected: str) -> ValueError:
        found = self._content[key]
        return ValueError(f"{self._path}: {key}: expected {expected}, found {found!r:.80}.")

    def number(
        self,
        key: str,
        expected: str,
        holds: Callable[[float], bool],
        without: tuple[float, ...] = (),
    ) -> float | None:
        found = self._content.get(key)
        if found is None:
            return None
        is_number = isinstance(found, int | float) and not isinstance(found, bool)
        if not is_number or not math.isfinite(found) or not holds(found):
            raise self.error(key, f"a number {expected}")
        return None if found in without else float(found)

    def integer(self, key: str, without: tuple[int, ...]) -> int | None:
        found = self._content.get(key)
        if found is None or (type(found) is int and found in without):
            return None
        if type(found) is not int or not 0 < found < 2**31:
            raise self.error(key, "a whole number above 0")
        return found
