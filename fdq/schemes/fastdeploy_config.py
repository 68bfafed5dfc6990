"""FastDeploy's `quantization_config` <-> rules: MixQuant, WINT2 and the single methods.

FastDeploy (v2) gives one method to linear layers (`dense_quant_type`), one to routed experts
(`moe_quant_type`) and one to the KV cache (`kv_cache_quant_type`). Sources: its
`quantization/mix_quant.py`, `wint2.py`, `kv_cache.py`, `__init__.py` and docs/quantization.

Activations of `w4a8` and `w4afp8` experts are static, with scales from the checkpoint, where
the config says that the checkpoint is quantized (`is_quantized` or `is_moe_quantized`) and not
`moe_dynamic_quant`; else dynamic, since nothing could have calibrated them. Those of `w8a8`,
`tensor_wise_fp8` and dense `w4afp8` are always static.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from fdq.schemes.scheme import CacheSpec, Scheme

Parts = dict[str, Any]
"""Arguments of `Recipe`: `rules` as triples (pattern, scheme, required), `default`,
`cache`, `record`."""

EXPERTS = "*.experts"

WINT2_MIX: Mapping[str, Any] = {
    "quantization": "wint2",
    "dense_quant_type": "wint8",
    "moe_quant_type": "w4w2",
    "moe_quant_config": {
        "moe_w4_quant_config": {
            "quant_type": "wint4",
            "quant_granularity": "per_channel",
            "quant_start_layer": 0,
            "quant_end_layer": 6,
        },
        "moe_w2_quant_config": {
            "quant_type": "wint2",
            "quant_granularity": "pp_acc",
            "quant_group_size": 64,
            "quant_start_layer": 7,
            "quant_end_layer": 53,
        },
    },
}
"""What FastDeploy publishes ERNIE-4.5-300B-A47B in (its docs/quantization/wint2.md)."""

# Method -> scheme. FastDeploy's integer scales are per channel.
_DENSE = {
    "wint8": "W8A16",
    "wint4": "W4A16-channel",
    "block_wise_fp8": "block_wise_fp8",
    "tensor_wise_fp8": "tensor_wise_fp8",
    "wfp8afp8": "Wfp8Afp8",
    "w8a8": "W8A8-static",
    "w4afp8": "W4Afp8-channel-static",
}
_EXPERTS = {
    "wint8": "W8A16",
    "wint4": "W4A16-channel",
    "wint2": "wint2",
    "block_wise_fp8": "block_wise_fp8",
    "tensor_wise_fp8": "tensor_wise_fp8",
    "wfp8afp8": "Wfp8Afp8",
    "mxfp4": "mxfp4",
    "w4a8": "W4A8-channel",
    "w4afp8": "W4Afp8",
}
_STATIC_IF_OFFLINE = ("w4a8", "w4afp8")
_CACHES = {
    "int8": "C8-kvchannel",
    "float8_e4m3fn": "Cfp8-kvhead",
    "int4_zp": "C4-kvhead",
    "block_wise_fp8": "Cfp8",
}
_REFUSED = {
    "int8_zp": "FastDeploy itself raises NotImplementedError for it",
    "float8_e4m3fn_zp": "FastDeploy itself raises NotImplementedError for it",
    "wfp4afp8": "its activations are 4-bit floats; 'mxfp4' stores the same weights",
}

# What a name means for experts and for the rest; of the last three that is ERNIE's rule.
_MIXTURES = {
    "mix_quant": ("w4a8", "W8A16C8"),
    "wint4": ("wint4", "wint8"),  # FastDeploy PR #2664
    "w4afp8": ("w4afp8", "block_wise_fp8"),  # PR #5282
    "wint2": ("wint2", "wint8"),
}

_SWITCHES = (
    "is_quantized", "is_moe_quantized", "is_permuted", "is_channel_wise", "has_zero_point",
    "moe_dynamic_quant",
)  # fmt: skip
_FLAGS = {**dict.fromkeys(_SWITCHES, bool), "hadamard_block_size": int}
_TYPES = ("dense_quant_type", "moe_quant_type", "kv_cache_quant_type")
_KEYS = (*_FLAGS, *_TYPES, "quantization", "moe_quant_config", "image_moe_quant_type")
_HUGGING_FACE = "quant_method"
_W4, _W2 = "moe_w4_quant_config", "moe_w2_quant_config"
# What is fixed in each part of a WINT2 mixture: type, granularity and group size.
_WINT2 = {_W4: ("wint4", "per_channel", None), _W2: ("wint2", "pp_acc", 64)}
_FIXED = ("quant_type", "quant_granularity", "quant_group_size")
_LAYERS = re.compile(r"layers\.\{(\d+)\.\.(\d+)\}\.mlp\.experts")
# Where WINT2 changes from int4 to the convolutional code unless its config says otherwise.
_LAST_W4_LAYER = 6


def looks_like(config: Mapping[str, Any]) -> bool:
    """Whether a dict is a `quantization_config` (or holds one) rather than path rules.

    One of Hugging Face's is among them, so that `read` can say why it is not read.
    """
    return bool({"quantization", "quantization_config", _HUGGING_FACE, *_TYPES} & set(config))


def named(name: str, compat: str | None, has_experts: bool) -> Parts | None:
    """The mixture that FastDeploy's command line means by a name; None for a plain scheme."""
    method = name.strip().lower()
    by_rule = compat is not None and has_experts
    if method not in _MIXTURES or not (method == "mix_quant" or by_rule):
        return None
    experts, rest = _MIXTURES[method]
    rules = [(EXPERTS, Scheme.parse(experts, compat=compat), False)]
    if method == "wint2":
        low = f"layers.{{0..{_LAST_W4_LAYER}}}.mlp.experts"
        rules.insert(0, (low, Scheme.parse("wint4", compat=compat), False))
    return {"rules": rules, "default": Scheme.parse(rest, compat=compat)}


