"""From prompts to continuations: `fdq.generate`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fdq import processes
from fdq.cache import limits
from fdq.decoding import checks, special_tokens
from fdq.decoding.continuation import Continuation
from fdq.decoding.loop import prefill, run, stop_table
from fdq.decoding.programs import LogitsProcessor
from fdq.decoding.sampling import Sampling, checked
from fdq.decoding.state import DecodeState
from fdq.schemes.scheme import CacheSpec

# Tokens between two looks at the state: what a stop token costs at most, and the delay of a stream.
CHUNK_STEPS = 32
# Cache lengths are rounded up to a multiple, so that prompts of similar length share a compile.
_LENGTH_MULTIPLE = 128

Prompt = str | Sequence[int]


def generate(
    model: Any,
    prompts: Prompt | Sequence[Prompt],
    max_new_tokens: int = 128,
    *,
    sampling: Sampling | None = None,
    stop_tokens: Any = None,
    key: jax.Array | None = None,
    cache: str | CacheSpec | None = None,
    max_length: int | None = None,
    stream: Callable[[int, Any], None] | None = None,
    stream_steps: int = CHUNK_STEPS,
    tokenizer: Any = None,
    logits_processor: LogitsProcessor | None = None,
    return_logprobs: bool = False,
    **unknown: Any,
) -> Any:
    """Continues each prompt.

    Args:
      model: a `fdq.models.Decoder`.
      prompts: strings or lists of tokens, all of one kind; one prompt alone is a batch of one.
      max_new_tokens: at most so many tokens each.
      sampling: None is greedy.
      stop_tokens: a list of tokens that end a sequence, or one list per prompt; by default all
        that config.json, generation_config.json or the tokenizer name (`model.config.eos_token_ids`
        and those of `tokenizer`), and () for none. They are not part of what is returned.
      key: PRNG key for sampling.
      cache: format of the KV cache, by default that of the model's scheme.
      max_length: slots of the cache; by default what is needed.
      stream: called as `stream(index, piece)` with each prompt's continuation as it grows: text
        whose UTF-8 is complete, or lists of tokens.
      stream_steps: tokens generated between two looks at the result.
      tokenizer: for strings: a `Tokenizer`, or a tokenizer.json or its directory; by default the
        one of the checkpoint that the model was loaded from.
      logits_processor: `(logits [B, V], state) -> logits`, pure; see `decode`.
      return_logprobs: also return what the model thought of each token.
      unknown: nothing; a name that is none of these is refused with what is meant.

    Returns:
      A list with the continuation of each prompt, text or tokens as the prompts were. A prompt and
      its continuation together are the decoding of the tokens of both; `Continuation` says what is
      returned where the tokenizer does not give the prompt back (lower case, special tokens). With
      `return_logprobs` a pair: this list, and for each prompt a list of the log-probabilities of
      its generated tokens (natural logarithm, before sampling and processors changed them).

    Raises:
      ValueError: no prompts, mixed kinds, an empty prompt, more tokens than `max_length` or than
        there is memory for, a negative `max_new_tokens`, or `stream_steps` below 1.
      TypeError: a model that cannot be decoded, a number or a token that is no integer, a key that
        is none, or an argument that there is not, such as `temperature`, with what is meant.
      ModuleNotFoundError: text prompts without the `tokenizers` package; names the extra.
    """
    checks.keywords("generate", unknown, generate)
    checks.decodable("generate", model)
    max_new_tokens = checks.integer("max_new_tokens", max_new_tokens)
    if max_length is not None:
        max_length = checks.integer("max_length", max_length, least=1)
    stream_steps = checks.integer("stream_steps", stream_steps, least=1)
    key = checks.prng_key(key)
    sampling = None if sampling is None else checked(sampling)
    for name, given in (("stream", stream), ("logits_processor", logits_processor)):
        checks.function(name, given)
    texts, lists = _sort_prompts(prompts)
    text = _tokenizer(model, tokenizer) if texts else None
    rows = [text.encode(prompt, bos=True) for prompt in texts] if text else lists
    for index, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompt {index} has no tokens")
    longest = max(map(len, rows))
    needed = longest + max_new_tokens
    limits.warn_of_positions("generate", max_length or needed, model.config)
    if max_length is None:
        max_length = -(-needed // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        most = getattr(model.config, "max_position", max_length)
        max_length = max(needed, min(max_length, most))
    elif needed > max_length:
        raise ValueError(
            f"the longest prompt ({longest} tokens) and {max_new_tokens} new ones do not fit in "
            f"max_length={max_length}"
        )
    if stop_tokens is None:
        of_text = getattr(text, "stop_token_ids", ())
        stop_tokens = special_tokens.union(model.config.eos_token_ids, of_text)
    tokens = np.zeros((len(rows), longest), np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    empty = model.init_cache(len(rows), max_length, cache)
    lengths = [len(row) for row in rows]
    state = prefill(model, tokens, empty, lengths=lengths, key=key, return_logprobs=return_logprobs)
    stops = stop_table(stop_tokens, len(rows))
    decoders = [Continuation(text, *of) for of in zip(texts, rows, strict=True)] if text else []
    outputs = _Outputs(stops, decoders, stream)
    left = max_new_tokens
    while left > 0 and not all(outputs.ended):
        steps = min(left, stream_steps)
        state = run(
            model,
            state,
            steps,
            sampling=sampling,
            stop_tokens=stops,
            logits_processor=logits_processor,
        )
        left -= steps
        outputs.take(state)
    if not return_logprobs:
        return outputs.finish()
    logprobs = zip(state.generated_logprobs(), outputs.tokens, strict=True)
    return outputs.finish(), [each[: len(tokens)] for each, tokens in logprobs]


class _Outputs:
    """What has been generated so far, and what of it the callback has seen.

    `decoders` make text of tokens, one a sequence; without them tokens are passed on and returned.
    """

    def __init__(self, stops: np.ndarray, decoders: Sequence[Continuation], stream: Any):
        count = len(stops)
        self._stops = stops
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.ended = [False] * count
        self._decoders = decoders
        self._pieces: list[list[str]] = [[] for _ in range(count)]
        self._stream = stream

    def take(self, state: DecodeState) -> None:
        """Reads new tokens, without the stop token that ends a sequence."""
        finished = processes.on_host(state.finished)
        for index, generated in enumerate(state.generated()):
            if self.ended[index]:
                continue
            self.ended[index] = bool(finished[index])
            if self.ended[index] and generated and generated[-1] in self._stops[index]:
                generated = generated[:-1]
            new = generated[len(self.tokens[index]) :]
            self.tokens[index] += new
            self._pass_on(index, self._decoders[index].feed(new) if self._decoders else new)

    def finish(self) -> list[Any]:
        """The continuations; passes on text that was held back."""
        for index, decoder in enumerate(self._decoders):
            self._pass_on(index, decoder.finish())
        return ["".join(p) for p in self._pieces] if self._decoders else self.tokens

    def _pass_on(self, index: int, piece: Any) -> None:
        if isinstance(piece, str):
            self._pieces[index].append(piece)
        if piece and self._stream:
            self._stream(index, piece)


def _sort_prompts(prompts: Any) -> tuple[list[str], list[list[int]]]:
    """The prompts as strings or as token lists; the other list is empty."""
    if isinstance(prompts, str):
        return [prompts], []
    # Items of NumPy's arrays are numbers, those of JAX arrays.
    prompts = [_of_numpy(prompt) for prompt in _items("prompts", _of_numpy(prompts))]
    if not prompts:
        raise ValueError("generate needs at least one prompt")
    if all(isinstance(prompt, int | np.integer) for prompt in prompts):
        prompts = [prompts]  # one list of tokens
    if all(isinstance(prompt, str) for prompt in prompts):
        return prompts, []
    if any(isinstance(prompt, str | int | np.integer) for prompt in prompts):
        raise ValueError("prompts must be all strings or all lists of tokens")
    return [], [
        [checks.token(f"prompt {i}", token) for token in _items(f"prompt {i}", prompt)]
        for i, prompt in enumerate(prompts)
    ]


def _of_numpy(value: Any) -> Any:
    return np.asarray(value)[()] if isinstance(value, jax.Array) else value


def _items(name: str, value: Any) -> list[Any]:
    """A list; TypeError for what is none, and for bytes, whose items look like tokens."""
    no_list = not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0
    if no_list or isinstance(value, bytes | bytearray | Mapping):
        raise TypeError(f"{name}: expected text or a list of tokens, found {value!r:.100}.")
    return list(value)


def _tokenizer(model: Any, tokenizer: Any) -> Any:
    if tokenizer is None:
        tokenizer = getattr(model, "tokenizer_path", None)
        if tokenizer is None:
            raise ValueError(
                "text prompts need a tokenizer: pass tokenizer= (a directory that has a "
                "tokenizer.json), or load the model from a checkpoint that has one"
            )
    if hasattr(tokenizer, "encode") and hasattr(tokenizer, "stream"):
        return tokenizer
    from fdq.decoding.tokenizer import Tokenizer

    return Tokenizer.load(tokenizer)
