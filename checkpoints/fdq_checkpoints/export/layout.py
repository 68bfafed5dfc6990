"""How a tool stores quantized linear layers in safetensors: what each `Layout` has to say."""

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fdq.schemes.scheme import ActivationSpec, CacheSpec, Scheme, WeightSpec
from fdq_checkpoints.sources.stored_weight import StoredWeight
from fdq_checkpoints.sources.tensor_names import Piece
from fdq_checkpoints.tree_paths import Path, dotted

Shapes = dict[str, tuple[Any, tuple[int, ...]]]
"""Dtype and shape by the end of a tensor's name."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer `[out, in]` of somebody's model, before its codes are read.

    Attributes:
      path: of fdq's kernel that it is part of, or all of.
      piece: which part.
      k, n: rows (in) and columns (out).
      spec: how fdq holds it.
      activation: how its input is quantized.
      last: whether no other layer has later columns of the same kernel.
    """

    path: Path
    piece: Piece
    k: int
    n: int
    spec: WeightSpec
    activation: ActivationSpec | None
    last: bool = True

    @property
    def module(self) -> str:
        """Its name."""
        return self.piece.name.removesuffix(".weight")

    @property
    def pattern(self) -> str:
        """Its name with `{i}` and `{e}` for the layer and the expert."""
        return self.piece.pattern.removesuffix(".weight")

    @property
    def scheme(self) -> str:
        """For people: how weights and inputs are stored."""
        return str(Scheme(weight=self.spec, activation=self.activation)).replace("C16", "")

    @property
    def label(self) -> str:
        """For errors: fdq's tensor, and its format."""
        return f"{dotted(self.path)} ({self.scheme})"

    @property
    def group(self) -> int:
        """Rows that share a scale."""
        return self.spec.group_size or self.k


class Layout(abc.ABC):
    """What a tool's files say of quantized linear layers."""

    @abc.abstractmethod
    def problem(self, layer: Layer) -> str | None:
        """Why it cannot hold a layer exactly, and which exporter would; None where it can."""

    def problem_of_all(self, layers: Sequence[Layer]) -> str | None:
        """Why it cannot hold these layers together, though each alone; None where it can."""
        del layers
        return None

    @abc.abstractmethod
    def shapes(self, layer: Layer) -> Shapes:
        """The tensors of a layer, but for a static scale of its input."""

    def whole(self, weight: StoredWeight) -> StoredWeight:
        """A kernel of fdq's before layers are cut out of it."""
        return weight

    @abc.abstractmethod
    def arrays(self, layer: Layer, weight: StoredWeight) -> dict[str, np.ndarray]:
        """Their content."""

    @abc.abstractmethod
    def config(self, layers: Sequence[Layer], floats: Sequence[Piece]) -> Mapping[str, Any]:
        """`quantization_config`; `floats` are the linear layers that have no codes."""

    has_row_order = False
    """Whether rows may be in an order of their own, which is then stored."""

    def stack_problem(self, spec: WeightSpec) -> str | None:
        """Why it cannot hold experts of one tensor; None where it can, by the two below."""
        del spec
        return "it has codes of single matrices alone. Export it --to dense, which decodes it."

    def stack_shapes(self, piece: Piece, shape: tuple[int, ...]) -> Shapes:
        """By their whole names, the tensors of experts `[E, in, out]` that lie in one."""
        raise NotImplementedError

    def expert_arrays(self, piece: Piece, weight: StoredWeight) -> list[np.ndarray]:
        """One expert of those tensors."""
        raise NotImplementedError

    def word(self, layer: Layer) -> str:
        """For people: in what a layer is stored."""
        return layer.scheme

    def notes(self, layers: Sequence[Layer]) -> tuple[str, ...]:
        """What whoever reads the files should know, a line each."""
        del layers
        return ()

    def cache(self, spec: CacheSpec) -> Mapping[str, Any] | None:
        """What the config says of a cache with static scales; None leaves these out."""
        del spec
        return None


def scale_shape(layer: Layer) -> tuple[int, int]:
    """Of scales `[out, in]`: one a tensor, a channel, a group or a block."""
    spec = layer.spec
    if spec.granularity == "tensor":
        return (1, 1)
    if spec.block_size is not None:
        rows, columns = spec.block_size
        return -(-layer.n // columns), -(-layer.k // rows)
    return layer.n, layer.k // layer.group


def turned(array: np.ndarray) -> np.ndarray:
    """`[in, out]` -> `[out, in]`."""
    return np.ascontiguousarray(array.T)


def common(values: Sequence[Any]) -> Any:
    """The value that all have; None where they differ."""
    return values[0] if all(value == values[0] for value in values) else None


def in_groups(layers: Sequence[Layer]) -> list[Layer]:
    """Layers as short as a group of the others are said to be of such groups, too.

    fdq holds one group of all rows as a channel; tools say one size of groups for a model.
    """
    sizes = {layer.spec.group_size for layer in layers} - {None}
    if len(sizes) != 1:
        return list(layers)
    (size,) = sizes
    result = []
    for layer in layers:
        if layer.spec.granularity == "channel" and layer.k == size:
            spec = dataclasses.replace(layer.spec, granularity="group", group_size=size)
            layer = dataclasses.replace(layer, spec=spec)
        result.append(layer)
    return result


def crosses(layer: Layer) -> bool:
    """Whether blocks of columns lie across the layer and another of the same kernel."""
    if layer.spec.block_size is None:
        return False
    columns = layer.spec.block_size[1]
    starts_inside = layer.piece.start % columns
    return bool(starts_inside or (layer.piece.stop % columns and not layer.last))


def bytes_of(shapes: Shapes) -> int:
    """Of all tensors."""
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in shapes.values())
