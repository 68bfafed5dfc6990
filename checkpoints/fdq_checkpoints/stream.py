"""Quantizing tensor by tensor while a source is read: what `load` and `convert` share.

At any time one source tensor (of a stack of experts, one expert), one float32 copy of it inside the
quantizer and one quantized result are in memory.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdq.calibration.observation import calibrate
from fdq.calibration.statistics import Calibration
from fdq.formats.qtensor import QTensor
from fdq.nn.general import Fold
from fdq.quantizers import modules
from fdq.quantizers.assigned import Assigned
from fdq.quantizers.layer_inputs import LayerInputs, moments_for
from fdq.quantizers.quantizer import pick
from fdq.quantizers.weight import largest_magnitude, on_device
from fdq.schemes.assignment import Row, path_string
from fdq_checkpoints import slabs, tree_paths
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.sources import Source
from fdq_checkpoints.store import restore
from fdq_checkpoints.store.host_memory import Trimmer
from fdq_checkpoints.store.journal import Pieces, columns_of
from fdq_checkpoints.tree_paths import Path, Tensor, dotted

_FINITE_CHECK_ELEMENTS = 2**24

Progress = Callable[[int, int, str], None]
"""Called after each tensor with (bytes read so far, bytes in all, path)."""


MODEL_DTYPES = ("float32", "bfloat16", "float16")


def check_dtype(dtype: Any) -> None:
    """Raises ValueError unless `dtype` is None or a dtype that models compute in."""
    try:
        known = dtype is None or jnp.dtype(dtype).name in MODEL_DTYPES
    except TypeError:
        known = False
    if not known:
        raise ValueError(f"dtype (={dtype!r}) must be one of {', '.join(MODEL_DTYPES)}.")


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be made of an open source; `assigned` is None where all stays as it is.

    `tree` is abstract, as the source's but with a QTensor where one is to be made. Scales that
    calibration gave are there already.
    """

    source: Source
    tree: Any
    assigned: Assigned | None
    inputs: LayerInputs

    @classmethod
    def of(
        cls,
        source: Source,
        scheme: Any,
        *,
        method: str | None = None,
        compat: str | None = None,
        calibration: Any = None,
        progress: Progress | None = None,
        place: Callable[[Tensor], Any] | None = None,
    ) -> "Job":
        """Matches a source with a scheme, as `fdq.quantize` does with a model; None keeps all.

        Where `calibration` is sample tokens, the model is in memory as a whole while it runs over
        them, on the devices where `place` puts its tensors (by default the default device).
        """
        if scheme is None:
            return cls(source, source.tree, None, LayerInputs())
        source = source.decoded()
        assigned = Assigned.of(source.tree, scheme, compat=compat, method=method)
        if calibration is not None and not is_statistics(calibration):
            as_it_is = cls.of(source, None)
            put = place or _on_default_device
            values = {t.path: put(t) for t in as_it_is.tensors(progress=progress)}
            wanted = moments_for(assigned.recipe, method)
            wanted["moments_of"] = assigned.rows.__contains__
            calibration = calibrate(tree_paths.fill(source.tree, values), calibration, **wanted)
        for row in assigned.table.quantized:
            if row.scheme is not None and row.scheme.weight and row.scheme.weight.row_order:
                raise ValueError(
                    f"{row.path}: {row.scheme} says that rows are in an order which came with the "
                    "codes. Quantizers choose none: leave out -rows."
                )
        inputs = LayerInputs.of(assigned.leaves, calibration=calibration)
        return cls(source, assigned.quantize(inputs), assigned, inputs)

    def tensors(
        self,
        *,
        progress: Progress | None = None,
        skip: frozenset[Path] = frozenset(),
        pieces: Pieces | None = None,
        before: Callable[[Tensor], None] | None = None,
    ) -> Iterator[Tensor]:
        """Reads, quantizes or casts, and yields each tensor; stacks and plain arrays on the host.

        `pieces` keeps the parts of a tensor in the making; `before` is told of a tensor that is put
        together of parts before memory is taken for it.

        CheckpointError if one holds NaN or infinity, or needs calibration.
        """
        tensors = tree_paths.flatten(self.tree)
        sizes = itertools.accumulate(map(_float_bytes, tensors))
        done = {tensor.path: size for tensor, size in zip(tensors, sizes, strict=True)}
        total = max(done.values(), default=0)
        memory = Trimmer()
        wanted = [tensor for tensor in tensors if tensor.path not in skip]
        workers = None if self.source.concurrent else 1
        arrays: dict[str, np.ndarray] = {}
        tick = (lambda: None) if pieces is None else pieces.tick
        tasks = self._tasks(wanted, pieces)
        for tensor, part, value in slabs.in_order(tasks, workers=workers, tick=tick):
            if part is not None:
                if not arrays:
                    if before is not None:
                        before(tensor)
                        memory.worked(_float_bytes(tensor))  # what it wrote is free now
                    arrays = self._begun(tensor, pieces)
                part.put(value, arrays, tensor.value.shape[-1])
                if pieces is not None:
                    pieces.made(tensor, arrays, part.columns(tensor.value.shape[-1]))
                if not part.ends_tensor:
                    continue
                value, arrays = tree_paths.with_arrays(tensor.value, arrays), {}
            yield dataclasses.replace(tensor, value=value)
            del value
            memory.worked(_float_bytes(tensor))
            if progress is not None:
                progress(done[tensor.path], total, dotted(tensor.path))

    def _begun(self, tensor: Tensor, pieces: Pieces | None) -> dict[str, np.ndarray]:
        if pieces is not None:
            return pieces.begun(tensor)
        empty = tree_paths.arrays_of(tensor.value).items()
        return {name: np.empty(array.shape, array.dtype) for name, array in empty}

    def _tasks(self, tensors: list[Tensor], pieces: Pieces | None) -> Iterator[slabs.Task]:
        """What makes the tensors: each gives the tensor, which part of it, and that.

        A part that is None is the whole.
        """
        for tensor in tensors:
            start = 0 if pieces is None else pieces.start_of(tensor)
            if pieces is not None and start == columns_of(tensor.value.shape):
                size = _float_bytes(tensor)
                yield slabs.Task(functools.partial(_read, tensor, pieces), size, size)
                continue
            n = tensor.value.shape[-1] if tensor.value.shape else 1
            parts = [part for part in self._parts(tensor) if part.columns(n) > start]
            for part in parts or [None]:
                shape = tensor.value.shape if part is None else part.shape
                size = int(np.prod(shape, dtype=np.int64))
                result = size if isinstance(tensor.value, tree_paths.QUANTIZED) else 4 * size
                # As stored, and in float32.
                held = 6 * size + self._statistics_bytes(tensor)
                yield slabs.Task(functools.partial(self._done, tensor, part), held, result)

    def _done(self, tensor: Tensor, part: "_Part | None") -> tuple[Tensor, "_Part | None", Any]:
        index = None if part is None else part.index
        try:
            if part is None:
                # Or the next would be read and quantized beside it.
                return tensor, part, jax.block_until_ready(self._whole(tensor))
            if self._row(tensor) is None:
                return tensor, part, {"value": self._turned(tensor, part)}
            q = jax.block_until_ready(self._quantized(tensor, part))
            return tensor, part, {name: np.asarray(array) for name, array in q.arrays().items()}
        except ValueError as error:
            known = tensor.path in self._stored
            place = self.source.not_finite(tensor.path, index) if known else None
            if place is None:
                if part is not None and self._row(tensor) is None:
                    self._whole(tensor)  # for the position in the whole
                raise
            raise CheckpointError(
                f"{place} ({dotted(tensor.path)}). Expected finite weights: download the file "
                "again, or ask whoever made it."
            ) from error

    def _statistics_bytes(self, tensor: Tensor) -> int:
        """What a quantizer makes of second moments: a few matrices as large, in float32."""
        found = self._row(tensor)
        if found is None or self.assigned is None:
            return 0
        spec = found[0].scheme and found[0].scheme.weight
        name = found[0].quantizer or self.assigned.method
        if spec is None or name is None:
            return 0
        sizes = {"input_moment": tensor.value.shape[-2], "output_moment": tensor.value.shape[-1]}
        wanted = pick(spec, name, found[0].path).statistics
        return sum(24 * sizes[one] ** 2 for one in wanted if one in sizes)

    def _row(self, tensor: Tensor) -> tuple[Row, list[str]] | None:
        if self.assigned is None or not isinstance(tensor.value, tree_paths.QUANTIZED):
            return None
        return self.assigned.rows.get(path_string(tensor.path))

    def _parts(self, tensor: Tensor) -> list["_Part"]:
        """Its matrices, or slabs of their columns, where it can be made of them; else none."""
        row, target = self._row(tensor), tensor.value
        if tensor.path not in self._stored:
            return []
        if row is None:
            if isinstance(target, tree_paths.QUANTIZED) or len(target.shape) != 2:
                return []
            if not self.source.has_columns(tensor.path):
                return []
        elif row[0].fold is not None:
            return []
        if tuple(self._stored[tensor.path].shape) != tuple(target.shape) or target.ndim > 3:
            # What multiplies it sees it with its axes folded, so it has no slices to go by.
            return []
        k, n = target.shape[-2:]
        ranges, by_columns = [(0, n)], self.source.has_columns(tensor.path)
        if by_columns and (row is None or self._columns_apart(row[0])):
            ranges = slabs.columns(k, n)
        indices = [None] if target.ndim == 2 else list(range(target.shape[0]))
        if len(indices) == len(ranges) == 1 and not by_columns:
            return []
        return [
            _Part(index, (k, stop - start), start, stop, (stop, index) == (n, indices[-1]))
            for index in indices
            for start, stop in ranges
        ]

    def _columns_apart(self, row: Row) -> bool:
        assert self.assigned is not None
        return self.assigned.columns_apart(row)

    def value(self, tensor: Tensor) -> Any:
        """One of the tensors of `tree`, with its values, on the host."""
        return self._done(tensor, None)[2]

    @functools.cached_property
    def _stored(self) -> dict[Path, Any]:
        return {tensor.path: tensor.value for tensor in tree_paths.flatten(self.source.tree)}

    @functools.cached_property
    def _folds(self) -> dict[str, Fold]:
        """How layers of somebody's module see their kernels as matrices."""
        if not isinstance(self.source.tree, nnx.Module):
            return {}
        return {
            use.path: role.fold
            for tensor in modules.collect(self.source.tree)
            for use in tensor.uses
            if isinstance(role := modules.role_of(use), modules.Role)
        }

    def _whole(self, tensor: Tensor) -> Any:
        """A tensor as it is to be, at once."""
        stored = self._stored.get(tensor.path)
        if stored is None:
            if isinstance(tensor.value, jax.ShapeDtypeStruct):
                raise CheckpointError(
                    f"{dotted(tensor.path)}: a static scale must be calibrated. Load the float "
                    "model, run fdq.calibrate, and pass what it returns as calibration=; or use a "
                    "dynamic scheme."
                )
            return np.asarray(tensor.value)
        if (found := self._row(tensor)) is not None:
            value = self._wide(self.source.read(tensor.path), tensor.path)
            if found[0].fold is None and tuple(stored.shape) != tuple(tensor.value.shape):
                fold = self._folds.get(path_string(tensor.path))
                value = value if fold is None else fold(value)
            assert self.assigned is not None
            return self.assigned.tensor(value, *found, inputs=self.inputs)
        value = self.source.read(tensor.path)
        if not isinstance(tensor.value, tree_paths.QUANTIZED):
            if jnp.issubdtype(tensor.value.dtype, jax.dtypes.extended):
                return value  # a PRNG key
            return _cast(np.asarray(value), tensor.value.dtype, tensor.path)
        wanted = (tensor.value.spec, tuple(tensor.value.shape))
        if not isinstance(value, QTensor) or (value.spec, value.shape) != wanted:
            raise CheckpointError(
                f"{dotted(tensor.path)}: read as {value!r:.80}, expected {tensor.value!r:.80}."
            )
        return value

    def _quantized(self, tensor: Tensor, part: "_Part") -> Any:
        found = self._row(tensor)
        assert self.assigned is not None and found is not None
        if self.source.has_columns(tensor.path):
            array = self.source.read_columns(tensor.path, part.index, part.start, part.stop)
        else:
            array = self.source.read(tensor.path, part.index)
        array = self._wide(array, tensor.path)
        return self.assigned.tensor(array, *found, inputs=self.inputs, index=part.index)

    def _turned(self, tensor: Tensor, part: "_Part") -> np.ndarray:
        """Columns of a tensor that stays one of floats, row by row: by XLA, as NumPy is slow."""
        stored = self.source.read_columns(tensor.path, part.index, part.start, part.stop)
        array = _cast(stored, tensor.value.dtype, tensor.path)
        if array.dtype.itemsize > 4:  # JAX would cut it to 32 bits
            return array
        return np.asarray(on_device(array))

    def _wide(self, value: Any, path: Path) -> np.ndarray:
        array = np.asarray(value)
        if array.dtype == np.float64:  # JAX would cut it to 32 bits, and make infinity of 1e39
            array = _cast(array, np.float32, path)
        return array


