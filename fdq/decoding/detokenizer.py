"""From the strings of tokens to text, as they come: the decoders of `tokenizers`, incrementally.

A decoder of tokenizer.json maps the strings of all tokens to text. Decoding a window of the last
tokens cannot replace it: the first token of a text (Metaspace, WordPiece, Strip), the last one
(BPEDecoder), the one before (CTC), or a whole run (ByteFallback) decides what a token reads as. So
each decoder is written as stages, which return what nothing to come can change and keep the little
that may change: a partial UTF-8 character, a run of byte tokens, one token, an end that may begin a
match. The time for a text is linear in its length, and the pieces of a stream are the decoding of
all of it because decoding is a stream of one piece.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fdq.decoding.text_stages import (
    ByteRuns,
    Each,
    FirstDiffers,
    LastDiffers,
    Replace,
    Runs,
    Stage,
    Strip,
    Unknown,
    Utf8,
    Whole,
    begins_no_byte_token,
    byte_of,
    bytes_of,
    read_byte,
    strip,
)

# What `cleanup` of WordPiece and CTC replaces, in this order.
_CLEANUP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" do not", " don't"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
_Settings = Mapping[str, Any]


class _UnknownDecoderError(Exception):
    """A decoder, or a setting of one, that has no stages here."""


def settings(component: Any) -> dict[str, Any] | None:
    """A decoder or post-processor of `tokenizers` as in tokenizer.json; None if it has no such."""
    if component is None:
        return None
    try:
        return json.loads(component.__getstate__())
    except Exception:  # the Rust side raises bare Exception for what is written in Python
        return None


def stages(decoder: Any) -> list[Stage]:
    """Fresh stages of a decoder of `tokenizers`; joined by "", their strings are the text.

    A decoder that is not known here is one stage, which keeps everything and returns it at the end.
    """
    if decoder is None:
        return [FirstDiffers(lambda token: token, lambda token: " " + token)]
    try:
        return _stages(settings(decoder) or {}, fused=False)[0]
    except _UnknownDecoderError:
        return [Unknown(decoder)]


def run(chain: Sequence[Stage], items: Iterable[str], *, last: bool = False) -> str:
    """The text that `items` make certain; all of it if they are the last."""
    items = list(items)
    for stage in chain:
        items = stage(items, last)
    return "".join(items)


def _stages(decoder: _Settings, *, fused: bool) -> tuple[list[Stage], bool]:
    """Stages of one decoder, and whether they return fragments of one string.

    `fused` says whether such fragments come in: the string is the first and the last token then.
    """
    kind = decoder.get("type")
    if kind == "Sequence":
        chain: list[Stage] = []
        for part in decoder["decoders"]:
            added, fused = _stages(part, fused=fused)
            chain += added
        return chain, fused
    fields, make = _DECODERS.get(str(kind), (None, None))
    # With other fields than these it may mean something else, and emptiness lies everywhere.
    if make is None or set(decoder) - {"type"} != fields or "" in _sought(decoder):
        raise _UnknownDecoderError(f"decoder {kind!r}: {dict(decoder)}")
    return make(decoder, fused), fused or kind in ("ByteLevel", "Fuse")


def _sought(decoder: _Settings) -> list[Any]:
    """What a decoder looks for to replace it."""
    pattern = decoder.get("pattern")
    names = ("suffix", "pad_token", "word_delimiter_token", "replacement")
    found = [decoder.get(name) for name in names]
    return [*found, *pattern.values()] if isinstance(pattern, dict) else found


def _bpe_decoder(decoder: _Settings, fused: bool) -> list[Stage]:
    suffix = decoder["suffix"]
    if fused:
        return [Replace(suffix, "")]
    return [LastDiffers(_replaced([(suffix, "")]), _replaced([(suffix, " ")]))]


def _byte_fallback(decoder: _Settings, fused: bool) -> list[Stage]:
    return [Whole(read_byte, begins_no_byte_token) if fused else ByteRuns()]


def _byte_level(decoder: _Settings, fused: bool) -> list[Stage]:
    if not fused:
        return [Utf8()]
    # One character that stands for no byte, and the string is read as it is.
    return [
        Whole(
            lambda text: bytes_of(text).decode("utf-8", "replace"),
            lambda text: not byte_of().keys() >= set(text),
        )
    ]


def _ctc(decoder: _Settings, fused: bool) -> list[Stage]:
    pairs = [(decoder["pad_token"], "")]
    if decoder["cleanup"]:
        pairs += [*_CLEANUP, (decoder["word_delimiter_token"], " ")]
    return _in_fragments(pairs) if fused else [Runs(_replaced(pairs))]


def _fuse(decoder: _Settings, fused: bool) -> list[Stage]:
    return []


def _metaspace(decoder: _Settings, fused: bool) -> list[Stage]:
    mark = decoder["replacement"]
    other = _replaced([(mark, " ")])
    first = other if decoder["prepend_scheme"] == "never" else _replaced([(mark, "")])
    return [Each(first) if fused else FirstDiffers(first, other)]


def _replace(decoder: _Settings, fused: bool) -> list[Stage]:
    new = decoder["content"]
    match decoder["pattern"]:
        case {"String": str(old)}:
            return [Replace(old, new) if fused else Each(_replaced([(old, new)]))]
        case {"Regex": str(pattern)}:
            import tokenizers

            # Its regular expressions are not those of Python, and see as far as they like.
            library = tokenizers.decoders.Replace(tokenizers.Regex(pattern), new)
            return [(Whole if fused else Each)(lambda text: library.decode([text]))]
    raise _UnknownDecoderError(f"Replace of {decoder['pattern']!r}")


def _strip(decoder: _Settings, fused: bool) -> list[Stage]:
    ends = (decoder["content"], decoder["start"], decoder["stop"])
    return [Strip(*ends) if fused else Each(lambda token: strip(token, *ends))]


def _word_piece(decoder: _Settings, fused: bool) -> list[Stage]:
    prefix = decoder["prefix"]
    pairs = _CLEANUP if decoder["cleanup"] else ()
    if fused:
        return _in_fragments(pairs)
    clean = _replaced(pairs)

    def other(token: str) -> str:
        return clean(token[len(prefix) :] if token.startswith(prefix) else " " + token)

    return [FirstDiffers(clean, other)]


# The fields of each decoder in tokenizer.json, and what makes its stages.
_DECODERS: dict[str, tuple[set[str], Callable[[_Settings, bool], list[Stage]]]] = {
    "BPEDecoder": ({"suffix"}, _bpe_decoder),
    "ByteFallback": (set(), _byte_fallback),
    "ByteLevel": ({"add_prefix_space", "trim_offsets", "use_regex"}, _byte_level),
    "CTC": ({"pad_token", "word_delimiter_token", "cleanup"}, _ctc),
    "Fuse": (set(), _fuse),
    "Metaspace": ({"replacement", "prepend_scheme", "split"}, _metaspace),
    "Replace": ({"pattern", "content"}, _replace),
    "Strip": ({"content", "start", "stop"}, _strip),
    "WordPiece": ({"prefix", "cleanup"}, _word_piece),
}


def _replaced(pairs: Iterable[tuple[str, str]]) -> Callable[[str], str]:
    """Replaces in a token, one pair after the other."""

    def replace(text: str) -> str:
        for old, new in pairs:
            text = text.replace(old, new)
        return text

    return replace


def _in_fragments(pairs: Iterable[tuple[str, str]]) -> list[Stage]:
    return [Replace(old, new) for old, new in pairs]