def read(config: Mapping[str, Any], *, num_layers: int | None = None) -> Parts:
    """The arguments of the `Recipe` that a config describes; errors as of `from_fastdeploy`."""
    if not isinstance(config, Mapping):
        raise ValueError(
            f"quantization_config: expected a JSON object (a dict), found {config!r}; read a file "
            "with json.load."
        )
    if "quantization_config" in config:
        config = config["quantization_config"]
        if not isinstance(config, Mapping):
            raise ValueError(f"quantization_config: expected a JSON object, found {config!r}.")
    if _HUGGING_FACE in config:
        raise ValueError(
            f"quantization_config: {_HUGGING_FACE}={config[_HUGGING_FACE]!r} is the way of Hugging "
            "Face to describe a checkpoint that is quantized already; it is no recipe. Recipes are "
            "a scheme's name ('W8A16', 'Wfp8Afp8' ...), path rules, or the quantization_config of "
            f"FastDeploy, with the key 'quantization': mix_quant, wint2, {', '.join(_DENSE)}."
        )
    _check_flags(config)
    method = config.get("quantization")
    record = {k: v for k, v in config.items() if k not in (*_TYPES, "moe_quant_config")}
    # Types that are there and empty are written back as they were.
    record |= {key: None for key in _TYPES if key in config and config[key] is None}
    cache = _cache(config)
    if method == "wint2":
        rules, default = _read_wint2(config, num_layers)
    elif method == "mix_quant":
        if not any(config.get(key) for key in _TYPES):
            raise ValueError(f"mix_quant: expected one of {', '.join(_TYPES)}, found none.")
        _refuse_keys(config, ("moe_quant_config",), method)
        default = _scheme(config.get("dense_quant_type"), "dense_quant_type", _DENSE, config)
        experts = _scheme(config.get("moe_quant_type"), "moe_quant_type", _EXPERTS, config)
        rules = [(EXPERTS, experts, False)]
    else:
        if method is None:
            raise ValueError(
                "quantization_config: the key 'quantization' is missing; expected 'mix_quant', "
                f"'wint2' or one of {', '.join(_DENSE)}."
            )
        if difflib.get_close_matches(str(method), [*_DENSE, "mix_quant"], n=1) == ["mix_quant"]:
            raise ValueError(
                f"quantization_config: unknown quantization {method!r}. Did you mean 'mix_quant'?"
            )
        _refuse_keys(config, ("moe_quant_config", "dense_quant_type", "moe_quant_type"), method)
        rules, default = [], _scheme(method, "quantization", _DENSE, config)
        if method == "w4afp8":  # groups of 128 in experts, per channel elsewhere
            rules = [(EXPERTS, _scheme(method, "quantization", _EXPERTS, config), False)]
    return {"rules": rules, "default": default, "cache": cache, "record": record}