@dataclasses.dataclass(frozen=True)
class _Part:
    """Columns `[start, stop)` of one matrix (that of `index` in a stack), `shape` its own."""

    index: int | None
    shape: tuple[int, int]
    start: int
    stop: int
    ends_tensor: bool

    def columns(self, n: int) -> int:
        """How many columns of the tensor are made with it, of `n` a matrix."""
        return (self.index or 0) * n + self.stop

    def put(self, made: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray], n: int) -> None:
        """Its arrays to their place in those of the tensor, whose last axis is `n` or blocks."""
        for name, array in made.items():
            whole = arrays[name] if self.index is None else arrays[name][self.index]
            # Scales of blocks are fewer than columns, and a slab begins where a block does.
            start = self.start * whole.shape[-1] // n if self.start else 0
            whole[..., start : start + array.shape[-1]] = array


def is_statistics(calibration: Any) -> bool:
    """Whether this is what `fdq.quantize` takes, and not sample tokens."""
    return isinstance(calibration, Calibration | Mapping)


def _on_default_device(tensor: Tensor) -> Any:
    return tree_paths.map_arrays(lambda _, array: restore.put(array, None), tensor)


def _cast(array: np.ndarray, dtype: Any, path: Path) -> np.ndarray:
    """The array in another dtype; CheckpointError unless it is finite before and after."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return array.astype(dtype, copy=False)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise CheckpointError(
            f"{dotted(path)}: stored as {array.dtype}, expected floats. Integers are codes whose "
            "scales are elsewhere; use the float original."
        )
    if (position := _not_finite(array)) is not None:
        raise CheckpointError(
            f"{dotted(path)}: NaN or infinity, first at {position}. Expected finite weights; "
            "check the checkpoint that they come from."
        )
    with np.errstate(over="ignore"):  # looked for below
        result = array.astype(dtype, copy=False)
    if result is not array and (position := _not_finite(result)) is not None:
        wider = "bfloat16" if dtype == jnp.float16 else "float32"
        raise CheckpointError(
            f"{dotted(path)}: {array[tuple(position)]} at {position} is beyond the range of "
            f"{jnp.dtype(dtype).name}. Use dtype='{wider}'."
        )
    return result


def _not_finite(array: np.ndarray) -> list[int] | None:
    """Where the first NaN or infinity is; looks at a piece at a time, for its memory."""
    if array.dtype.itemsize in (2, 4) and np.isfinite(largest_magnitude(array)):
        return None
    flat = array.reshape(-1)
    for start in range(0, flat.size, _FINITE_CHECK_ELEMENTS):
        finite = np.isfinite(flat[start : start + _FINITE_CHECK_ELEMENTS])
        if not finite.all():
            return list(map(int, np.unravel_index(start + int(np.argmin(finite)), array.shape)))
    return None


def _read(tensor: Tensor, pieces: Pieces) -> tuple[Tensor, None, Any]:
    """What an earlier process made whole."""
    return tensor, None, tree_paths.with_arrays(tensor.value, pieces.begun(tensor))


def _float_bytes(tensor: Tensor) -> int:
    return 2 * int(np.prod(tensor.value.shape, dtype=np.int64))
