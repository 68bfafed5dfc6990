"""The experts' products by tokamax's ragged_dot with quantized weights, where it is installed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_cases import ExpertCase
from benchmarks.gpu_child import Emit, Settings, run_cases, section_main
from benchmarks.gpu_products import expert_indices, timed
from benchmarks.gpu_timing import Work, difference, reason
from benchmarks.gpu_torch import Peer
from benchmarks.gpu_weights import random_array

_GROUP = 128


def run(settings: Settings, emit: Emit) -> None:
    """Reports ``{"case", "entries"}`` for the cases in ``more["cases"]``."""
    try:
        import qwix  # type: ignore[import-not-found] # noqa: F401
        import tokamax  # type: ignore[import-not-found] # noqa: F401
    except Exception as error:
        emit({"unavailable": reason(error)})
        return
    cases = [Peer(fields["case"], fields) for fields in settings.more["cases"]]
    run_cases(cases, settings, emit, measure)


def measure(case: Peer, settings: Settings) -> dict[str, Any]:
    """Rows sorted by expert, as ragged_dot wants them; sorting is not timed."""
    import qwix
    import tokamax

    fields = case.fields
    if fields["scheme"] not in ("W4A16", "W8A16"):
        error = f"only W4A16 and W8A16 are measured, not {fields['scheme']}"
        return {"entries": {"tokamax": {"error": error}}}
    int4 = fields["scheme"] == "W4A16"
    shape = ExpertCase(
        format="W4" if int4 else "W8",
        model=fields["model"],
        layer=fields["layer"],
        tokens=fields["m"],
        experts=fields["experts"],
        top_k=fields["rows"] // fields["m"],
        k=fields["k"],
        n=fields["n"],
    )
    dtype = jnp.dtype(settings.dtype)
    stack = (shape.experts, shape.k, shape.n)
    key = jax.random.key(0)
    codes = jax.random.randint(key, stack, -7 if int4 else -127, 8 if int4 else 128, jnp.int8)
    codes = codes.astype(jnp.int4) if int4 else codes
    groups = shape.k // _GROUP if int4 else 1
    scale = jnp.full((shape.experts, groups, shape.n), shape.k**-0.5 / (4 if int4 else 73), dtype)
    weight = qwix.QArray(qvalue=codes, scale=scale)
    indices = expert_indices(shape, 8)
    sizes = [jnp.asarray(np.bincount(i, minlength=shape.experts), jnp.int32) for i in indices]
    x = random_array(jax.random.key(1), (fields["rows"], shape.k), dtype)

    def step(x: Any, sizes: jax.Array) -> jax.Array:
        rows, weight = x
        return tokamax.ragged_dot(rows, weight, sizes, implementation="mosaic")

    owner = jnp.asarray(np.sort(indices[0]), jnp.int32)

    @jax.jit
    def reference(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
        def one(item: tuple[jax.Array, jax.Array]) -> jax.Array:
            row, expert = item
            w = codes[expert].astype(jnp.float32)
            s = jnp.repeat(scale[expert].astype(jnp.float32), shape.k // groups, axis=0)
            return jnp.dot(row.astype(jnp.float32), w * s, precision=jax.lax.Precision.HIGHEST)

        return jax.lax.map(one, (x, owner))

    expected = reference(x, codes, scale)
    works: dict[str, Work | str] = {"tokamax": Work(step, (x, weight), sizes)}
    checks = {"tokamax": lambda y: difference(y, expected)}
    return {"entries": timed(works, checks, {}, settings)}


if __name__ == "__main__":
    section_main(run)
