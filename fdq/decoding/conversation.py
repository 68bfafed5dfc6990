"""A chat with a model: turns by its template, one KV cache for all of them.

A turn is rendered and encoded with all that was said before; of its tokens those that the cache
holds already are not read again. Whatever a template does with earlier turns (it may leave out what
the model thought, or strip spaces), the model reads what the template says: the cache is used as
far as both agree.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np

from fdq.cache import limits
from fdq.decoding import checks, special_tokens
from fdq.decoding.chat_template import ChatTemplate
from fdq.decoding.loop import LogitsProcessor, prefill, run, stop_table
from fdq.decoding.sampling import Sampling, checked
from fdq.decoding.state import DecodeState
from fdq.decoding.tokenizer import Tokenizer

# Tokens between two looks at the answer; a GPU takes so many in one go in any case.
_STEPS = {"cpu": 4}
_STEPS_ELSEWHERE = 16

Ended = Literal["stop token", "max_new_tokens", "context", "interrupted"]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model said, and what it took.

    Attributes:
      text: without special tokens.
      tokens: without the stop token.
      read: tokens of the prompt that were run through the model for this answer.
      kept: tokens of the prompt that the cache held already.
      ended: why the answer ends.
    """

    text: str
    tokens: list[int]
    read: int
    kept: int
    ended: Ended


