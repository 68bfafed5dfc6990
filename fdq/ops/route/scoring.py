"""How a router's logits become scores, and which experts may be chosen at all."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

_EXCLUDED = -1e30  # as a score: finite, as jax_debug_infs would stop at an infinity that is meant
SCORES = ("softmax", "sigmoid")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring:
    """What a token's experts are chosen by; the default is a softmax over all experts.

    Attributes:
      function: `softmax` over all experts, or `sigmoid` of each logit by itself.
      groups: into how many groups of neighbors the experts fall.
      top_groups: groups that a token's experts come from: the best ones.
      best_of_group: a group is as good as the sum of so many of its best experts (DeepSeek-V2: 1,
        DeepSeek-V3: 2).
      scale: what weights are multiplied by in the end.
    """

    function: str = "softmax"
    groups: int = 1
    top_groups: int = 1
    best_of_group: int = 2
    scale: float = 1.0

    def __post_init__(self):
        if self.function not in SCORES:
            raise ValueError(
                f"scores of a router: {self.function!r} is unknown; use "
                + " or ".join(map(repr, SCORES))
            )
        if not 1 <= self.top_groups <= self.groups:
            raise ValueError(
                f"top_groups (={self.top_groups}) must be 1 to groups (={self.groups})"
            )
        if self.best_of_group < 1:
            raise ValueError(f"best_of_group (={self.best_of_group}) must be 1 or more")

    def check(self, experts: int, top_k: int) -> None:
        """ValueError where so many experts do not fall into the groups, or too few are left."""
        size, left = divmod(experts, self.groups)
        if not 1 <= top_k <= experts:
            raise ValueError(
                f"experts of a token: expected 1 to {experts}, the number of experts, found {top_k}"
            )
        if left:
            raise ValueError(f"{experts} experts do not fall into {self.groups} groups alike")
        if top_k > self.top_groups * size:
            raise ValueError(
                f"{self.top_groups} groups of {size} experts have fewer than the {top_k} that a "
                "token goes to"
            )

    def scores(self, logits: jax.Array) -> jax.Array:
        """Of each expert, from logits `[T, E]` float32; what weights are made of."""
        if self.function == "sigmoid":
            return jax.nn.sigmoid(logits)
        return jax.nn.softmax(logits, axis=-1)

    def allowed(self, scores: jax.Array) -> jax.Array:
        """Scores `[T, E]` to choose by, those of other than the best groups below all others."""
        if self.top_groups == self.groups:
            return scores
        rows = scores.shape[0]
        grouped = scores.reshape(rows, self.groups, -1)
        best = lax.top_k(grouped, min(self.best_of_group, grouped.shape[-1]))[0].sum(axis=-1)
        kept = lax.top_k(best, self.top_groups)[1]
        groups = jnp.arange(self.groups, dtype=kept.dtype)
        is_kept = (kept[:, :, None] == groups[None, None, :]).any(axis=1)
        return jnp.where(is_kept[:, :, None], grouped, jnp.float32(_EXCLUDED)).reshape(scores.shape)


SOFTMAX = Scoring()
"""The usual one."""
