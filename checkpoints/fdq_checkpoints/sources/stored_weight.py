"""Weights as other tools store them, repacked into fdq's arrays without a detour over floats."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from fdq.formats import FORMATS
from fdq.formats.qtensor import QTensor
from fdq.schemes.scheme import ActivationSpec, WeightSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """A quantized linear layer of somebody's checkpoint, before it is read.

    Attributes:
      module: its name; its tensors are `<module>.<end>`.
      shape: `(out, in)`.
      spec: how fdq holds it.
      activation: how its input is quantized.
      ends: of its tensors' names, the codes' first.
      input_scale: the end of the name of its input's scale, where that is static.
      whole: the scale of the matrix, where there is one besides those of groups.
      input_factor: the end of the name of what multiplies channels of its input, `[in]`, which
        fdq's layers do not.
      order: digest of the order of its rows, where `spec` says that there is one.
      weight: the end of the name that the weight has in a model of floats.
      experts: of a stack `[experts, in, out]`, how many it holds, each with a matrix of `shape`.
      expert: which of them is meant.
      stack: the module that holds its tensors, where that has those of all experts.
    """

    module: str
    shape: tuple[int, int]
    spec: WeightSpec
    activation: ActivationSpec | None
    ends: tuple[str, ...]
    input_scale: str | None = None
    whole: float | None = None
    order: str | None = None
    input_factor: str | None = None
    weight: str = "weight"
    experts: int | None = None
    expert: int | None = None
    stack: str | None = None

    @property
    def floats(self) -> str:
        """The name of the weight in a model of floats."""
        return f"{self.module}.{self.weight}"

    @property
    def float_shape(self) -> tuple[int, ...]:
        """Its shape there."""
        return self.shape if self.experts is None else (self.experts, *self.shape[::-1])

    def each(self) -> list["Linear"]:
        """The experts of a stack, one by one; or itself."""
        if self.experts is None:
            return [self]
        return [dataclasses.replace(self, expert=expert) for expert in range(self.experts)]

    @property
    def stored_as(self) -> str:
        """The module whose tensors hold it."""
        return self.stack or self.module

    @property
    def names(self) -> tuple[str, ...]:
        """Of its tensors."""
        ends = self.ends if self.input_scale is None else (*self.ends, self.input_scale)
        return tuple(f"{self.stored_as}.{end}" for end in ends)


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """The arrays of a `QTensor` `[K, N]`, on the host; `arrays` are all but the codes, by name."""

    spec: WeightSpec
    k: int
    codes: np.ndarray
    arrays: Mapping[str, np.ndarray]

    def qtensor(self) -> QTensor:
        """The weight."""
        padding = FORMATS[self.spec.format].padding(self.k)
        return QTensor(spec=self.spec, padding=padding, codes=self.codes, **self.arrays)

    @classmethod
    def of(cls, q: QTensor) -> "StoredWeight":
        """A weight `[K, N]` whose arrays are on the host."""
        arrays = {name: np.asarray(array) for name, array in q.arrays().items()}
        return cls(q.spec, q.shape[-2], arrays.pop("codes"), arrays)

    def columns(self, start: int, stop: int) -> "StoredWeight":
        """Some of its columns: the inverse of `joined_with`.

        ValueError where a scale is that of columns inside and outside of them.
        """
        n = self.codes.shape[-1]
        if (start, stop) == (0, n):
            return self
        each = {"tensor": n, "block": (self.spec.block_size or (1, 1))[1]}
        width = each.get(self.spec.granularity, 1)
        whole = width == n
        if not whole and (start % width or (stop % width and stop != n)):
            raise ValueError(f"blocks of {width} columns lie across columns {start} to {stop}")
        arrays = {
            name: array
            if whole or name == "row_order" or array.shape[-1] == 1
            else np.ascontiguousarray(array[..., start // width : -(-stop // width)])
            for name, array in self.arrays.items()
        }
        codes = np.ascontiguousarray(self.codes[..., start:stop])
        return StoredWeight(self.spec, self.k, codes, arrays)

    def joined_with(self, others: Sequence["StoredWeight"]) -> "StoredWeight":
        """Weights of one input beside each other along N, all of one `joined_spec`."""
        if not others:
            return self
        parts = (self, *others)
        arrays = dict(self.arrays)
        for name in arrays.keys() - {"global_scale", "row_order"}:  # those of all of them
            arrays[name] = np.concatenate([part.arrays[name] for part in parts], axis=-1)
        codes = np.concatenate([part.codes for part in parts], axis=-1)
        return StoredWeight(self.spec, self.k, codes, arrays)

    def as_spec(self, spec: WeightSpec) -> "StoredWeight":
        """The same weight with a finer scale, one a column, or one a column of each block.

        Or with an order of its rows, which they are in.
        """
        if spec == self.spec:
            return self
        if spec.row_order and not self.spec.row_order:
            order = np.arange(self.k, dtype=np.int32)
            arrays = {**self.arrays, "row_order": order}
            return StoredWeight(spec, self.k, self.codes, arrays)
        n = self.codes.shape[-1]
        rows, columns = self.spec.block_size or (self.k, n)

        def spread(array: np.ndarray) -> np.ndarray:
            array = np.repeat(array, columns, axis=-1)[..., :n]
            size = spec.group_size
            if size is None:
                return array
            # It divides the rows of a block.
            return np.repeat(array, rows // size, axis=0)[: self.k // size]

        finer = {
            name: spread(self.arrays[name])
            for name in ("scale", "zero", "offset")
            if name in self.arrays
        }
        return StoredWeight(spec, self.k, self.codes, {**self.arrays, **finer})


def joined_spec(parts: Sequence[Linear]) -> WeightSpec | None:
    """How fdq holds linear layers joined along N: None where they have nothing in common."""
    first = parts[0].spec
    if len(parts) == 1:
        return first
    same = [(part.spec, part.whole, part.order) for part in parts]
    if any(one != same[0] for one in same):
        return None
    if first.granularity == "tensor":
        return dataclasses.replace(first, granularity="channel")
    if first.block_size is not None:
        rows, columns = first.block_size
        if any(part.shape[0] % columns for part in parts[:-1]):
            # A block would hold columns of two layers, each with a scale of its own. Groups must
            # divide K, which blocks need not.
            size = math.gcd(rows, parts[0].shape[1])
            return dataclasses.replace(first, granularity="group", group_size=size, block_size=None)
    return first
