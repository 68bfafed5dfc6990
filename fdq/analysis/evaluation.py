"""How good a quantized model is: bits per byte, perplexity, distance to the original, and bytes.

`evaluate` scores each token once. The text is cut into overlapping windows; a window scores only
the tokens that no earlier window scored, so that every token after the first window has at least
`window - stride` tokens of context. Logits exist for one batch of windows at a time.

The distance to the original is KL(reference || model) in nats per token. It is paired (both
models see the same tokens), so it separates formats that the loss cannot tell apart.
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdq.analysis.planner import WeightTable, cache_bytes_per_token, cache_name, weight_table
from fdq.analysis.windows import (
    Windows,
    check_recorded,
    check_tokenizers,
    check_vocabulary,
)
from fdq.cache import limits
from fdq.cache.kv_cache import parse_format
from fdq.decoding.state import divergences, log_probabilities
from fdq.models import Decoder
from fdq.ops.placement import mesh_of
from fdq.schemes.scheme import CacheSpec
from fdq.text_table import aligned


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What `evaluate` measured; `seconds` of wall time include compilation.

    Attributes:
      tokens: tokens scored.
      nats_per_token: mean negative log likelihood.
      bits_per_byte: bits that the model needs per byte of text; None if the bytes are not known.
      reference_bits_per_byte: the same of the reference, without a cache; None without one.
      reference_nats_per_token: likewise.
      kl_nats_per_token: mean KL(reference || model); None without a reference.
      top1_agreement: share of tokens, 0 to 1, on which the reference's most likely next token is
        also the model's; None without a reference.
      weight_bytes: bytes of all weights as they are held, scales and unquantized ones included.
      bits_per_weight: of all weights, scales included.
      quantized_bits_per_weight: of the quantized ones, scales included; None if none is.
      cache: name of the format in which the cache was held; None if no cache was used.
      cache_bytes_per_token: bytes that one token adds to the cache of one sequence; None as above.
      window: tokens of context at most, and `stride`, how many of them each window scores.
    """

    tokens: int
    nats_per_token: float
    perplexity: float
    bits_per_byte: float | None = None
    reference_bits_per_byte: float | None = None
    kl_nats_per_token: float | None = None
    top1_agreement: float | None = None
    weight_bytes: int | None = None
    bits_per_weight: float | None = None
    quantized_bits_per_weight: float | None = None
    cache: str | None = None
    cache_bytes_per_token: float | None = None
    seconds: float = 0.0
    reference_nats_per_token: float | None = None
    window: int | None = None
    stride: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The fields as one JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    def rows(self) -> list[tuple[str, str]]:
        """(name, value with unit) of what was measured, for tables."""
        candidates = [
            ("bits per byte", self.bits_per_byte, ".4f", ""),
            ("bits per byte of the reference", self.reference_bits_per_byte, ".4f", ""),
            ("perplexity", self.perplexity, ".3f", self._windows()),
            ("nats per token", self.nats_per_token, ".4f", ""),
            ("KL to the reference", self.kl_nats_per_token, ".5f", " nats per token"),
            ("top-1 agreement", self.top1_agreement, ".2%", ""),
            ("weights", self.weight_bytes, ",", " bytes"),
            ("bits per weight, quantized", self.quantized_bits_per_weight, ".3f", ""),
            ("bits per weight, all", self.bits_per_weight, ".3f", ""),
            ("cache format", self.cache, "", ""),
            ("cache per token", self.cache_bytes_per_token, ",.0f", " bytes"),
            ("tokens scored", self.tokens, ",", ""),
            ("seconds", self.seconds, ".1f", ""),
        ]
        return [(n, format(v, spec) + unit) for n, v, spec, unit in candidates if v is not None]

    def _windows(self) -> str:
        return f" (window {self.window}, stride {self.stride})" if self.window else ""

    def __str__(self) -> str:
        return aligned(self.rows())


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RecordedLogits:
    """A reference's logits over one text, in host memory; made by `record_logits`.

    Of each batch of windows of `cut` one float32 [batch, window, vocab].
    """

    cut: Windows
    logits: tuple[np.ndarray, ...]


