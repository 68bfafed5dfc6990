"""Which tokens begin and end a text, as the files of a checkpoint say.

config.json and generation_config.json give tokens that end a text by number, tokenizer_config.json
(or the older special_tokens_map.json) by its spelling. Checkpoints of chat models rarely have all
of them in one place, so a text ends at any of them.
"""

import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

# Tokenizer classes that put a BOS in front unless `add_bos_token` is false, without "Fast".
_CLASSES_WITH_BOS = {"LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer"}
# The files that give special tokens by number.
_NUMBERED = ("config.json", "generation_config.json")

_MAX_BYTES = 2**28  # the largest tokenizer.json have some 2**25

TokenToId = Callable[[str], int | None]


def union(*groups: Iterable[int]) -> tuple[int, ...]:
    """All tokens of all groups, each once, in the order of their first mention."""
    return tuple(dict.fromkeys(token for group in groups for token in group))


def stop_token_ids(
    directory: str | os.PathLike[str], token_to_id: TokenToId | None = None
) -> tuple[int, ...]:
    """The tokens that end a text, from config.json, generation_config.json and the tokenizer.

    `token_to_id` is the tokenizer's; without it the tokenizer's files are searched, which needs no
    other package. Files that are not there say nothing.

    Raises:
      ValueError: a file is no JSON object, or an `eos_token_id` or `eos_token` in it is of
        another kind.
    """
    folder = pathlib.Path(directory)
    by_number = [token_ids(folder / name, "eos_token_id") for name in _NUMBERED]
    spelled = spelling(folder, "eos_token")
    found = None if spelled is None else (token_to_id or _files_token_to_id(folder))(spelled)
    return union(*by_number, () if found is None else (found,))


def first_token_ids(
    directory: str | os.PathLike[str],
    post_processor: Mapping[str, Any] | None,
    token_to_id: TokenToId,
) -> tuple[int, ...]:
    """The tokens that the tokenizer puts before every text; mostly a BOS or nothing.

    `add_bos_token` of tokenizer_config.json decides about the BOS, and the post-processor of
    tokenizer.json about everything else, and about the BOS where `add_bos_token` is not there.
    Where there is no post-processor either, it depends on `tokenizer_class` as in transformers:
    `bos_token` comes first for Llama's and where no class is named. A `bos_token_id` in config.json
    alone puts nothing in front.

    Raises:
      ValueError: `add_bos_token` is no boolean, or true without a BOS in any of the files.
    """
    folder = pathlib.Path(directory)
    path = folder / "tokenizer_config.json"
    config = read_json(path)
    spelled = spelling(folder, "bos_token")
    bos = None if spelled is None else token_to_id(spelled)
    first = _put_first(post_processor)
    wanted = config.get("add_bos_token")
    if wanted is None:
        if first is not None or bos is None:
            return first or ()
        kind = str(config.get("tokenizer_class") or "LlamaTokenizer")
        return (bos,) if kind.removesuffix("Fast") in _CLASSES_WITH_BOS else ()
    if not isinstance(wanted, bool):
        raise ValueError(f"{path}: add_bos_token: expected true or false, found {wanted!r}.")
    named = () if bos is None else (bos,)
    named += union(*(token_ids(folder / name, "bos_token_id") for name in _NUMBERED))
    if not wanted:
        return tuple(token for token in first or () if token not in named)
    if not named:
        raise ValueError(
            f"{path}: add_bos_token is true, but the tokenizer has no bos_token {spelled!r} and "
            "config.json no bos_token_id. Name the BOS, or set add_bos_token to false."
        )
    return first if first and named[0] in first else (named[0], *(first or ()))


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in `path`, empty if there is no such file."""
    if not path.is_file():
        return {}
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path}: larger than {_MAX_BYTES >> 20} MiB.")
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}.")
    return value


def token_ids(path: pathlib.Path, key: str) -> tuple[int, ...]:
    """The token numbers under `key`; -1 stands for none, as in old configs."""
    found = read_json(path).get(key)
    numbers = [] if found is None else found if isinstance(found, list) else [found]
    for number in numbers:
        if not isinstance(number, int) or isinstance(number, bool) or not -1 <= number < 2**31:
            raise ValueError(
                f"{path}: {key}: expected a token number or a list of them, found {found!r}."
            )
    return tuple(number for number in numbers if number >= 0)


def spelling(folder: pathlib.Path, key: str) -> str | None:
    """The text of a special token, a string or an object with `content`."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        config = read_json(folder / name)
        if key not in config:
            continue
        found = config[key]
        text = found.get("content") if isinstance(found, dict) else found
        if text is not None and not isinstance(text, str):
            raise ValueError(
                f"{folder / name}: {key}: expected a string or an object with a string `content`, "
                f"found {found!r}."
            )
        return text
    return None


def _put_first(post_processor: Mapping[str, Any] | None) -> tuple[int, ...] | None:
    """What a post-processor of tokenizer.json puts before a text; None if there is none."""
    match post_processor:
        case {"type": "TemplateProcessing", "single": list(pieces), "special_tokens": dict(known)}:
            special = itertools.takewhile(lambda piece: "SpecialToken" in piece, pieces)
            names = [piece["SpecialToken"]["id"] for piece in special]
            if lacking := [name for name in names if name not in known]:
                raise ValueError(
                    f"tokenizer.json: its post-processor puts {lacking[0]!r} first and does not "
                    "say which token that is (special_tokens)."
                )
            return tuple(token for name in names for token in known[name]["ids"])
        case {"type": "BertProcessing" | "RobertaProcessing", "cls": [str(), int(token)]}:
            return (token,)
        case {"type": "Sequence", "processors": list(parts)}:
            # Each one encloses what those before it made.
            return tuple(token for part in reversed(parts) for token in _put_first(part) or ())
    return () if post_processor else None  # ByteLevel only moves offsets


def _files_token_to_id(folder: pathlib.Path) -> TokenToId:
    """Looks tokens up in tokenizer_config.json, and only if need be in the large tokenizer.json."""

    def token_to_id(text: str) -> int | None:
        added = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder")
        for number, token in added.items() if isinstance(added, dict) else ():
            if isinstance(token, dict) and token.get("content") == text and number.isdecimal():
                return int(number)
        found = _in_tokenizer(read_json(folder / "tokenizer.json"), text)
        return found if isinstance(found, int) else None

    return token_to_id


def _in_tokenizer(tokenizer: Mapping[str, Any], text: str) -> Any:
    """What tokenizer.json gives as the number of a token."""
    match tokenizer:
        case {"added_tokens": [*tokens]}:
            for token in tokens:
                if isinstance(token, dict) and token.get("content") == text:
                    return token.get("id")
    match tokenizer:
        case {"model": {"vocab": {**numbers}}}:
            return numbers.get(text)
        case {"model": {"vocab": [*pieces]}}:  # Unigram: [piece, score]
            named = (i for i, p in enumerate(pieces) if isinstance(p, list) and p[:1] == [text])
            return next(named, None)
    return None