class Conversation:
    """Turns of one person and a model; `ask` takes the next.

    Args:
      model: a `fdq.models.Decoder`.
      tokenizer: a `Tokenizer`; that of the checkpoint that the model came from where not given.
      template: a `ChatTemplate`; likewise.
      system: what the model is told before the first turn.
      max_length: tokens of the whole conversation, slots of its cache.
      sampling: None is greedy.
      logits_processor: as in `fdq.decode`.
      stop_tokens: what ends an answer; by default all that the checkpoint's files name, and the one
        that the template puts after an answer.
      cache: format of the KV cache, by default that of the model's scheme.
      key: PRNG key for sampling.
      variables: what the template knows besides, such as `enable_thinking=False`.

    Attributes:
      messages: what was said, the system's message included.
      stop_tokens: see above.

    Raises:
      ValueError: a checkpoint without a chat template or tokenizer, or a cache that does not fit.
    """

    def __init__(
        self,
        model: Any,
        *,
        tokenizer: Tokenizer | None = None,
        template: ChatTemplate | None = None,
        system: str | None = None,
        max_length: int = 4096,
        sampling: Sampling | None = None,
        logits_processor: LogitsProcessor | None = None,
        stop_tokens: Any = None,
        cache: Any = None,
        key: jax.Array | None = None,
        **variables: Any,
    ):
        checks.decodable("Conversation", model)
        self._model, self._variables, self._format = model, variables, cache
        self._tokenizer = tokenizer or Tokenizer.load(_folder_of(model))
        self._template = template or ChatTemplate.load(_folder_of(model))
        self._sampling = None if sampling is None else checked(sampling)
        self._processor = logits_processor
        self._key = checks.prng_key(key)
        self.max_length = checks.integer("max_length", max_length, least=2)
        limits.warn_of_positions("Conversation", self.max_length, model.config)
        if stop_tokens is None:
            stop_tokens = special_tokens.union(
                model.config.eos_token_ids,
                self._tokenizer.stop_token_ids,
                token_after_an_answer(self._template, self._tokenizer, **variables),
            )
        self.stop_tokens = tuple(stop_tokens)
        self._stops = stop_table(self.stop_tokens, 1)
        self._starts = 0
        self.reset(system)

    def reset(self, system: str | None = None) -> None:
        """Forgets what was said; `system` is what the model is told before the next turn."""
        self.messages: list[dict[str, Any]] = []
        if system:
            self.messages.append({"role": "system", "content": system})
        self._forget()

    @property
    def length(self) -> int:
        """Tokens in the cache, with the last one, which the next step feeds."""
        return len(self._known)

    def ask(
        self,
        text: str,
        max_new_tokens: int | None = None,
        *,
        stream: Callable[[str], None] | None = None,
        interrupted: Callable[[], bool] | None = None,
    ) -> Answer:
        """The model's answer to `text`; both are part of the conversation from then on.

        Args:
          text: of the person's turn.
          max_new_tokens: at most so many tokens; as many as fit where not given.
          stream: called with each piece of the answer as it becomes certain.
          interrupted: asked every few tokens; where it is true the answer ends there, and the
            conversation may go on.

        Raises:
          ValueError: the conversation does not fit into the cache any more, or the template refuses
            the turn. The conversation is as it was.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._template.render(messages, **self._variables)
        tokens = self._encode(prompt)
        room = self.max_length - len(tokens)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(tokens)} tokens and its cache {self.max_length} slots. "
                "Begin a new one, or make the cache longer."
            )
        most = room if max_new_tokens is None else checks.integer("max_new_tokens", max_new_tokens)
        state, kept = self._read(tokens)
        answer, ended = _Text(self._tokenizer, stream), "max_new_tokens"
        steps = _STEPS.get(jax.default_backend(), _STEPS_ELSEWHERE)
        new: list[int] = []
        while len(new) < min(most, room):
            if interrupted is not None and interrupted():
                ended = "interrupted"
                break
            count = min(steps, min(most, room) - len(new))
            state = self._decode(state, count)
            new, finished = self._after(state, len(tokens))
            stopped = finished and bool(new) and new[-1] in self.stop_tokens
            answer.feed(new[:-1] if stopped else new)
            if finished:
                ended = "stop token" if stopped else "context"
                break
        else:
            ended = "max_new_tokens" if most < room else "context"
        said = answer.finish()
        self._state, self._known = state, tokens + new
        self._spelled = (prompt + said, tokens + answer.tokens)
        self.messages = [*messages, {"role": "assistant", "content": said}]
        return Answer(said, answer.tokens, len(tokens) - kept, kept, ended)  # pyright: ignore[reportArgumentType]

    def _forget(self) -> None:
        self._state: DecodeState | None = None
        self._known: list[int] = []
        # A text that the conversation begins with, and tokens that the model has had for it.
        self._spelled: tuple[str, list[int]] = ("", [])

    def _encode(self, prompt: str) -> list[int]:
        """Tokens of the whole conversation.

        The model's own where the text is as it was, for a tokenizer may cut it another way. A
        special token comes next then: text is cut there in any case.
        """
        text, tokens = self._spelled
        if text and prompt.startswith(text):
            rest = self._tokenizer.encode(prompt[len(text) :])
            if rest and self._tokenizer.is_special(rest[0]):
                return [*tokens, *rest]
        return self._tokenizer.encode(prompt)

    def _read(self, tokens: list[int]) -> tuple[DecodeState, int]:
        """The state that knows `tokens`, and how many of them the cache held."""
        state, known = self._state, self._known
        self._forget()  # donated from here on: whatever interrupts this costs the cache alone
        pairs = enumerate(zip(known, tokens, strict=False))
        kept = next((i for i, (a, b) in pairs if a != b), min(len(known), len(tokens)))
        kept = min(kept, len(tokens) - 1)
        spare = None if state is None else state.cache.spare
        if state is not None and spare is not None:
            longest = int(jax.device_get(state.cache.reach)[0])
            if kept - 1 < longest - spare:
                kept = 0  # rings have lost what the next token would see: all is read anew
        if state is None or kept < 1:
            empty = self._model.init_cache(1, self.max_length, self._format)
            key = jax.random.fold_in(self._key, self._starts)
            self._starts += 1
            return prefill(self._model, [tokens], empty, key=key), 0
        return prefill(self._model, [tokens[kept:]], state=state.rollback(kept)), kept

    def _decode(self, state: DecodeState, steps: int) -> DecodeState:
        return run(
            self._model,
            state,
            steps,
            sampling=self._sampling,
            stop_tokens=self._stops,
            logits_processor=self._processor,
        )

    def _after(self, state: DecodeState, start: int) -> tuple[list[int], bool]:
        row, length, finished = jax.device_get((state.tokens, state.length, state.finished))
        return np.asarray(row)[0, start : int(length[0])].tolist(), bool(finished[0])


def token_after_an_answer(
    template: ChatTemplate, tokenizer: Tokenizer, **variables: Any
) -> tuple[int, ...]:
    """The special token that a template puts after an answer, if it does: a text ends there.

    The files of many chat models name another one, or none.
    """
    mark = "answer"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
    try:
        text = template.render(messages, **{**variables, "add_generation_prompt": False})
    except ValueError:  # a template that wants something else of its messages
        return ()
    after = tokenizer.encode(text.rpartition(mark)[2].lstrip())
    return (after[0],) if after and tokenizer.is_special(after[0]) else ()


class _Text:
    """Tokens of an answer as text."""

    def __init__(self, tokenizer: Tokenizer, stream: Callable[[str], None] | None):
        self._decoder, self._stream = tokenizer.stream(), stream
        self._pieces: list[str] = []
        self.tokens: list[int] = []

    def feed(self, tokens: list[int]) -> None:
        """Takes all tokens so far."""
        new = tokens[len(self.tokens) :]
        self.tokens += new
        self._pass_on(self._decoder.feed(new))

    def finish(self) -> str:
        """The whole text."""
        self._pass_on(self._decoder.finish())
        return "".join(self._pieces)

    def _pass_on(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)
            if self._stream is not None:
                self._stream(piece)


def _folder_of(model: Any) -> str:
    path = getattr(model, "tokenizer_path", None)
    if path is None:
        raise ValueError(
            "Conversation: a model without a tokenizer; give tokenizer= and template=."
        )
    return path