def evaluate(
    model: Any,
    tokens: Any,
    *,
    reference: Any = None,
    text_bytes: int | None = None,
    window: int = 256,
    stride: int | None = None,
    batch: int | None = None,
    through_cache: bool = False,
    cache: str | CacheSpec | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Bits per byte, perplexity, KL to a reference and memory of `model` on `tokens`.

    Args:
      model: a model of `fdq.models`, any NNX module, or any callable, from tokens
        [batch, length] to logits [batch, length, vocab].
      tokens: [length] integers, one text. The first token is context only (a begin-of-text token,
        say) and is not scored.
      reference: the original: a model as above, or `record_logits` of it over the same tokens.
      text_bytes: bytes of UTF-8 that tokens[1:] stand for; needed for bits per byte.
      window: tokens of context at most.
      stride: tokens that each window but the first scores; None means half of `window`.
      batch: windows at a time; None bounds the logits by 128 MiB.
      through_cache: attend to a KV cache, as decoding does, so that the cache's format is
        measured too. The reference is still evaluated without one. Needs a model of `fdq.models`.
      cache: format of that cache ("C8", "C16", a CacheSpec); None means the one that the model's
        own scheme names.
      progress: called with (batches done, batches in all).

    Raises:
      ValueError: tokens that are not a vector of at least 2 integers, or outside the vocabulary;
        a window, stride or batch out of range; a reference with another vocabulary, or recorded
        with other tokens or windows; models whose checkpoints' tokenizers differ; `cache` without
        `through_cache`.
      TypeError: `through_cache` with a model that is none of `fdq.models`.
    """
    start = time.perf_counter()
    if cache is not None and not through_cache:
        raise ValueError(f"`cache` (={cache!r}) has no effect without through_cache=True.")
    recorded = reference if isinstance(reference, RecordedLogits) else None
    if recorded is not None and batch is None:
        batch = recorded.cut.batch
    cut = Windows.of(tokens, window, stride, batch, model)
    limits.warn_of_positions("evaluate", cut.window, getattr(model, "config", None))
    if recorded is not None:
        check_recorded(recorded.cut, cut)

    cache_spec = per_token = None
    if through_cache:
        if not isinstance(model, Decoder):
            found = type(model).__name__
            raise TypeError(f"through_cache needs a model of fdq.models, got {found}.")
        cache_spec = model.cache_spec if cache is None else parse_format(cache)
        per_token = cache_bytes_per_token(model.config, cache_spec)
        logits_of = functools.partial(_cached_logits, model, cache_spec=cache_spec)
    else:
        logits_of = _logits_function(model)
    reference_of = None
    if reference is not None and recorded is None:
        check_vocabulary(reference, cut.tokens, "reference")
        mine, theirs = (getattr(one, "tokenizer_path", None) for one in (model, reference))
        check_tokenizers(mine, theirs, cut.tokens)
        reference_of = _logits_function(reference)

    totals = np.zeros(4)
    scored = 0
    batches = list(cut.batches())
    for index, (inputs, targets, mask) in enumerate(batches):
        logits = logits_of(inputs)
        if recorded is not None:
            other = jnp.asarray(recorded.logits[index])
        else:
            other = None if reference_of is None else reference_of(inputs)
        if other is not None and other.shape != logits.shape:
            raise ValueError(
                f"The model's logits are {logits.shape} and the reference's {other.shape}, but "
                "[batch, length, vocab] must be equal. Compare models of one vocabulary."
            )
        with mesh_of(logits, other):
            totals += np.asarray(_sums(logits, other, targets, mask), np.float64)
        scored += int(mask.sum())
        if progress is not None:
            progress(index + 1, len(batches))

    nats = float(totals[0]) / scored
    compared = reference is not None
    weights = weight_table(model) if isinstance(model, nnx.Module) else WeightTable(())
    return Report(
        tokens=scored,
        nats_per_token=nats,
        perplexity=math.exp(min(nats, 700.0)),
        bits_per_byte=_bits(totals[0], text_bytes),
        reference_bits_per_byte=_bits(totals[3], text_bytes) if compared else None,
        kl_nats_per_token=float(totals[1]) / scored if compared else None,
        top1_agreement=float(totals[2]) / scored if compared else None,
        weight_bytes=weights.bytes or None,
        bits_per_weight=weights.bits_per_weight,
        quantized_bits_per_weight=weights.quantized_bits_per_weight,
        cache=cache_name(cache_spec) if through_cache else None,
        cache_bytes_per_token=per_token,
        seconds=time.perf_counter() - start,
        reference_nats_per_token=float(totals[3]) / scored if compared else None,
        window=cut.window,
        stride=cut.stride,
    )


def record_logits(
    model: Any,
    tokens: Any,
    *,
    window: int = 256,
    stride: int | None = None,
    batch: int | None = None,
) -> RecordedLogits:
    """The logits of `model` over `tokens`, to compare several models with without running it again.

    Takes 4 * vocab * window / stride bytes a token of host memory: for small vocabularies.
    `evaluate` must get the same tokens and windows.
    """
    cut = Windows.of(tokens, window, stride, batch, model)
    logits_of = _logits_function(model)
    logits = tuple(np.asarray(logits_of(inputs)) for inputs, _, _ in cut.batches())
    return RecordedLogits(cut=cut, logits=logits)


@jax.jit
def _sums(
    logits: jax.Array, reference: jax.Array | None, targets: jax.Array, mask: jax.Array
) -> jax.Array:
    """Sums over the mask: negative log likelihood, KL(reference || model), agreements, and the
    reference's negative log likelihood; in nats, zeros without a reference.

    `logits` and `reference` are [batch, length, vocab], `targets` and `mask` [batch, length].
    """
    nats = -log_probabilities(logits, targets)
    if reference is None:
        kl = agree = others = jnp.zeros_like(nats)
    else:
        log_q = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        log_p = jax.nn.log_softmax(reference.astype(jnp.float32), axis=-1)
        kl = divergences(log_p, log_q)
        others = -log_probabilities(reference, targets)
        agree = (jnp.argmax(log_p, axis=-1) == jnp.argmax(log_q, axis=-1)).astype(jnp.float32)
    return jnp.stack([jnp.sum(jnp.where(mask > 0, x, 0.0)) for x in (nats, kl, agree, others)])


def _bits(nats: float, text_bytes: int | None) -> float | None:
    """Bits per byte of a text's nats."""
    return float(nats) / math.log(2) / text_bytes if text_bytes else None


@jax.jit
def _module_logits(model: nnx.Module, tokens: jax.Array) -> jax.Array:
    return model(tokens)  # pyright: ignore[reportCallIssue]


def _logits_function(model: Any) -> Callable[[np.ndarray], jax.Array]:
    """Maps tokens [batch, length] to logits; a module's weights are arguments, never constants."""
    if isinstance(model, nnx.Module):
        return lambda tokens: _module_logits(model, jnp.asarray(tokens))
    if callable(model):
        return lambda tokens: jnp.asarray(model(jnp.asarray(tokens)))
    raise TypeError(
        "Expected a Flax NNX module or a callable from tokens to logits, got "
        f"{type(model).__name__}."
    )


@functools.partial(jax.jit, static_argnames="cache_spec")
def _cached_logits(model: Any, tokens: Any, *, cache_spec: CacheSpec | None) -> jax.Array:
    """Logits [B, L, vocab] of whole windows, every token attending to quantized keys and values.

    A cache quantizes a token's keys and values when it is written, before it is attended to, so
    one pass over the window stores and reads what decoding token by token does.
    """
    batch, length = tokens.shape
    cache = model.init_cache(batch, length, cache_spec or "C16")
    hidden, _ = model.extend(tokens, cache, jnp.zeros((), jnp.int32))
    return model.head(hidden)
