"""All that scheme names are made of, as data: what there is, for people who do not know it yet."""

import dataclasses
import json
import pathlib
from typing import Any

from fdq.schemes import grammar
from fdq.schemes.recipe import Recipe

_PARTS = {"w": "weights", "a": "activations", "c": "cache"}
# Names of FastDeploy that the grammar reads by itself.
_READ = ("wint8", "wint4", "w8a8", "w4a8", "wfp8afp8", "w4afp8")
_MEASURED = pathlib.Path(__file__).with_name("measured.json")
_SIZES = {
    "g64": "weights: one scale for 64 rows",
    "b128": "weights: one scale for a block of 128 x 128; b64x128 for other blocks",
    "x128": "activations: one scale for 128 channels of a token",
}


@dataclasses.dataclass(frozen=True)
class Listing:
    """Types by part, suffixes with what they decide, and names with the scheme they stand for.

    `measured` has what schemes cost the small model that comes with fdq, on held-out text through
    the KV cache (`python -m benchmarks.schemes`): the order holds for other models, the loss is
    smaller in larger ones.
    """

    types: dict[str, tuple[str, ...]]
    suffixes: dict[str, str]
    names: dict[str, str]
    measured: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return dataclasses.asdict(self)


def listing() -> Listing:
    """What there is now; formats that were registered are among them."""
    types = {
        name: ("16", *(format.grammar_name for format in grammar.formats(part).values()))
        for part, name in _PARTS.items()
    }
    words = {
        word: f"{_PARTS[part]}: {decides} is {next(iter(fields.values()))}"
        for word, (part, decides, fields) in grammar.words().items()
    }
    names = {name: str(Recipe.parse(name)) for name in sorted((*grammar.aliases(), *_READ))}
    measured = json.loads(_MEASURED.read_text("utf-8"))["rows"]
    return Listing(types, _SIZES | words, names, tuple(measured))
