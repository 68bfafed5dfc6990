"""How long a conversion will take, before it starts: a sample is quantized here and timed."""

import dataclasses
import math
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp

from fdq.analysis.planner import find_config
from fdq.models import abstract
from fdq.quantizers.quantization import match_table
from fdq.quantizers.quantizer import pick
from fdq.quantizers.weight import quantize_array
from fdq.schemes.assignment import MatchTable
from fdq.schemes.recipe import Recipe

FEW_WEIGHTS = 100_000_000
"""Whatever is done to fewer weights is done in a minute or so: no sample is worth it."""
SAMPLE_WEIGHTS = 1 << 18
COLUMNS = 128
"""Of a sample at least: as many as share a scale in any format."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What choosing codes takes: `seconds` on this machine, by which `quantizers`.

    `has_faster` says whether one of them is a search that could be left out.
    """

    weights: int
    seconds: float
    quantizers: tuple[str, ...]
    has_faster: bool


def conversion_cost(
    source: str | pathlib.Path, scheme: Any, *, method: str | None = None, compat: str | None = None
) -> Cost | None:
    """The cost of converting the checkpoint in a directory, from its config.json and a sample.

    None where the directory has no config.json that says its shapes, where nothing is quantized,
    and where there are fewer than `FEW_WEIGHTS`.
    """
    if not (pathlib.Path(source) / "config.json").is_file():
        return None
    _, config = find_config(source)
    recipe = Recipe.parse(scheme, compat=compat, has_experts=config.moe is not None)
    table = match_table(abstract(config), recipe, compat=compat)
    return cost_of(table, method=method)


def cost_of(table: MatchTable, *, method: str | None = None) -> Cost | None:
    """The cost of what a table says, in which `method` stands where no rule names a quantizer."""
    kinds: dict[tuple[Any, str], list[tuple[int, ...]]] = {}
    for row in table.quantized:
        assert row.scheme is not None and row.scheme.weight is not None
        name = pick(row.scheme.weight, row.quantizer or method, row.path).name
        kinds.setdefault((row.scheme.weight, name), []).append(row.shape)
    weights = sum(math.prod(shape) for shapes in kinds.values() for shape in shapes)
    if weights < FEW_WEIGHTS:
        return None
    seconds = sum(
        seconds_a_weight(spec, name, max(shape[-2] for shape in shapes))
        * sum(map(math.prod, shapes))
        for (spec, name), shapes in kinds.items()
    )
    names = tuple(sorted({name for _, name in kinds}))
    faster = method is None and any(
        name == "search" and pick_or_none(spec, "absmax") for spec, name in kinds
    )
    return Cost(weights=weights, seconds=seconds, quantizers=names, has_faster=faster)


def pick_or_none(spec: Any, name: str) -> Any:
    """The quantizer called `name`, if it can choose the codes of `spec`."""
    try:
        return pick(spec, name)
    except ValueError:
        return None


def seconds_a_weight(spec: Any, quantizer: str, k: int) -> float:
    """Wall time of one weight among many of matrices with `k` rows, compilation left out."""
    columns = COLUMNS * max(1, SAMPLE_WEIGHTS // (COLUMNS * k))
    w = jax.random.normal(jax.random.key(0), (k, columns), jnp.float32)
    for _ in range(2):
        start = time.perf_counter()
        jax.block_until_ready(quantize_array(w, spec, method=quantizer))
        seconds = time.perf_counter() - start
    return seconds / w.size
