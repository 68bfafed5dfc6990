"""The grammar of scheme names: text to plain fields and back; ``scheme.py`` holds the classes.

``parse`` reads a name into three dicts of fields (weight, activation, cache; ``None`` is 16 bits);
the ``*_suffixes`` functions write a spec's fields that differ from its format's defaults.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from typing import Any

Fields = dict[str, Any]

INTEGERS = ("int8", "int4", "int3", "int2")
FLOATS = ("float8_e4m3", "float8_e5m2")
# Formats whose group and scale are part of their definition: (group size, scale dtype).
FIXED = {
    "mxfp4": (32, "float8_e8m0fnu"),
    "mxfp8": (32, "float8_e8m0fnu"),
    "nvfp4": (16, "float8_e4m3fn"),
    "cc2": (64, "uint4"),
}
DEFAULT_GROUP = {"int4": 128, "int3": 128, "int2": 128, "nf4": 64}

# Canonical type names of the three parts.
WEIGHT_NAMES = {
    "int8": "8",
    "int4": "4",
    "int3": "3",
    "int2": "2",
    "float8_e4m3": "fp8",
    "float8_e5m2": "fp8e5m2",
    "nf4": "NF4",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "cc2": "CC2",
}
ACTIVATION_NAMES = {"int8": "8", "float8_e4m3": "fp8"}
CACHE_NAMES = {"int8": "8", "int4": "4", "float8_e4m3": "fp8"}

SCALE_SUFFIXES = {
    "f32": "float32",
    "bf16": "bfloat16",
    "f16": "float16",
    "ue8m0": "float8_e8m0fnu",
}
ZERO_SUFFIXES = {"sym": "none", "half": "half", "asym": "integer"}
CACHE_SUFFIXES = {"kvtoken": "token_head", "kvchannel": "channel", "kvhead": "head"}

# Names of FastDeploy's methods and of its documentation, beside those that the grammar reads
# anyway (wint8, WInt4, w4a8, wfp8afp8, w4afp8 ...). ``wint2`` is its convolutional code.
ALIASES = {
    "wint2": "WCC2A16C16",
    "weight_only_int8": "W8A16C16",
    "weight_only_int4": "W4A16C16",
    "block_wise_fp8": "Wfp8Afp8C16-b128",
    "tensor_wise_fp8": "Wfp8Afp8C16-tensor-static",
    "mix_quant": "W4A8C8",
    "nf4": "WNF4A16C16",
    "mxfp4": "WMXFP4A16C16",
    "mxfp8": "WMXFP8A16C16",
    "nvfp4": "WNVFP4A16C16",
    "modelopt_fp4": "WNVFP4A16C16",
    "bf16": "W16A16C16",
}
COMPATS = ("fastdeploy", "fastdeploy-cpu")

_PARTS = {
    "w": ("weights", WEIGHT_NAMES),
    "a": ("activations", ACTIVATION_NAMES),
    "c": ("caches", CACHE_NAMES),
}
_TYPE = r"(?:u?int|bf|fp|nf|mxfp|nvfp|cc)?\d+(?:e\dm\d)?"
_SYNONYMS = {"e4m3": "", "uint": "int"}
# Words that may follow a dash: (part, what they decide, fields).
_WORDS: dict[str, tuple[str, str, Fields]] = {
    "channel": ("w", "what shares a scale", {"granularity": "channel"}),
    "tensor": ("w", "what shares a scale", {"granularity": "tensor"}),
    **{k: ("w", "the zero point", {"zero_point": v}) for k, v in ZERO_SUFFIXES.items()},
    **{k: ("w", "the scale's dtype", {"scale_dtype": v}) for k, v in SCALE_SUFFIXES.items()},
    "dq": ("w", "double quantization", {"double_quantization": True}),
    "token": ("a", "what shares a scale", {"granularity": "token"}),
    "static": ("a", "what shares a scale", {"granularity": "tensor", "dynamic": False}),
    **{
        k: ("c", "what shares a scale", {"granularity": v, "dynamic": v == "token_head"})
        for k, v in CACHE_SUFFIXES.items()
    },
}
_SIZED = re.compile(r"(?P<kind>[gbx])(?P<rows>\d+)(?:x(?P<columns>\d+))?")


class Unreadable(ValueError):
    """A part of a name that the grammar does not know; the message says which."""


# --- From fields to names ------------------------------------------------------------------------


def weight_fields(format: str, fields: Fields) -> Fields:
    """All fields of a weight: the format's defaults, with some replaced.

    The default scale is bfloat16 for groups of at most 128 rows (published bits per weight count
    16 bits a group) and float32 for coarser scales.
    """
    group = FIXED[format][0] if format in FIXED else DEFAULT_GROUP.get(format)
    merged: Fields = {"granularity": "group" if group else "channel", "group_size": group}
    if "granularity" in fields:
        merged["group_size"] = None
    merged["zero_point"] = "half" if format == "int2" else "none"
    merged |= fields
    if "scale_dtype" not in fields:
        small = merged["granularity"] == "group" and (merged["group_size"] or 0) <= 128
        coarse = "bfloat16" if small else "float32"
        merged["scale_dtype"] = FIXED[format][1] if format in FIXED else coarse
    return {"format": format, **merged}


def weight_suffixes(spec) -> list[str]:
    """Suffixes of a WeightSpec, coarse to fine."""
    default, fields, suffixes = weight_fields(spec.format, {}), {}, []
    if (spec.granularity, spec.group_size) != (default["granularity"], default["group_size"]):
        fields = {"granularity": spec.granularity, "group_size": spec.group_size}
        rows, columns = spec.block_size or (0, 0)
        block = f"b{rows}" if rows == columns else f"b{rows}x{columns}"
        sized = {"group": f"g{spec.group_size}", "block": block}
        suffixes.append(sized.get(spec.granularity, spec.granularity))
    if spec.zero_point != default["zero_point"]:
        suffixes += [name for name, zero in ZERO_SUFFIXES.items() if zero == spec.zero_point]
    if spec.scale_dtype != weight_fields(spec.format, fields)["scale_dtype"]:
        suffixes += [name for name, dtype in SCALE_SUFFIXES.items() if dtype == spec.scale_dtype]
    return suffixes + ["dq"] * spec.double_quantization


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
    return [] if spec.granularity == "token_head" else [names[spec.granularity]]


# --- From names to fields ------------------------------------------------------------------------


def parse(name: str, compat: str | None = None) -> dict[str, Fields | None]:
    """Fields of the parts ``w``, ``a`` and ``c``; ``None`` where a part is left in 16 bits.

    Raises:
      Unreadable: a part of the name is not in the grammar, or two suffixes contradict each other.
    """
    if compat is not None and compat not in COMPATS:
        raise ValueError(f"compat={compat!r}: use None or one of {', '.join(COMPATS)}.")
    head, *suffixes = name.strip().lower().split("-")
    alias, *implied = ALIASES.get(head, head).lower().split("-")
    types = dict(_types(alias))
    # A name's own suffixes replace those that an alias implies.
    slots = _slots(implied, types) | _slots(suffixes, types)
    weight, activation, cache = (
        {
            k: v
            for (owner, _), (_, fields) in slots.items()
            if owner == part
            for k, v in fields.items()
        }
        for part in _PARTS
    )
    w, a, c = (types.get(part) for part in _PARTS)
    channelwise = compat is not None and w in ("int8", "int4") and a != "float8_e4m3"
    if channelwise and "granularity" not in weight:
        weight["granularity"] = "channel"
    result: dict[str, Fields | None] = dict.fromkeys(_PARTS)
    if w is not None:
        result["w"] = weight_fields(w, weight)
    if a is not None:
        block = (result["w"] or {}).get("block_size")
        default = {"format": a} if "granularity" in activation else activation_fields(a, block)
        result["a"] = default | activation
    if c is not None:
        result["c"] = {"format": c, "zero_point": c == "int4", **cache}
    return result


def _slots(words: list[str], types) -> dict[tuple[str, str], tuple[str, Fields]]:
    """Words by (part, what they decide); each decision at most once."""
    slots = {}
    for word in words:
        part, slot, fields = _suffix(word)
        if types.get(part) is None:
            kind = _PARTS[part][0]
            raise Unreadable(f"'-{word}' is about {kind}, which this name leaves in 16 bits.")
        if (part, slot) in slots:
            raise Unreadable(f"'-{slots[part, slot][0]}' and '-{word}' both decide {slot}.")
        slots[part, slot] = (word, fields)
    return slots


def _types(head: str) -> Iterator[tuple[str, str | None]]:
    """Pairs (part, format or None for 16 bits) of a head such as ``w4a16c8``."""
    rest = head
    for part, (_, names) in _PARTS.items():
        found = re.match(part + _TYPE, rest)
        if not found:
            continue
        rest = rest[found.end() :]
        yield part, _format(part, found.group()[1:], names)
    if rest == head:
        raise Unreadable(f"Could not read {head!r}." if head else "The name is empty.")
    if rest:
        raise Unreadable(f"Could not read {rest!r}.")


def _format(part: str, type_name: str, names: dict[str, str]) -> str | None:
    for old, new in _SYNONYMS.items():
        type_name = type_name.replace(old, new)
    if type_name in ("16", "bf16", "fp16"):
        return None
    by_name = {canonical.lower(): format for format, canonical in names.items()}
    by_name |= {format: format for format in names if format in INTEGERS}
    if type_name not in by_name:
        kinds = ", ".join(["16", *names.values()])
        raise Unreadable(
            f"Could not read {part.upper() + type_name!r}: {_PARTS[part][0]} take {kinds}."
        )
    return by_name[type_name]


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


# --- The nearest valid name ----------------------------------------------------------------------


def suggest(name: str, canonical: Callable[[str], str | None]) -> str | None:
    """The valid name nearest to an unreadable one, or None.

    Args:
      name: what was given.
      canonical: the canonical form of a readable name, None for an unreadable one.
    """
    text = re.sub(r"[\s_,;:/.+@-]+", "-", name.strip().lower()).strip("-")
    if not text:
        return None
    # 1. The right words in the wrong places: dashes missing or superfluous, parts out of order, the
    #    "w" left out; and types that do not exist.
    words = sorted(_WORDS, key=len, reverse=True)
    token = re.compile(rf"[wac]{_TYPE}|[gx]\d+|b\d+(?:x\d+)?|{'|'.join(words)}")
    for candidate in (text, text.replace("-", ""), "w" + text):
        tokens = token.findall(candidate)
        if "".join(tokens) != candidate.replace("-", ""):
            continue
        parts = sorted((t for t in tokens if re.fullmatch(f"[wac]{_TYPE}", t)), key=_part_order)
        suffixes = [t for t in tokens if t not in parts]
        head = "".join(map(_nearest_type, parts))
        # Quantized activations need quantized weights.
        head = canonical(head) or canonical("w8" + head.removeprefix("w16"))
        found = _join(head, suffixes, canonical)
        if found:
            return found
    # 2. Misspelt words.
    head, *rest = text.split("-")
    aliases = {known.replace("_", "-"): known for known in (*ALIASES, "wint8", "wint4", "wint3")}
    heads = {known.lower(): known for known in _heads()} | aliases
    for whole, suffixes, known in ((text, [], aliases), (head, rest, heads)):
        nearest = canonical(whole) or next(iter(_close(whole, known)), None)
        fixed = [word for suffix in suffixes for word in _close_suffix(suffix)]
        found = _join(nearest, fixed, canonical)
        if found:
            return found
    return None


def _heads() -> Iterator[str]:
    for w in ("16", *WEIGHT_NAMES.values()):
        yield f"W{w}"
        for a in ("16", *ACTIVATION_NAMES.values())[: 1 if w == "16" else None]:
            yield f"W{w}A{a}"
            yield from (f"W{w}A{a}C{c}" for c in ("16", *CACHE_NAMES.values()))


def _close(word: str, known: dict[str, str]) -> list[str]:
    return [known[match] for match in difflib.get_close_matches(word, known, n=1, cutoff=0.7)]


def _close_suffix(word: str) -> list[str]:
    """The suffix meant by a misspelt one, such as ``group64`` for ``g64``; at most one."""
    sized = re.fullmatch(r"([gbx])[a-z_]*(\d+(?:x\d+)?)", word)
    return ["".join(sized.groups())] if sized else _close(word, {known: known for known in _WORDS})


def _nearest_type(token: str) -> str:
    """A part with the nearest type that exists: ``w5`` -> ``w4``; one that exists as it is."""
    part, type_name = token[0], token[1:]
    names = _PARTS[part][1]
    try:
        _format(part, type_name, names)
        return token
    except Unreadable:
        known = ["16", *(known.lower() for known in names.values())]
    bits = re.fullmatch(r"(?:u?int)?(\d+)", type_name)
    if bits:
        widths = (int(known) for known in known if known.isdigit())
        # Of two that are as near, the wider: the model stays as good as it was meant to be.
        return part + str(min(widths, key=lambda width: (abs(width - int(bits[1])), -width)))
    return part + next(iter(_close(type_name, {known: known for known in known})), type_name)


def _part_order(token: str) -> int:
    return "wac".index(token[0])


def _join(head: str | None, suffixes: list[str], canonical) -> str | None:
    """The head with those suffixes, without them if they do not fit it, None without a head."""
    if head is None or canonical(head) is None:
        return None
    whole = "-".join([head, *suffixes])
    return whole if canonical(whole) else head