def write(rules: Iterable[Any], default: Any, cache: Any, record: Mapping[str, Any]) -> Parts:
    """The config that `read` turns into these rules; ValueError if FastDeploy has none.

    Rules have attributes `pattern` and `scheme`; the keys of `record` are written as they are.
    """
    rules = list(rules)
    wanted = ([(rule.pattern, rule.scheme) for rule in rules], default, cache)
    for candidate in _candidates(rules, default, cache, record):
        try:
            found = read(candidate)
        except (ValueError, NotImplementedError):
            continue
        if ([rule[:2] for rule in found["rules"]], found["default"], found["cache"]) == wanted:
            return candidate
    shown = [f"{rule.pattern}: {rule.scheme}" for rule in rules] + [f"*: {default}, cache {cache}"]
    raise ValueError(
        f"FastDeploy has no quantization_config for the recipe {{{', '.join(shown)}}}. It has one "
        f"scheme for linear layers ({', '.join(_DENSE)}), one for the pattern {EXPERTS!r} "
        f"({', '.join(_EXPERTS)}) and a cache of {', '.join(_CACHES)}; with 'wint2' experts two "
        "ranges 'layers.{a..b}.mlp.experts'."
    )


def _candidates(rules: list, default: Any, cache: Any, record: Mapping[str, Any]):
    """Configs that might describe the rules; `read` decides."""
    dense = [name for name, scheme in _DENSE.items() if default == Scheme.parse(scheme)]
    dense += [None] * (default is None)
    base = {"quantization": record.get("quantization"), **record}
    if cache is not None:
        formats = {"float8_e4m3": "float8_e4m3fn", "int8": "int8", "int4": "int4_zp"}
        dynamic = cache.format == "float8_e4m3" and cache.dynamic
        base["kv_cache_quant_type"] = "block_wise_fp8" if dynamic else formats.get(cache.format)
        if cache.granularity == "channel" and cache.format != "int8":
            base["is_channel_wise"] = True
    ranges = [_LAYERS.fullmatch(rule.pattern) for rule in rules]
    if len(rules) == 2 and all(ranges):
        low, high = ((int(found[1]), int(found[2])) for found in ranges if found)
        sub = {_W4: _part(_W4, *low), _W2: _part(_W2, *high)}
        for name in dense:
            types = {"dense_quant_type": name, "moe_quant_type": "w4w2", "moe_quant_config": sub}
            yield base | {"quantization": "wint2"} | types
        return
    flags = [{}] if record else [{}, {"is_quantized": True}]
    for name in dense:
        if record.get("quantization") in (None, name) and name is not None:
            yield from (base | {"quantization": name} | flag for flag in flags)
        for expert in (*_EXPERTS, None):
            types = {"dense_quant_type": name, "moe_quant_type": expert}
            types = {k: v for k, v in types.items() if v is not None}
            yield from (base | {"quantization": "mix_quant"} | types | flag for flag in flags)


def _part(key: str, first: int, last: int) -> dict[str, Any]:
    """One part of `moe_quant_config`, for a range of layers."""
    fixed = {k: v for k, v in zip(_FIXED, _WINT2[key], strict=True) if v is not None}
    return fixed | {"quant_start_layer": first, "quant_end_layer": last}


