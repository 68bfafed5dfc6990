"""Quantizing tensor by tensor while a source is read: what `load` and `convert` share.

At any time one source tensor (of a stack of experts, one expert), one float32 copy of it inside the
quantizer and one quantized result are in memory.
"""

import dataclasses
import functools
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
from fdq.quantizers.layer_inputs import LayerInputs
from fdq.schemes.assignment import Row, path_string
from fdq_checkpoints import tree_paths
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.sources import Source
from fdq_checkpoints.store import restore
from fdq_checkpoints.store.host_memory import Trimmer
from fdq_checkpoints.store.journal import Pieces
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
        if calibration is not None and not is_statistics(calibration):
            as_it_is = cls.of(source, None)
            put = place or _on_default_device
            values = {t.path: put(t) for t in as_it_is.tensors(progress=progress)}
            calibration = calibrate(tree_paths.fill(source.tree, values), calibration)
        assigned = Assigned.of(source.tree, scheme, compat=compat, method=method)
        inputs = LayerInputs.of(assigned.leaves, calibration=calibration)
        return cls(source, assigned.quantize(inputs), assigned, inputs)

    def tensors(
        self,
        *,
        progress: Progress | None = None,
        skip: frozenset[Path] = frozenset(),
        pieces: Pieces | None = None,
    ) -> Iterator[Tensor]:
        """Reads, quantizes or casts, and yields each tensor; stacks and plain arrays on the host.

        `pieces` keeps the parts of a stack in the making.

        CheckpointError if one holds NaN or infinity, or needs calibration.
        """
        tensors = tree_paths.flatten(self.tree)
        stored = self._stored
        total, done = sum(map(_float_bytes, tensors)), 0
        memory = Trimmer()
        for tensor in tensors:
            done += _float_bytes(tensor)
            if tensor.path in skip:
                continue
            if tensor.path in stored:
                # Or the next would be read and quantized beside it.
                value = jax.block_until_ready(self._made(tensor, pieces))
            elif isinstance(tensor.value, jax.ShapeDtypeStruct):
                raise CheckpointError(
                    f"{dotted(tensor.path)}: a static scale must be calibrated. Load the float "
                    "model, run fdq.calibrate, and pass what it returns as calibration=; or use a "
                    "dynamic scheme."
                )
            else:
                value = np.asarray(tensor.value)
            yield dataclasses.replace(tensor, value=value)
            del value
            memory.worked(_float_bytes(tensor))
            if progress is not None:
                progress(done, total, dotted(tensor.path))

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

    def _made(self, tensor: Tensor, pieces: Pieces | None) -> Any:
        quantized = isinstance(tensor.value, tree_paths.QUANTIZED)
        if self.assigned is not None and quantized:
            found = self.assigned.rows.get(path_string(tensor.path))
            if found is not None:
                return self._quantized(tensor, *found, pieces)
        value = self.source.read(tensor.path)
        if not quantized:
            if jnp.issubdtype(tensor.value.dtype, jax.dtypes.extended):
                return value  # a PRNG key
            return _cast(np.asarray(value), tensor.value.dtype, tensor.path)
        shape = tuple(tensor.value.shape)
        if not isinstance(value, QTensor) or (value.spec, value.shape) != (
            tensor.value.spec,
            shape,
        ):
            raise CheckpointError(
                f"{dotted(tensor.path)}: read as {value!r:.80}, expected {tensor.value!r:.80}."
            )
        return value

    def _quantized(self, tensor: Tensor, row: Row, paths: list[str], pieces: Pieces | None) -> Any:
        assigned, target = self.assigned, tensor.value
        assert assigned is not None

        def quantized(index: int | None) -> Any:
            array = np.asarray(self.source.read(tensor.path, index))
            if array.dtype == np.float64:  # JAX would cut it to 32 bits, and make infinity of 1e39
                array = _cast(array, np.float32, tensor.path)
            return assigned.tensor(array, row, paths, inputs=self.inputs, index=index)

        if row.fold is not None:
            return quantized(None)
        if tuple(self._stored[tensor.path].shape) != tuple(target.shape):
            # What multiplies it sees it with its axes folded, so it has no slices to go by.
            whole = self.source.read(tensor.path)
            fold = self._folds.get(path_string(tensor.path))
            folded = whole if fold is None else fold(whole)
            return assigned.tensor(folded, row, paths, inputs=self.inputs)
        if target.ndim == 2:
            return quantized(None)
        arrays: dict[str, np.ndarray]
        if pieces is None:
            empty = target.arrays().items()
            arrays, start = {name: np.empty(a.shape, a.dtype) for name, a in empty}, 0
        else:
            arrays, start = pieces.begun(tensor)
        for index in range(start, target.shape[0]):
            for name, array in quantized(index).arrays().items():
                arrays[name][index] = np.asarray(array)
            if pieces is not None:
                pieces.made(tensor, arrays, index + 1)
        return target.replace(**arrays)


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
    flat = array.reshape(-1)
    for start in range(0, flat.size, _FINITE_CHECK_ELEMENTS):
        finite = np.isfinite(flat[start : start + _FINITE_CHECK_ELEMENTS])
        if not finite.all():
            return list(map(int, np.unravel_index(start + int(np.argmin(finite)), array.shape)))
    return None


def _float_bytes(tensor: Tensor) -> int:
    return 2 * int(np.prod(tensor.value.shape, dtype=np.int64))
