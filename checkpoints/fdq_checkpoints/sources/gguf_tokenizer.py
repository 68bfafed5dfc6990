r"""The tokenizer in a GGUF's metadata as the files that Hugging Face has of one.

`gpt2` is BPE over bytes, with merges and the name of a rule that splits text first; `llama` is
SentencePiece's BPE, whose merges follow from the scores of its tokens. The files lie in a folder of
this process, which is removed when it ends.
"""

import atexit
import functools
import json
import logging
import pathlib
import re
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from fdq_checkpoints.errors import shown

_LOGGER = logging.getLogger("fdq")
_KEY = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_BYTES = re.compile(r"<0x[0-9A-F]{2}>")
_BLOCK = "\u2581"  # SentencePiece's space
# Merges follow from all ways to cut each token in two: so many characters, and of so long tokens.
_MOST_CHARACTERS, _LONGEST_MERGED = 2**22, 128

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START, _SLASHES = r"[^\r\n\p{L}\p{N}]?", r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_WORDS}|\p{{N}}|{_REST}"
_TEKKEN = (
    rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASHES}"
)  # fmt: skip
_GPT4O = (
    rf"{_START}{_UPPER}*{_LOWER}+{_ENDINGS}?|{_START}{_UPPER}+{_LOWER}*{_ENDINGS}?"
    rf"|\p{{N}}{{1,3}}|{_SLASHES}"
)
# By `tokenizer.ggml.pre`: how text is split, as the tokenizer.json of these models say.
_SPLITS: dict[str, str | None] = {
    "gpt-2": None,  # the rule of `ByteLevel` itself
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "smaug-bpe", "dbrx"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
}
# Tokens are looked up whole before merges are tried, and a BOS comes first unless they say not.
_WHOLE_FIRST = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken", "gpt-4o", "llama4")
_WITH_BOS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken")
# Of files from before there was a name for it.
_USUAL = {"llama": "llama-bpe", "qwen2": "qwen2", "qwen3": "qwen2", "qwen3moe": "qwen2"}
_COMPOSED = ("qwen2", "deepseek-r1-qwen", "megrez")


_TEMPLATE = "tokenizer.chat_template"


class Unusable(Exception):
    """Why a tokenizer is not made of another."""


