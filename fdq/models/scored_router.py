"""The part of routers that score otherwise than by a softmax over all experts."""

import dataclasses
from collections.abc import Hashable
from typing import Any, override

from flax import nnx

from fdq import nn
from fdq.models.parts import ROUTERS, Part, router_of
from fdq.ops.route.scoring import Scoring


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredRouter(Part):
    """Sigmoids, groups of experts, scaled weights; the attributes are those of `Scoring`.

    The module is called as `router(rows)` and gives experts and weights.
    """

    name = "scored"

    function: str = "softmax"
    groups: int = 1
    top_groups: int = 1
    best_of_group: int = 2
    scale: float = 1.0

    def __post_init__(self):
        self.scoring  # noqa: B018 - its own checks

    @property
    def scoring(self) -> Scoring:
        """What the router is told."""
        return Scoring(**dataclasses.asdict(self))

    @override
    def build(self, config: Any, layer: int, *, dtype: Any, rngs: nnx.Rngs) -> nn.Router:
        return router_of(config, scoring=self.scoring, rngs=rngs)

    @override
    def layer_kind(self, config: Any, layer: int) -> Hashable:
        return self


ROUTERS.register(ScoredRouter)
