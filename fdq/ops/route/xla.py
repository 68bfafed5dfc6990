"""`route` in plain XLA, and the arguments that its implementations take."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from fdq.ops.implementation import Implementation
from fdq.ops.placement import in_auto_axes, spec_entry
from fdq.ops.route.scoring import SOFTMAX, Scoring
from fdq.ops.rows import Rows, as_array


@dataclasses.dataclass(frozen=True, eq=False)
class Routing:
    """The arguments of `fdq.ops.route.api.route`."""

    x: Rows
    kernel: jax.Array
    correction_bias: jax.Array | None
    top_k: int
    normalize: bool
    norm_min: float
    scoring: Scoring = SOFTMAX
    bias: jax.Array | None = None


class Xla(Implementation[Routing]):
    """A float32 product, scores and a sort."""

    name = "xla"

    def __call__(self, arguments: Routing) -> tuple[jax.Array, jax.Array]:
        """Experts and weights."""
        a, x = arguments, as_array(arguments.x)

        def product(x, kernel, bias):
            highest = jax.lax.Precision.HIGHEST
            y = jnp.matmul(x.astype(jnp.float32), kernel.astype(jnp.float32), precision=highest)
            return y if bias is None else y + bias.astype(jnp.float32)[None, :]

        # A token's scores are needed together, also where the kernel is sharded over experts.
        logits = in_auto_axes(product, x, a.kernel, a.bias, result=lambda: [spec_entry(x, 0), None])
        options = {"normalize": a.normalize, "norm_min": a.norm_min, "scoring": a.scoring}
        return choose_experts(logits, a.correction_bias, top_k=a.top_k, **options)


def choose_experts(
    logits: jax.Array,
    correction_bias: jax.Array | None,
    *,
    top_k: int,
    normalize: bool = True,
    norm_min: float = 0.0,
    scoring: Scoring = SOFTMAX,
) -> tuple[jax.Array, jax.Array]:
    """`route` from its logits `[T, E]` float32."""
    probabilities = scoring.scores(logits)
    scores = probabilities
    if correction_bias is not None:
        scores = probabilities + correction_bias[None, :]
    experts = jax.lax.top_k(scoring.allowed(scores), top_k)[1]
    weights = jnp.take_along_axis(probabilities, experts, axis=-1)
    if normalize:
        total = weights.sum(axis=-1, keepdims=True)
        weights = weights / jnp.maximum(total, norm_min)
    return experts, weights if scoring.scale == 1 else weights * scoring.scale
