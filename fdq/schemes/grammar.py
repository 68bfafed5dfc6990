"""The grammar of scheme names: text to plain fields and back; `scheme.py` holds the classes.

`parse` reads a name into three dicts of fields (weight, activation, cache; `None` is 16 bits); the
`*_suffixes` functions write a spec's fields that differ from its format's defaults. What a type is
called and what it means unless a suffix says otherwise, its format knows (`schemes.kinds`).
"""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fdq.schemes.kinds import CACHE_FORMATS, WEIGHT_FORMATS

Fields = dict[str, Any]

# Activations in a weight's format are called like it.
ACTIVATION_FORMATS = ("int8", "float8_e4m3")

SCALE_SUFFIXES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "ue8m0": "float8_e8m0fnu"}
ZERO_SUFFIXES = {"sym": "none", "half": "half", "asym": "integer", "affine": "offset"}
CACHE_SUFFIXES = {
    "kvtoken": "token_head",
    "kvchannel": "channel",
    "kvhead": "head",
    "kvblock": "block",
}
DYNAMIC_CACHES = ("token_head", "block")
TRANSFORM_SUFFIXES = {"kvrotated": "rotated", "kvcentered": "centered"}

# Names of FastDeploy's methods and of its documentation that say more than a weight's format (whose
# names are its `aliases`), beside those that the grammar reads anyway (wint8, w4a8, wfp8afp8 ...).
ALIASES = {
    "block_wise_fp8": "Wfp8Afp8C16-b128",
    "tensor_wise_fp8": "Wfp8Afp8C16-tensor-static",
    "mix_quant": "W4A8C8",
    "bf16": "W16A16C16",
}
COMPATS = ("fastdeploy", "fastdeploy-cpu")

_PARTS = {"w": "weights", "a": "activations", "c": "caches"}
_SIXTEEN = ("16", "bf16", "fp16")
_NUMBERED = re.compile(r"([a-z]*)\d+(?:e\dm\d)?")
# Words that may follow a dash: (part, what they decide, fields).
_WORDS: dict[str, tuple[str, str, Fields]] = {
    "channel": ("w", "what shares a scale", {"granularity": "channel"}),
    "tensor": ("w", "what shares a scale", {"granularity": "tensor"}),
    **{k: ("w", "the zero point", {"zero_point": v}) for k, v in ZERO_SUFFIXES.items()},
    **{k: ("w", "the scale's dtype", {"scale_dtype": v}) for k, v in SCALE_SUFFIXES.items()},
    "dq": ("w", "double quantization", {"double_quantization": True}),
    "rows": ("w", "the order of rows", {"row_order": True}),
    "token": ("a", "what shares a scale", {"granularity": "token"}),
    "static": ("a", "what shares a scale", {"granularity": "tensor", "dynamic": False}),
    **{
        k: ("c", "what shares a scale", {"granularity": v, "dynamic": v in DYNAMIC_CACHES})
        for k, v in CACHE_SUFFIXES.items()
    },
    **{k: ("c", "the transform", {"transform": v}) for k, v in TRANSFORM_SUFFIXES.items()},
}
_SIZED = re.compile(r"(?P<kind>[gbx])(?P<rows>\d+)(?:x(?P<columns>\d+))?")


class Unreadable(ValueError):
    """A part of a name that the grammar does not know; the message says which."""


def formats(part: str) -> Mapping[str, Any]:
    """The formats of the part `w`, `a` or `c`, by name; types are their names in the grammar."""
    if part == "a":
        return {name: WEIGHT_FORMATS[name] for name in ACTIVATION_FORMATS}
    return WEIGHT_FORMATS if part == "w" else CACHE_FORMATS


def spellings(part: str) -> dict[str, str]:
    """The names of the part's formats by everything that they are called, in lower case."""
    return {
        spelling.lower(): name
        for name, format in formats(part).items()
        for spelling in (format.grammar_name, *format.synonyms)
    }


def aliases() -> dict[str, str]:
    """Names that stand for a whole scheme by themselves, in lower case."""
    known = dict(ALIASES)
    for format in WEIGHT_FORMATS.values():
        known |= dict.fromkeys(format.aliases, f"W{format.grammar_name}A16C16")
    return known


def words() -> dict[str, tuple[str, str, Fields]]:
    """Suffixes that are words: of which part (`w`, `a`, `c`), what they decide, and how."""
    return dict(_WORDS)


def _type() -> str:
    """Regular expression of a type: one that exists, or that looks like one (`nf5`)."""
    known = {spelling for part in _PARTS for spelling in spellings(part)} | set(_SIXTEEN)
    numbered = {found[1] for found in map(_NUMBERED.fullmatch, known) if found}
    others = sorted((w for w in known if not _NUMBERED.fullmatch(w)), key=len, reverse=True)
    prefixes = "|".join(map(re.escape, sorted(numbered)))
    return "(?:" + "|".join([*map(re.escape, others), rf"(?:{prefixes})\d+(?:e\dm\d)?"]) + ")"


