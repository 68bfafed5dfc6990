"""Recipes: which tensor of a model gets which scheme.

A recipe is an ordered list of rules `path glob -> Scheme or None`; the first that matches wins, and
what no rule matches gets the default scheme. A rule may also say which quantizer chooses the codes.
Some tensors are protected, since quantizing them costs accuracy and saves little: routers, norms,
correction biases, embeddings and `lm_head`. A protected tensor is only quantized by a rule whose
pattern contains its word (`"lm_head"`, `"*embed*"`); `"layers.0"` alone leaves the router of layer
0 as it is.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from fdq.schemes import assignment, fastdeploy_config, path_pattern
from fdq.schemes.rule import (
    Rule,
    check_quantizer,
    options_of,
    quantizer_field,
    read_rule,
    scheme_or_none,
)
from fdq.schemes.scheme import CacheSpec, Scheme

EXPERTS = fastdeploy_config.EXPERTS
"""The pattern of routed experts, `layers.{i}.mlp.experts`; shared experts are not among them."""

_PROTECTED = {
    "router": re.compile(r"router"),
    "norm": re.compile(r"norm(?!al)"),
    "correction_bias": re.compile(r"correction_bias"),
    "embed": re.compile(r"embed"),
    "lm_head": re.compile(r"^lm_head$"),
}


@dataclasses.dataclass(frozen=True)
class Match:
    """What a recipe says about one path; a `scheme` of None leaves the tensor as it is.

    `rule` decided, None for the default or a protection; `reason` is the same in words.
    """

    scheme: Scheme | None
    rule: Rule | None
    reason: str
    quantizer: str | None = None


@functools.lru_cache(maxsize=65536)
def protected_word(path: str) -> str | None:
    """The word of a path that protects it from being quantized by default, or None."""
    components = path.lower().split(".")
    for word, regex in _PROTECTED.items():
        if any(regex.search(component) for component in components):
            return word
    return None


@dataclasses.dataclass(frozen=True, init=False)
class Recipe:
    """Ordered path rules, a default scheme and the format of the KV cache.

    Attributes:
      rules: the first that matches a path wins.
      default: for paths that no rule matches; `None` leaves them as they are.
      cache: format of the KV cache; `None` is 16 bits.
      quantizer: what chooses the codes of those that no rule matches; None: `method=`, or by bits.
      record: keys of a FastDeploy configuration that no scheme holds (`hadamard_block_size`,
        `is_quantized` ...), kept to be written back.

    Examples:
      >>> recipe = Recipe([("*.experts", "W4A8"), ("lm_head", "W8A16"), ("*", "W8A16C8")])
      >>> str(recipe.match("layers.3.mlp.experts.down_proj.kernel").scheme)
      'W4A8C16'
      >>> recipe.match("layers.3.mlp.router.kernel").reason
      "router: left unless a rule's pattern contains 'router'"
      >>> str(recipe.cache)
      'C8'
      >>> recipe = Recipe([("*.down_proj", "W4A16", dict(quantizer="absmax")), ("*", "W4A16")])
      >>> recipe.match("layers.0.mlp.down_proj.kernel").quantizer
      'absmax'
    """

    rules: tuple[Rule, ...]
    default: Scheme | None
    cache: CacheSpec | None
    quantizer: str | None
    record: dict[str, Any] = dataclasses.field(compare=False)

    def __init__(
        self,
        rules: Iterable[Rule | tuple[str, Any] | tuple[str, Any, Mapping[str, Any]]] = (),
        default: Scheme | str | None = None,
        *,
        cache: CacheSpec | str | None = None,
        quantizer: str | None = None,
        record: Mapping[str, Any] | None = None,
    ):
        """Makes a recipe.

        Args:
          rules: `Rule` s, pairs `(pattern, scheme or its name or None)`, or triples whose last
            member is a dict of other fields of a `Rule`, such as `dict(quantizer=name)` or
            `dict(contract=axes)`. A last pattern `"*"` is the default, and does not
            touch protected tensors.
          default: scheme of all else; its cache becomes the recipe's.
          cache: format of the KV cache, or its name (`"C8"`).
          quantizer: see the class.
          record: see the class.

        Raises:
          ValueError: a bad pattern or scheme name, a rule after `"*"`, two defaults or caches.
        """
        given = [read_rule(rule) for rule in rules]
        default = scheme_or_none(default)
        if given and given[-1][0] == "*":
            if default is not None:
                raise ValueError(f"Two defaults: the rule '*' and default={default}. Drop one.")
            _, last, _, quantizer, *axes = given.pop()
            default = scheme_or_none(last)
            if axes != [None, 0]:
                raise ValueError("The rule '*' has no contract: name the kernels that it is about.")
        patterns = [pattern for pattern, *_ in given]
        if "*" in patterns:
            after = [*patterns, "*"][patterns.index("*") + 1]
            raise ValueError(f"Rule {after!r} comes after '*', so it would match nothing.")
        for pattern in patterns:
            if patterns.count(pattern) > 1:
                raise ValueError(f"Two rules for {pattern!r}: the second would match nothing.")
        made = tuple(Rule(*fields) for fields in given)
        cache = CacheSpec.parse(cache) if isinstance(cache, str) else cache
        if default is not None and default.cache is not None:
            if cache not in (None, default.cache):
                raise ValueError(f"Two cache formats: {cache} and that of {default}. Drop one.")
            default, cache = dataclasses.replace(default, cache=None), default.cache
        default = None if default == Scheme() else default
        check_quantizer("The default", default, quantizer)
        fields = {"rules": made, "default": default, "cache": cache, "quantizer": quantizer}
        for name, value in (fields | {"record": dict(record or {})}).items():
            object.__setattr__(self, name, value)

    @classmethod
    def parse(cls, source: Any, *, compat: str | None = None, has_experts: bool = True) -> Recipe:
        """A recipe from whatever names one.

        Args:
          source: a `Recipe`; a `Scheme`; the name of a scheme; `"mix_quant"` (FastDeploy's
            mixture: int8 weights, W4A8 experts, int8 cache); a dict `pattern -> scheme` or a
            list of rules; FastDeploy's `quantization_config` as a dict or as JSON text; what
            `to_json` wrote; None (nothing is quantized).
          compat: `"fastdeploy"` reads names as FastDeploy's command line does for ERNIE. Scales
            of 8- and 4-bit integers are per channel; and in a model with routed experts,
            `wint4` quantizes all but the experts to int8, `w4afp8` to block-wise float8, and
            `wint2` is the convolutional code from layer 7 on, int4 experts below and int8 for
            the rest. Without it each name means the same for every tensor.
          has_experts: whether the model has routed experts; matters with `compat` only.

        Raises:
          ValueError: unknown name, key or contradictory rules; says what and the nearest name.
        """
        if isinstance(source, Recipe):
            return source
        if source is None:
            return cls()
        if isinstance(source, str):
            if source.lstrip().startswith("{"):
                return cls.parse(_read_json(source), compat=compat)
            mixture = fastdeploy_config.named(source, compat, has_experts)
            return cls._of(mixture) if mixture else cls(default=Scheme.parse(source, compat=compat))
        if isinstance(source, Scheme):
            return cls(default=source)
        if isinstance(source, Mapping):
            if "rules" in source:
                return cls.from_dict(source)
            if fastdeploy_config.looks_like(source):
                return cls.from_fastdeploy(source)
            return cls([_entry(pattern, value, compat) for pattern, value in source.items()])
        if isinstance(source, (list, tuple)):
            return cls(source)
        raise TypeError(
            "A recipe is a scheme's name, a Scheme, a Recipe, a dict or list of rules or "
            f"FastDeploy's quantization_config; got {type(source).__name__}."
        )

    @classmethod
    def from_fastdeploy(cls, config: Mapping[str, Any], *, num_layers: int | None = None) -> Recipe:
        """Reads FastDeploy's `quantization_config`; see `fdq.schemes.fastdeploy_config`.

        Args:
          config: the JSON object, or a `config.json` that holds it.
          num_layers: where given, layer ranges must end at the last layer.

        Raises:
          ValueError: an unknown key or type, or one that is missing; a bad layer range.
          NotImplementedError: what FastDeploy has and fdq has not (image experts ...).
        """
        return cls._of(fastdeploy_config.read(config, num_layers=num_layers))

    def to_fastdeploy(self) -> dict[str, Any]:
        """The `quantization_config` that reads as this recipe; ValueError if there is none."""
        for one in (*self.rules, self):
            if one.quantizer is not None:
                raise ValueError(
                    f"FastDeploy's quantization_config cannot say quantizer={one.quantizer!r}."
                )
            if getattr(one, "contract", None) is not None:
                raise ValueError("FastDeploy's quantization_config cannot say contract=.")
        return fastdeploy_config.write(self.rules, self.default, self.cache, self.record)

    @classmethod
    def _of(cls, parts: fastdeploy_config.Parts) -> Recipe:
        return cls(**{**parts, "rules": [Rule(*triple) for triple in parts["rules"]]})

    @property
    def needs_calibration(self) -> bool:
        """Whether it has static scales, of activations or of the cache."""
        schemes = [self.default, *(rule.scheme for rule in self.rules)]
        parts = [scheme.activation for scheme in schemes if scheme is not None]
        of_cache = self.cache is not None and self.cache.calibrated
        return of_cache or any(part is not None and not part.dynamic for part in parts)

    def match(self, path: str) -> Match:
        """What the tensor at `path` gets, from its path alone (shapes are not looked at)."""
        word = protected_word(path)
        for rule in self.rules:
            if path_pattern.reach(rule.pattern, path) is None:
                continue
            if word is None or word in rule.pattern.lower() or rule.scheme is None:
                return Match(rule.scheme, rule, f"rule {rule.pattern!r}", rule.quantizer)
        if word is not None:
            return Match(None, None, f"{word}: left unless a rule's pattern contains {word!r}")
        reason = "default" if self.default else "no rule matches"
        return Match(self.default, None, reason, self.quantizer)

    def scheme_for(self, path: str) -> Scheme | None:
        """The scheme of the tensor at `path`; None leaves it as it is."""
        return self.match(path).scheme

    def table(self, params: Any) -> assignment.MatchTable:
        """Which tensor of a pytree gets what; prints as a table, `rows` for programs.

        Args:
          params: dicts, lists, dataclasses, an `nnx.State`, of arrays or ShapeDtypeStructs. For
            an NNX module use `fdq.match_table`, which knows its layers.

        Raises:
          ValueError: a rule that matches nothing, or a tensor that cannot take its scheme.
        """
        return assignment.assign(self, assignment.leaves_of(params))

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; the inverse of `from_dict`."""
        rules = [
            {
                "pattern": rule.pattern,
                "scheme": None if rule.scheme is None else str(rule.scheme),
                "required": rule.required,
                **options_of(rule),
            }
            for rule in self.rules
        ]
        default, cache = (None if x is None else str(x) for x in (self.default, self.cache))
        fields = {"rules": rules, "default": default, "cache": cache, "record": dict(self.record)}
        return fields | quantizer_field(self.quantizer)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Recipe:
        """Reads what `to_dict` wrote; ValueError names unknown or missing keys."""
        _check_keys("recipe", fields, cls, {"rules"})
        for rule in fields["rules"]:
            _check_keys("rule", rule, Rule, {"pattern", "scheme"})
        return cls(**{**fields, "rules": [Rule(**rule) for rule in fields["rules"]]})

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str | Mapping[str, Any]) -> Recipe:
        """Reads what `to_json` wrote."""
        return cls.from_dict(_read_json(text) if isinstance(text, str) else text)

    def __str__(self) -> str:
        """The scheme's name, or the rules as JSON; `parse` reads both."""
        default = dataclasses.replace(self.default or Scheme(), cache=self.cache)
        if not self.rules and self.quantizer is None:
            return str(default)
        rules = [(rule.pattern, rule.scheme, options_of(rule)) for rule in self.rules]
        last = ("*", default, quantizer_field(self.quantizer))
        return json.dumps(
            {
                pattern: [str(scheme), options] if options else scheme and str(scheme)
                for pattern, scheme, options in (*rules, last)
            }
        )

    def __hash__(self) -> int:
        return hash((self.rules, self.default, self.cache, self.quantizer))


def _entry(pattern: str, value: Any, compat: str | None) -> tuple[Any, ...]:
    """A rule from an entry of a mapping: a scheme, or a pair of it and a dict of options."""
    scheme, *options = value if isinstance(value, (tuple, list)) else (value,)
    return (pattern, scheme_or_none(scheme, compat), *options)


def _read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"This recipe is not valid JSON: {error}. Got {text!r}.") from None


def _check_keys(what: str, found: Any, kind: type[Any], needed: set[str]) -> None:
    """Raises ValueError unless the keys of `found` are fields of `kind`, with those needed."""
    known = {field.name for field in dataclasses.fields(kind)}
    if not isinstance(found, Mapping):
        raise ValueError(f"A {what} is a JSON object, got {found!r}.")
    unknown, missing = set(found) - known, needed - set(found)
    if unknown or missing:
        raise ValueError(
            f"A {what} has keys {sorted(known)}; unknown: {sorted(unknown)}, "
            f"missing: {sorted(missing)}."
        )
