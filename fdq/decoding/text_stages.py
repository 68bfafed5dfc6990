"""What decoders of tokens are made of: stages that get strings and keep what may still change.

A stage is called with the strings that come next, and whether they are the last ones; it returns
those that nothing to come can change. Strings are tokens, or, behind Fuse and ByteLevel, fragments
of the one string that these make of all: `Replace`, `Strip` and `Whole` are for fragments.
"""

import abc
import codecs
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, override

Function = Callable[[str], str]

_BYTE_TOKEN = re.compile(r"<0x(?:[0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")  # "+f" is a number to Rust


class Stage(abc.ABC):
    """Strings in, strings out; what may still change is kept."""

    @abc.abstractmethod
    def __call__(self, items: list[str], last: bool) -> list[str]:
        """The strings that are certain once `items` have come, all of them if they are the last."""


class Each(Stage):
    """Every string on its own."""

    def __init__(self, function: Function):
        self._function = function

    @override
    def __call__(self, items: list[str], last: bool) -> list[str]:
        return [self._function(item) for item in items]


class FirstDiffers(Stage):
    """The first token of a text reads otherwise than those that follow."""

    def __init__(self, first: Function, other: Function):
        self._function = first
        self._other = other

    @override
    def __call__(self, items: list[str], last: bool) -> list[str]:
        made = []
        for item in items:
            made.append(self._function(item))
            self._function = self._other
        return made


class LastDiffers(Stage):
    """The last token of a text reads otherwise, so one is kept until another follows."""

    def __init__(self, last: Function, other: Function):
        self._last = last
        self._other = other
        self._kept: list[str] = []

    @override
    def __call__(self, items: list[str], last: bool) -> list[str]:
        known = [*self._kept, *items]
        self._kept = known[-1:]
        made = [self._other(item) for item in known[:-1]]
        return made + [self._last(item) for item in self._kept] if last else made


class Runs(Stage):
    """Of equal tokens in a row only the first, and none that reads as nothing."""

    def __init__(self, function: Function):
        self._function = function
        self._previous: str | None = None

    @override
    def __call__(self, items: list[str], last: bool) -> list[str]:
        made = []
        for item in items:
            if item != self._previous:
                made.append(self._function(item))
            self._previous = item
        return [item for item in made if item]


class ByteRuns(Stage):
    """Tokens like `<0xE7>` are bytes: a run of them is UTF-8 as a whole, or one U+FFFD a byte.

    A run is kept until it ends: one byte more may spoil it from its beginning.
    """

    def __init__(self):
        self._run = bytearray()

    @override
    def __call__(self, items: list[str], last: bool) -> list[str]:
        made = []
        for item in items:
            if _BYTE_TOKEN.fullmatch(item):
                self._run.append(int(item[3:5], 16))
            else:
                made += [*self._end_run(), item]
        return made + self._end_run() if last else made

    def _end_run(self) -> list[str]:
        run, self._run = bytes(self._run), bytearray()
        try:
            return [run.decode("utf-8")] if run else []
        except UnicodeDecodeError:
            return ["\ufffd"] * len(run)


class Utf8(Stage):
    """Tokens whose characters stand for bytes are UTF-8, with U+FFFD for what is none."""

    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @override
    def __call__(self, items: list[str], last: bool) -> list[str]:
        return [self._decoder.decode(b"".join(map(bytes_of, items)), final=last)]


class Replace(Stage):
    """Replaces `old`, which is not empty, in fragments.

    After the last match there is none in the rest, so only the longest end of it that begins `old`
    can be part of a match to come.
    """

    def __init__(self, old: str, new: str):
        self._old = old
        self._new = new
        self._kept = ""

    @override
    def __call__(self, items: list[str], last: bool) -> list[str]:
        *before, rest = (self._kept + "".join(items)).split(self._old)
        most = 0 if last else min(len(rest), len(self._old) - 1)
        kept = next((n for n in range(most, 0, -1) if self._old.startswith(rest[-n:])), 0)
        self._kept = rest[len(rest) - kept :]
        return [*(text + self._new for text in before), rest[: len(rest) - kept]]


class Strip(Stage):
    """Strips at most `start` and `stop` of a character off the ends of what fragments make."""

    def __init__(self, content: str, start: int, stop: int):
        self._content = content
        self._start = start
        self._stop = stop
        self._kept = ""

    @override
    def __call__(self, items: list[str], last: bool) -> list[str]:
        text = "".join(items)
        if self._start and text:
            rest = strip(text, self._content, self._start, 0)
            # Goes on with the next fragment only if all of this one went.
            self._start = 0 if rest else self._start - len(text)
            text = rest
        text = self._kept + text
        certain = strip(text, self._content, 0, self._stop)
        self._kept = text[len(certain) :]
        return [certain]


class Whole(Stage):
    """A function that needs all fragments, unless one `settles` that it changes nothing."""

    def __init__(self, function: Function, settles: Callable[[str], bool] = lambda fragment: False):
        self._function = function
        self._settles = settles
        self._settled = False
        self._kept: list[str] = []

    @override
    def __call__(self, items: list[str], last: bool) -> list[str]:
        self._kept += items
        self._settled = self._settled or any(map(self._settles, items))
        if not self._settled:
            return [self._function("".join(self._kept))] if last else []
        made, self._kept = self._kept, []
        return made


class Unknown(Stage):
    """A decoder of `tokenizers` that may do anything: it gets all tokens at once."""

    def __init__(self, decoder: Any):
        self._decoder = decoder
        self._kept: list[str] = []

    @override
    def __call__(self, items: list[str], last: bool) -> list[str]:
        self._kept += items
        return [self._decoder.decode(self._kept)] if last else []


def strip(text: str, content: str, start: int, stop: int) -> str:
    """`text` without at most `start` and `stop` of the character `content` at its ends."""
    text = text[min(start, len(text) - len(text.lstrip(content))) :]
    return text[: len(text) - min(stop, len(text) - len(text.rstrip(content)))]


def read_byte(text: str) -> str:
    """The character of a text that is a single token like `<0x41>`, or the text itself."""
    if not _BYTE_TOKEN.fullmatch(text):
        return text
    return bytes([int(text[3:5], 16)]).decode("utf-8", "replace")


def begins_no_byte_token(text: str) -> bool:
    """Whether no token like `<0x41>` is made of these characters alone."""
    return not set(text) <= set("<0x+123456789abcdefABCDEF>")


@functools.cache
def byte_of() -> Mapping[str, int]:
    """The byte that each character of a byte-level vocabulary stands for."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


def bytes_of(token: str) -> bytes:
    """The bytes that a byte-level token stands for; an added token is spelled as it is."""
    try:
        return bytes(map(byte_of().__getitem__, token))
    except KeyError:
        return token.encode()