def _check_flags(config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if key not in _KEYS:
            close = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else f" Known are {', '.join(_KEYS)}."
            raise ValueError(f"quantization_config: unknown key {key!r}.{hint}")
        if key in _FLAGS and type(value) is not _FLAGS[key]:
            kind = _FLAGS[key].__name__
            raise ValueError(f"quantization_config: {key} is {value!r}; expected a {kind}.")
    block = config.get("hadamard_block_size", 1)
    if block < 1 or block & (block - 1):
        raise ValueError(f"quantization_config: hadamard_block_size={block} is no power of two.")
    if config.get("image_moe_quant_type") is not None:
        raise NotImplementedError(
            f"image_moe_quant_type={config['image_moe_quant_type']!r}: fdq has no vision-language "
            "models, so nothing would be quantized by it. Drop the key to load the text model."
        )


def _refuse_keys(config: Mapping[str, Any], keys: Iterable[str], method: str) -> None:
    for key in keys:
        if config.get(key) is not None:
            raise ValueError(f"quantization_config: {key} has no place in {method!r}; drop it.")


def _scheme(
    method: str | None, key: str, methods: Mapping[str, str], config: Mapping[str, Any]
) -> Scheme | None:
    if method is None:
        return None
    if not isinstance(method, str):
        raise ValueError(f"quantization_config: {key} is {method!r}; expected a name.")
    if method in _REFUSED:
        raise NotImplementedError(f"{key}={method!r} is not supported: {_REFUSED[method]}.")
    if method not in methods:
        where = " FastDeploy has it for experts only." if method in _EXPERTS else ""
        close = difflib.get_close_matches(str(method), methods, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"quantization_config: unknown {key} {method!r}.{where}{hint} "
            f"Expected one of {', '.join(methods)}."
        )
    offline = config.get("is_quantized") or config.get("is_moe_quantized")
    static = methods is _EXPERTS and method in _STATIC_IF_OFFLINE and offline
    static = static and not config.get("moe_dynamic_quant")
    return Scheme.parse(methods[method] + "-static" * bool(static))


def _cache(config: Mapping[str, Any]) -> CacheSpec | None:
    kind = config.get("kv_cache_quant_type")
    if kind is None:
        return None
    if not isinstance(kind, str):
        raise ValueError(f"quantization_config: kv_cache_quant_type is {kind!r}; expected a name.")
    if kind in _REFUSED or (config.get("has_zero_point") and kind in ("int8", "float8_e4m3fn")):
        raise NotImplementedError(
            f"kv_cache_quant_type={kind!r} with zero points: FastDeploy itself raises "
            "NotImplementedError for it. Use 'int4_zp', or no zero points."
        )
    if kind not in _CACHES:
        raise ValueError(
            f"quantization_config: unknown kv_cache_quant_type {kind!r}. "
            f"Expected one of {', '.join(_CACHES)}."
        )
    name = _CACHES[kind]
    return CacheSpec.parse(
        name.replace("kvhead", "kvchannel") if config.get("is_channel_wise") else name
    )


def _read_wint2(config: Mapping[str, Any], num_layers: int | None) -> tuple[list, Scheme | None]:
    if config.get("moe_quant_type") != "w4w2":
        raise ValueError(
            "quantization_config: wint2 goes with moe_quant_type 'w4w2' (int4 experts in the first "
            f"layers, 2-bit ones above), found {config.get('moe_quant_type')!r}."
        )
    ranges = config.get("moe_quant_config")
    if not isinstance(ranges, Mapping) or set(ranges) != {_W4, _W2}:
        raise ValueError(
            f"quantization_config: wint2 needs moe_quant_config with the keys {_W4!r} and {_W2!r}, "
            f"found {ranges!r}."
        )
    low, high = _layers(ranges[_W4], _W4), _layers(ranges[_W2], _W2)
    last = None if num_layers is None else num_layers - 1
    if low[0] > low[1] or high[0] != low[1] + 1 or high[1] < high[0] or last not in (None, high[1]):
        end = "the last layer" if last is None else f"layer {last}, the last one"
        raise ValueError(
            f"quantization_config: {_W4} has layers {low[0]}..{low[1]} and {_W2} {high[0]}.."
            f"{high[1]}; the ranges must follow each other without a gap and end at {end}."
        )
    rules = [
        (f"layers.{{{a}..{b}}}.mlp.experts", Scheme.parse(_EXPERTS[method]), True)
        for (a, b), method in ((low, "wint4"), (high, "wint2"))
    ]
    return rules, _scheme(config.get("dense_quant_type"), "dense_quant_type", _DENSE, config)


def _layers(part: Any, key: str) -> tuple[int, int]:
    """First and last layer of one part of `moe_quant_config`."""
    known = sorted(_part(key, 0, 0))
    if not isinstance(part, Mapping) or sorted(part) != known:
        raise ValueError(f"quantization_config: {key} needs exactly {known}, found {part!r}.")
    found = tuple(part.get(name) for name in _FIXED)
    if found != _WINT2[key]:
        raise ValueError(
            f"quantization_config: {key} has (quant_type, quant_granularity, quant_group_size) "
            f"{found}; fdq knows {_WINT2[key]}."
        )
    first, last = part["quant_start_layer"], part["quant_end_layer"]
    if type(first) is not int or type(last) is not int or first < 0:
        raise ValueError(f"quantization_config: {key} has layers {first!r}..{last!r}.")
    return first, last