def weight_suffixes(spec) -> list[str]:
    """Suffixes of a WeightSpec, coarse to fine."""
    format = WEIGHT_FORMATS[spec.format]
    default, fields, suffixes = format.spec_fields({}), {}, []
    if (spec.granularity, spec.group_size) != (default["granularity"], default["group_size"]):
        fields = {"granularity": spec.granularity, "group_size": spec.group_size}
        rows, columns = spec.block_size or (0, 0)
        block = f"b{rows}" if rows == columns else f"b{rows}x{columns}"
        sized = {"group": f"g{spec.group_size}", "block": block}
        suffixes.append(sized.get(spec.granularity, spec.granularity))
    if spec.zero_point != default["zero_point"]:
        suffixes += [name for name, zero in ZERO_SUFFIXES.items() if zero == spec.zero_point]
    if spec.scale_dtype != format.spec_fields(fields)["scale_dtype"]:
        suffixes += [name for name, dtype in SCALE_SUFFIXES.items() if dtype == spec.scale_dtype]
    return suffixes + ["dq"] * spec.double_quantization + ["rows"] * spec.row_order


def activation_fields(format: str, block_size: tuple[int, int] | None) -> Fields:
    """Default fields of an activation: per token, or as fine along K as the weight's blocks."""
    if block_size is None:
        return {"format": format, "granularity": "token"}
    return {"format": format, "granularity": "token_group", "group_size": block_size[0]}


def activation_suffixes(spec, block_size: tuple[int, int] | None = None) -> list[str]:
    """Suffixes of an ActivationSpec beside a weight with such blocks."""
    default = activation_fields(spec.format, block_size)
    if (spec.granularity, spec.group_size) == (default["granularity"], default.get("group_size")):
        return []
    names = {"token": "token", "token_group": f"x{spec.group_size}", "tensor": "static"}
    return [names[spec.granularity]]


def cache_suffixes(spec) -> list[str]:
    """Suffixes of a CacheSpec."""
    names = {granularity: name for name, granularity in CACHE_SUFFIXES.items()}
    suffixes = [] if spec.granularity == "token_head" else [names[spec.granularity]]
    return suffixes + [k for k, v in TRANSFORM_SUFFIXES.items() if v == spec.transform]


def parse(name: str, compat: str | None = None) -> dict[str, Fields | None]:
    """Fields of the parts `w`, `a` and `c`; `None` where a part is left in 16 bits."""
    if compat is not None and compat not in COMPATS:
        raise ValueError(f"compat={compat!r}: use None or one of {', '.join(COMPATS)}.")
    head, *suffixes = name.strip().lower().split("-")
    alias, *implied = aliases().get(head, head).lower().split("-")
    types = dict(_types(alias))
    # A name's own suffixes replace those that an alias implies.
    slots = _slots(implied, types) | _slots(suffixes, types)
    given: dict[str, Fields] = {part: {} for part in _PARTS}
    for (part, _), (_, fields) in slots.items():
        given[part] |= fields
    weight, activation, cache = given.values()
    w, a, c = (types.get(part) for part in _PARTS)
    channelwise = compat is not None and w in ("int8", "int4") and a != "float8_e4m3"
    if channelwise and "granularity" not in weight:
        weight["granularity"] = "channel"
    result: dict[str, Fields | None] = dict.fromkeys(_PARTS)
    if w is not None:
        result["w"] = WEIGHT_FORMATS[w].spec_fields(weight)
    if a is not None:
        block = (result["w"] or {}).get("block_size")
        default = {"format": a} if "granularity" in activation else activation_fields(a, block)
        result["a"] = default | activation
    if c is not None:
        result["c"] = {"format": c, "zero_point": CACHE_FORMATS[c].has_zero, **cache}
    return result


def _slots(words: list[str], types) -> dict[tuple[str, str], tuple[str, Fields]]:
    """Words by (part, what they decide); each decision at most once."""
    slots = {}
    for word in words:
        part, slot, fields = _suffix(word)
        if types.get(part) is None:
            raise Unreadable(
                f"'-{word}' is about {_PARTS[part]}, which this name leaves in 16 bits."
            )
        if (part, slot) in slots:
            raise Unreadable(f"'-{slots[part, slot][0]}' and '-{word}' both decide {slot}.")
        slots[part, slot] = (word, fields)
    return slots


def _types(head: str) -> Iterator[tuple[str, str | None]]:
    """Pairs (part, format or None for 16 bits) of a head such as `w4a16c8`."""
    rest, type_ = head, _type()
    for part in _PARTS:
        found = re.match(part + type_, rest)
        if not found:
            continue
        rest = rest[found.end() :]
        yield part, _format(part, found.group()[1:])
    if rest == head:
        raise Unreadable(f"Could not read {head!r}." if head else "The name is empty.")
    if rest:
        raise Unreadable(f"Could not read {rest!r}.")


