"""Where a tensor of a decoder is in somebody else's checkpoint, as data."""

from __future__ import annotations

import dataclasses
from typing import Literal

# As stored; a matrix stored [out, in]; a vector stored with a leading axis of one.
Layout = Literal["same", "transposed", "row"]
Widths = Literal["qkv", "equal"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Source tensors of one kind of tensor.

    Attributes:
      target: path in fdq's tree; `{i}` is a layer.
      names: source names, joined along the last axis of the target; `{i}` is the layer, and
        `{e}` an expert, over which the target's first axis goes.
      layout: how each source tensor is stored.
      widths: the sources' shares of the target's last axis: `qkv` by the model's heads, `equal`
        parts.
    """

    target: str
    names: tuple[str, ...]
    layout: Layout = "same"
    widths: Widths = "equal"