@functools.cache
def _root() -> pathlib.Path:
    folder = pathlib.Path(tempfile.mkdtemp(prefix="fdq-gguf-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def companions(
    path: pathlib.Path, metadata: Mapping[str, Any], config: Mapping[str, Any]
) -> list[pathlib.Path]:
    """config.json, tokenizer_config.json and tokenizer.json of a model, written once a process.

    A tokenizer that fdq does not know is left out, with one line that says why.
    """
    status = path.stat()
    folder = _root() / f"{status.st_dev}-{status.st_ino}-{status.st_mtime_ns}-{status.st_size}"
    if not folder.is_dir():
        files = {"config.json": dict(config)}
        try:
            if f"{_KEY}model" in metadata:
                files |= _files(metadata)
        except (Unusable, TypeError, ValueError) as reason:  # values of other kinds than expected
            _LOGGER.warning(
                "%s: its tokenizer is not read, so text is not either (token ids are): %s.",
                path,
                reason,
            )
        new = pathlib.Path(tempfile.mkdtemp(dir=_root()))
        for name, content in files.items():
            (new / name).write_text(json.dumps(content, ensure_ascii=False), "utf-8")
        try:
            new.rename(folder)
        except OSError:  # another thread has just made it
            if not folder.is_dir():
                raise
            shutil.rmtree(new, ignore_errors=True)
    return sorted(folder.iterdir())


def _files(metadata: Mapping[str, Any]) -> dict[str, Any]:
    kind, tokens = metadata[f"{_KEY}model"], metadata.get(f"{_KEY}tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise Unusable("it has no list of tokens")
    if kind not in ("gpt2", "llama"):
        raise Unusable(f"model {shown(str(kind))}; gpt2 and llama are known")
    types = metadata.get(f"{_KEY}token_type")
    types = np.full(len(tokens), _NORMAL) if types is None else types
    if not isinstance(types, np.ndarray) or len(types) != len(tokens):
        raise Unusable("it has not one token_type for each token")
    vocabulary: dict[str, int] = {}
    for number, token in enumerate(tokens):
        vocabulary.setdefault(token, number)
    special = {
        "bos": _token(metadata, "bos", tokens),
        "eos": _token(metadata, "eos", tokens),
        "unk": _token(metadata, "unknown", tokens),
        "pad": _token(metadata, "padding", tokens),
    }
    if kind == "llama":
        made = _sentencepiece(metadata, vocabulary, types, special)
        add_bos = metadata.get(f"{_KEY}add_bos_token", True)
    else:
        made = _byte_level(metadata, vocabulary)
        add_bos = metadata.get(f"{_KEY}add_bos_token", metadata.get(f"{_KEY}pre") in _WITH_BOS)
    add_bos = bool(add_bos) and special["bos"] is not None
    added = [
        {
            "id": number,
            "content": tokens[number],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": bool(types[number] != _USER),
        }
        for number in map(int, np.flatnonzero(np.isin(types, (_UNKNOWN, _CONTROL, _USER))))
        if tokens[number] and vocabulary[tokens[number]] == number
    ]
    first = {"SpecialToken": {"id": special["bos"], "type_id": 0}}
    text, pair = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    template = {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, first, pair],
        "special_tokens": {
            special["bos"]: {
                "id": special["bos"],
                "ids": [vocabulary.get(special["bos"] or "")],
                "tokens": [special["bos"]],
            }
        },
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": template if add_bos else None,
        **made,
    }
    named = {f"{name}_token": token for name, token in special.items() if token is not None}
    said: dict[str, Any] = {"add_bos_token": add_bos, **named}
    said["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(template := metadata.get(_TEMPLATE), str):
        named = {
            name.removeprefix(f"{_TEMPLATE}."): text
            for name, text in metadata.items()
            if name.startswith(f"{_TEMPLATE}.") and isinstance(text, str)
        }
        every = [{"name": n, "template": t} for n, t in ({"default": template} | named).items()]
        said["chat_template"] = every if named else template
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": said}


def _token(metadata: Mapping[str, Any], name: str, tokens: list[str]) -> str | None:
    number = metadata.get(f"{_KEY}{name}_token_id")
    if number is None or number == 2**32 - 1:
        return None
    if type(number) is not int or not 0 <= number < len(tokens):
        raise Unusable(f"{name}_token_id = {number!r:.40} of {len(tokens)} tokens")
    return tokens[number]


def _bpe(vocabulary: Mapping[str, int], merges: list[tuple[str, str]], **options: Any) -> Any:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
        **options,
    }


def _byte_level(metadata: Mapping[str, Any], vocabulary: Mapping[str, int]) -> dict[str, Any]:
    pre = metadata.get(f"{_KEY}pre", "default")
    if pre == "default":
        pre = _USUAL.get(metadata.get("general.architecture", ""), pre)
    if pre not in _SPLITS:
        raise Unusable(f"pre-tokenizer {shown(str(pre))}; known are {', '.join(_SPLITS)}")
    merges = metadata.get(f"{_KEY}merges")
    if not isinstance(merges, list) or not all(isinstance(merge, str) for merge in merges):
        raise Unusable("it has no list of merges")
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocabulary.keys():
            raise Unusable(f"merge {shown(merge)} is not one of tokens")
        pairs.append((left, right))
    split = _SPLITS[pre]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    splits: list[dict[str, Any]] = [{**level, "use_regex": split is None}]
    if split is not None:
        rule = {"pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
        splits.insert(0, {"type": "Split", **rule})
    return {
        "normalizer": {"type": "NFC"} if pre in _COMPOSED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits},
        "decoder": {**level, "use_regex": True},
        "model": _bpe(vocabulary, pairs, ignore_merges=pre in _WHOLE_FIRST),
    }


def _sentencepiece(
    metadata: Mapping[str, Any],
    vocabulary: Mapping[str, int],
    types: np.ndarray,
    special: dict[str, str | None],
) -> dict[str, Any]:
    scores = metadata.get(f"{_KEY}scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(types):
        raise Unusable("it has not one score for each token")
    if metadata.get(f"{_KEY}remove_extra_whitespaces") is True:
        raise Unusable("it removes spaces (remove_extra_whitespaces)")
    if sum(map(len, vocabulary)) > _MOST_CHARACTERS:
        raise Unusable(f"its tokens have more than {_MOST_CHARACTERS} characters")
    normalizers: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": " "}, "content": _BLOCK}
    ]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _BLOCK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if metadata.get(f"{_KEY}add_space_prefix", True):
        normalizers.insert(0, {"type": "Prepend", "prepend": _BLOCK})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = np.flatnonzero(types == _UNKNOWN)
    if special["unk"] is None and len(unknown):
        special["unk"] = (
            list(vocabulary)[int(unknown[0])] if len(vocabulary) == len(types) else None
        )
    model = _bpe(
        vocabulary,
        _merges(vocabulary, scores, types),
        unk_token=special["unk"],
        fuse_unk=True,
        byte_fallback=bool((types == _BYTE).any()),
    )
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def _merges(
    vocabulary: Mapping[str, int], scores: np.ndarray, types: np.ndarray
) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token: that of the highest score is merged first."""
    found = []
    for token, number in vocabulary.items():
        if types[number] not in (_NORMAL, _USER) or len(token) > _LONGEST_MERGED:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                order = (-scores[number], vocabulary[left], vocabulary[right])
                found.append((order, (left, right)))
    return [pair for _, pair in sorted(found)]


def metadata_of(content: Mapping[str, Any], size: int, architecture: str) -> dict[str, Any]:
    """The inverse: of a tokenizer.json, for `size` rows of an embedding; Unusable says why not."""
    model = content.get("model")
    model = model if isinstance(model, dict) else {}
    vocabulary, merges = model.get("vocab"), model.get("merges")
    if (
        model.get("type") != "BPE"
        or not isinstance(vocabulary, dict)
        or not isinstance(merges, list)
    ):
        raise Unusable("it is not BPE")
    added = [one for one in content.get("added_tokens") or [] if isinstance(one, dict)]
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = np.full(size, _UNUSED, np.int32)
    numbered = [*((token, i, _NORMAL) for token, i in vocabulary.items())]
    numbered += [(x["content"], x["id"], _CONTROL if x.get("special") else _USER) for x in added]
    for token, number, kind in numbered:
        if type(number) is not int or not 0 <= number < size or not isinstance(token, str):
            raise Unusable(f"token {shown(str(token))} is number {number!r:.20} of {size} rows")
        tokens[number], types[number] = token, kind
    pairs = [one.split(" ", 1) if isinstance(one, str) else one for one in merges]
    found: dict[str, Any] = {f"{_KEY}tokens": tokens, f"{_KEY}token_type": types}
    if not model.get("byte_fallback"):
        pre = _rule_of(content, model, architecture)
        joined = [" ".join(pair) for pair in pairs]
        return {f"{_KEY}model": "gpt2", f"{_KEY}pre": pre, **found, f"{_KEY}merges": joined}
    rank = {token: float(-len(pairs)) for token in tokens}
    for number, (left, right) in reversed(list(enumerate(pairs))):
        rank[left + right] = float(-number)
    for number, token in enumerate(tokens):
        if _BYTES.fullmatch(token):
            types[number] = _BYTE
        if token == model.get("unk_token"):
            types[number] = _UNKNOWN
    text = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")], ensure_ascii=False)
    return {
        f"{_KEY}model": "llama",
        f"{_KEY}pre": "default",
        **found,
        f"{_KEY}scores": np.array([rank[token] for token in tokens], np.float32),
        f"{_KEY}add_space_prefix": "Prepend" in text or '"prepend_scheme": "first"' in text,
    }


def _rule_of(content: Mapping[str, Any], model: Mapping[str, Any], architecture: str) -> str:
    """The name of the rule by which a tokenizer.json splits text."""
    pre = content.get("pre_tokenizer")
    steps = pre.get("pretokenizers", [pre]) if isinstance(pre, dict) else []
    kinds = [step.get("type") for step in steps if isinstance(step, dict)]
    rule = None
    if kinds == ["Split", "ByteLevel"]:
        rule = (steps[0].get("pattern") or {}).get("Regex")
    if kinds in (["Split", "ByteLevel"], ["ByteLevel"]):
        names = [name for name, known in _SPLITS.items() if known == rule]
        whole = bool(model.get("ignore_merges"))
        composed = bool(content.get("normalizer"))
        names = [x for x in names if (x in _WHOLE_FIRST) >= whole and (x in _COMPOSED) >= composed]
        usual = _USUAL.get(architecture)
        if names:
            return usual if usual in names else names[0]
    raise Unusable("it splits text by a rule that GGUF has no name for")