def _format(part: str, type_name: str) -> str | None:
    if type_name in _SIXTEEN:
        return None
    known = spellings(part)
    if type_name not in known:
        types = ", ".join(_type_names(part))
        raise Unreadable(
            f"Could not read {part.upper() + type_name!r}: {_PARTS[part]} take {types}."
        )
    return known[type_name]


def _type_names(part: str) -> list[str]:
    return ["16", *(format.grammar_name for format in formats(part).values())]


def _suffix(word: str) -> tuple[str, str, Fields]:
    if word in _WORDS:
        return _WORDS[word]
    found = _SIZED.fullmatch(word)
    if not found or (found["columns"] and found["kind"] != "b") or not int(found["rows"]):
        raise Unreadable(f"Could not read '-{word}'.")
    rows = int(found["rows"])
    fields: Fields = {"granularity": "group", "group_size": rows}
    if found["kind"] == "b":
        columns = int(found["columns"] or rows)
        fields = {"granularity": "block", "block_size": (rows, columns)}
    elif found["kind"] == "x":
        fields["granularity"] = "token_group"
    return ("a" if found["kind"] == "x" else "w"), "what shares a scale", fields


def suggest(name: str, canonical: Callable[[str], str | None]) -> str | None:
    """The valid name nearest to an unreadable one, of which `canonical` says None; or None."""
    text = re.sub(r"[\s_,;:/.+@-]+", "-", name.strip().lower()).strip("-")
    if not text:
        return None
    # 0. What others call a type of weights: `int4` is FastDeploy's `wint4`.
    if re.fullmatch(r"int\d+", text) and canonical("w" + text):
        return "w" + text
    # 1. The right words in the wrong places: dashes missing or superfluous, parts out of order, the
    #    "w" left out; and types that do not exist.
    words, typed = sorted(_WORDS, key=len, reverse=True), f"[wac]{_type()}"
    token = re.compile(rf"{typed}|[gx]\d+|b\d+(?:x\d+)?|{'|'.join(words)}")
    for candidate in (text, text.replace("-", ""), "w" + text):
        tokens = token.findall(candidate)
        if "".join(tokens) != candidate.replace("-", ""):
            continue
        parts = sorted(filter(re.compile(typed).fullmatch, tokens), key=lambda t: "wac".index(t[0]))
        suffixes = [t for t in tokens if t not in parts]
        head = "".join(map(_nearest_type, parts))
        # Quantized activations need quantized weights.
        head = canonical(head) or canonical("w8" + head.removeprefix("w16"))
        found = _join(head, suffixes, canonical)
        if found:
            return found
    # 2. Misspelt words.
    head, *rest = text.split("-")
    spelled = (f"w{synonym}" for f in WEIGHT_FORMATS.values() for synonym in f.synonyms[:1])
    alone = {known.replace("_", "-"): known for known in (*aliases(), *spelled)}
    heads = {known.lower(): known for known in _heads()} | alone
    for whole, suffixes, known in ((text, [], alone), (head, rest, heads)):
        nearest = canonical(whole) or next(iter(_close(whole, known)), None)
        fixed = [word for suffix in suffixes for word in _close_suffix(suffix)]
        found = _join(nearest, fixed, canonical)
        if found:
            return found
    return None


def _heads() -> Iterator[str]:
    for w in _type_names("w"):
        yield f"W{w}"
        for a in _type_names("a")[: 1 if w == "16" else None]:
            yield f"W{w}A{a}"
            yield from (f"W{w}A{a}C{c}" for c in _type_names("c"))


def _close(word: str, known: dict[str, str]) -> list[str]:
    return [known[match] for match in difflib.get_close_matches(word, known, n=1, cutoff=0.7)]


def _close_suffix(word: str) -> list[str]:
    """The suffix meant by a misspelt one, such as `group64` for `g64`; at most one."""
    sized = re.fullmatch(r"([gbx])[a-z_]*(\d+(?:x\d+)?)", word)
    return ["".join(sized.groups())] if sized else _close(word, {known: known for known in _WORDS})


def _nearest_type(token: str) -> str:
    """A part with the nearest type that exists: `w5` -> `w4`; one that exists as it is."""
    part, type_name = token[0], token[1:]
    try:
        _format(part, type_name)
        return token
    except Unreadable:
        known = [known.lower() for known in _type_names(part)]
    bits = re.fullmatch(r"(?:u?int)?(\d+)", type_name)
    if bits:
        widths = (int(known) for known in known if known.isdigit())
        # Of two that are as near, the wider: the model stays as good as it was meant to be.
        return part + str(min(widths, key=lambda width: (abs(width - int(bits[1])), -width)))
    return part + next(iter(_close(type_name, {known: known for known in known})), type_name)


def _join(head: str | None, suffixes: list[str], canonical) -> str | None:
    """The head with those suffixes, without them if they do not fit it, None without a head."""
    if head is None or canonical(head) is None:
        return None
    whole = "-".join([head, *suffixes])
    return whole if canonical(whole) else head
