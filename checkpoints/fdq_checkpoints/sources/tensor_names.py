"""Where each tensor of fdq's tree comes from in somebody else's checkpoint, as data (`Rule`s)."""

import dataclasses
import fnmatch
import functools
import itertools
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fdq.models.family import Layout, Rule
from fdq_checkpoints.errors import CheckpointError, nearest, shown
from fdq_checkpoints.readers.safetensors_reader import TensorInfo
from fdq_checkpoints.tree_paths import Path, dotted

# Tensors that a file may have and no model uses: multi-token prediction heads, and the rotary
# frequencies and causal masks that old exporters wrote out.
_BUFFERS = ("*rotary_emb.inv_freq", "*.self_attn.masked_bias", "*.self_attn.bias")
IGNORED = ("mtp*", "model.mtp*", "ernie.mtp*", "*.mtp_*", *_BUFFERS)
_COMPARE_ROWS_BYTES = 32 * 2**20


class Tensors(Protocol):
    """Tensors by name, as a `SourceDirectory` has them."""

    path: pathlib.Path
    config: dict[str, Any]
    config_name: str  # what says so, for errors
    tensors: dict[str, TensorInfo]

    def file_name(self, name: str) -> str:
        """The path of the file that holds a tensor."""
        ...

    has_rows: bool
    """Whether rows are read without the others."""

    def files_of(self, name: str) -> set[str]:
        """The paths of all files that a tensor is read from."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The whole tensor."""
        ...

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `[start, stop)` of the tensor's first dimension."""
        ...


@dataclasses.dataclass(frozen=True)
class Source:
    """How to assemble one target, a path in fdq's tree, from source tensors.

    `parts` has for each expert (or only one, if not `stacked` over experts along the first axis)
    the names joined along the last axis; `shape` is that of the whole target. A target of experts
    that is not `stacked` is one source tensor of all of them.
    """

    target: Path
    shape: tuple[int, ...]
    parts: tuple[tuple[str, ...], ...]
    stacked: bool
    layout: Layout

    def read(self, directory: Tensors, expert: int | None = None) -> np.ndarray:
        """The target, or one expert of it, exactly as stored; holds one source tensor besides.

        Parts may be stored in several dtypes: the result's holds every value of all of them.
        """
        dtype = self._dtype(directory)
        if self.stacked and expert is None:
            result = np.empty(self.shape, dtype)
            for index in range(len(self.parts)):
                result[index] = self.read(directory, index)
            return result
        names = self.parts[expert or 0 if self.stacked else 0]
        if len(names) == 1:
            if expert is None or self.stacked:
                stored = directory.read(names[0])
            else:
                stored = directory.read_rows(names[0], expert, expert + 1)[0]
            laid = laid_out(stored, self.layout)
            return laid if self.layout == "plus_one" else laid.astype(dtype, copy=False)
        result = np.empty(self.shape[1:] if self.stacked else self.shape, dtype)
        start = 0
        for name in names:
            part = laid_out(directory.read(name), self.layout)
            result[..., start : start + part.shape[-1]] = part
            start += part.shape[-1]
        return result

    def read_columns(
        self, directory: Tensors, expert: int | None, start: int, stop: int
    ) -> np.ndarray:
        """Columns of the target, or of one expert: rows of the parts, which are `transposed`.

        As they are stored: the array is a view in Fortran's order.
        """
        assert self.layout == "transposed"
        found, before = [], 0
        for name in self.parts[expert or 0]:
            rows = directory.tensors[name].shape[0]
            first, last = max(start - before, 0), min(stop - before, rows)
            if first < last:
                found.append(directory.read_rows(name, first, last))
            before += rows
        dtype = self._dtype(directory)
        parts = [part.astype(dtype, copy=False) for part in found]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts)).T

    def not_finite(self, directory: Tensors, expert: int | None) -> str | None:
        """Where the first NaN or infinity of the parts is, in words; None where all are finite."""
        # Where experts are one tensor, they are one part.
        one = self.parts[expert or 0 if self.stacked else 0]
        experts = self.parts if self.stacked and expert is None else (one,)
        for name in itertools.chain(*experts):
            found = directory.read(name)
            if not np.issubdtype(found.dtype, np.number) and found.dtype.kind != "V":
                continue
            finite = np.isfinite(found)
            if not finite.all():
                at = [int(i) for i in np.unravel_index(int(np.argmin(finite)), found.shape)]
                where = f"{directory.file_name(name)}: tensor {shown(name)}"
                return f"{where} holds {found[tuple(at)]} at {at}"
        return None

    def _dtype(self, directory: Tensors) -> np.dtype:
        return _exact_dtype(directory.tensors[name].dtype for part in self.parts for name in part)


def _exact_dtype(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The narrowest dtype that holds every value of some float dtypes: float32 of two of 16 bits.

    By NumPy and in pairs: JAX has no float64 unless `jax_enable_x64` is on, and NumPy no pair of
    bfloat16 and float16.
    """
    kinds = set(dtypes)
    if len(kinds) == 1:
        return kinds.pop()
    return functools.reduce(np.promote_types, kinds, np.dtype(np.float32))


def laid_out(array: np.ndarray, layout: Layout) -> np.ndarray:
    """A stored array in fdq's layout; all but `plus_one` keep its dtype."""
    if layout == "transposed":
        return np.ascontiguousarray(array.T)
    if layout == "interleaved":
        return np.concatenate([array[..., ::2], array[..., 1::2]], axis=-1)
    if layout == "plus_one":
        return array.astype(np.float32) + np.float32(1)
    return array.reshape(array.shape[1:]) if layout == "row" else array


def sources(
    directory: Tensors,
    rules: tuple[Rule, ...],
    targets: Mapping[Path, jax.ShapeDtypeStruct],
    *,
    qkv_widths: tuple[int, int, int],
    also_used: tuple[str, ...] = (),
    extra_layers: tuple[int, int] = (0, 0),
) -> dict[Path, Source]:
    """For each target of a model, where it comes from; `also_used` are expected besides.

    Layers of the file from the first of `extra_layers` to before the second are left out: they
    predict tokens further ahead. CheckpointError where a tensor is missing, unexpected, or has
    another shape or dtype.
    """
    result = {}
    used = set(also_used)
    for path, target in targets.items():
        rule, values = _rule(path, rules)
        stacked = any("{e}" in name for name in rule.names)
        parts = tuple(
            tuple(name.format(e=expert, **values) for name in rule.names)
            for expert in range(target.shape[0] if stacked else 1)
        )
        source = Source(path, tuple(target.shape), parts, stacked, rule.layout)
        widths = qkv_widths if rule.widths == "qkv" else None
        for names in source.parts:
            _check_parts(directory, source, names, widths)
            used.update(names)
        result[path] = source
    left = [name for name in directory.tensors if name not in used]
    left = [name for name in left if not _is_of_layers(name, *extra_layers)]
    unexpected = [
        name for name in left if not any(fnmatch.fnmatchcase(name, pattern) for pattern in IGNORED)
    ]
    if unexpected:
        name = unexpected[0]
        more = f" (and {len(unexpected) - 1} more)" if len(unexpected) > 1 else ""
        advice = "Check that they belong together."
        if all(name.startswith("v_head.") for name in unexpected):
            advice = "It is the value head of a training run: save the model without it."
        raise CheckpointError(
            f"{directory.file_name(name)}: tensor {shown(name)}{more} is not part of a "
            f"{directory.config.get('model_type')} model with this {directory.config_name}. "
            f"{advice}"
        )
    return result


def _is_of_layers(name: str, first: int, end: int) -> bool:
    found = re.match(r"model\.layers\.(\d{1,9})\.", name)
    return found is not None and first <= int(found[1]) < end


def check_tied_head(directory: Tensors, head: str, embedding: str) -> None:
    """A head in the file of a model that ties it to the embedding must be equal to it."""
    a, b = directory.tensors[head], directory.tensors[embedding]
    same = a.shape == b.shape
    if same:
        dtype = _exact_dtype((a.dtype, b.dtype))
        rows = max(1, _COMPARE_ROWS_BYTES // max(1, a.nbytes // a.shape[0]))
        for start in range(0, a.shape[0], rows):
            stop = min(start + rows, a.shape[0])
            one, other = (
                directory.read_rows(x, start, stop).astype(dtype, copy=False)
                for x in (head, embedding)
            )
            same &= np.array_equal(one.view(np.uint8), other.view(np.uint8))
    if not same:
        raise CheckpointError(
            f"{directory.file_name(head)}: tensor {shown(head)} differs from {shown(embedding)}, "
            "but config.json says tie_word_embeddings. Set it to false if the head is meant."
        )


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tensor of somebody's checkpoint as part of a target: the inverse of a `Source`.

    It has columns `[start, stop)` of the target, or of its `expert`; `pattern` is its name with
    `{i}` and `{e}` in place of the layer and the expert.
    """

    name: str
    pattern: str
    expert: int | None
    start: int
    stop: int
    layout: Layout

    def of(self, target: np.ndarray) -> np.ndarray:
        """The tensor as it is stored, of the target (or of its expert)."""
        return _stored(target[..., self.start : self.stop], self.layout)

    def shape(self, target: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of `of` a target (or expert) of a shape."""
        part = (*target[:-1], self.stop - self.start)
        return {"transposed": part[::-1], "row": (1, *part)}.get(self.layout, part)


def pieces(
    path: Path,
    shape: tuple[int, ...],
    rules: tuple[Rule, ...],
    *,
    qkv_widths: tuple[int, int, int],
) -> list[Piece]:
    """Where the target at `path`, of a `shape`, goes in a checkpoint of these rules, in order.

    CheckpointError where no rule is about it.
    """
    rule, values = _rule(path, rules)
    stacked = any("{e}" in name for name in rule.names)
    widths = qkv_widths if rule.widths == "qkv" else None
    shares = _shares(shape[-1], rule.names, widths)
    found = []
    for expert in range(shape[0]) if stacked else (None,):
        start = 0
        for pattern, width in zip(rule.names, shares, strict=True):
            name = pattern.format(e=expert, **values)
            found.append(Piece(name, pattern, expert, start, start + width, rule.layout))
            start += width
    return found


def _stored(array: np.ndarray, layout: Layout) -> np.ndarray:
    """The inverse of `laid_out`; keeps the dtype.

    What is read of `plus_one` in float32 is what was written, of scales that were read so. Others
    below 1/2 may have bits beyond those of 1, which are rounded off.
    """
    if layout == "transposed":
        return np.ascontiguousarray(array.T)
    if layout == "interleaved":
        halves = array.reshape(*array.shape[:-1], 2, array.shape[-1] // 2)
        return np.ascontiguousarray(halves.swapaxes(-1, -2)).reshape(array.shape)
    if layout == "plus_one":
        return (array.astype(np.float32) - np.float32(1)).astype(array.dtype)
    return array[None] if layout == "row" else np.ascontiguousarray(array)


def _shares(size: int, names: tuple[str, ...], widths: Sequence[int] | None) -> tuple[int, ...]:
    """How many columns of a target each of the tensors has that are joined to it."""
    if widths is None or len(names) == 1:
        return (size // len(names),) * len(names)
    return tuple(widths)


def _rule(path: Path, rules: tuple[Rule, ...]) -> tuple[Rule, dict[str, str]]:
    name = dotted(path)
    for rule in rules:
        pattern = re.escape(rule.target).replace(r"\{i\}", r"(?P<i>\d+)")
        if match := re.fullmatch(pattern, name):
            return rule, match.groupdict()
    raise CheckpointError(f"{name}: checkpoints of this family have no such tensor.")


def _renamed(name: str, tensors: Mapping[str, TensorInfo]) -> str:
    """What a missing tensor may be called, for errors: all names may have another beginning."""
    _, _, rest = name.partition(".")
    others = {known[: -len(name)] for known in tensors if known.endswith("." + name)}
    if len(others) == 1:
        return f" All names begin with {others.pop()!r}: save the model without that prefix."
    if rest in tensors and not any(known.startswith("model.") for known in tensors):
        return (
            " All names lack 'model.' at their beginning: save the model with its head, as "
            "AutoModelForCausalLM does."
        )
    return nearest(name, tensors)


def _check_parts(
    directory: Tensors, source: Source, names: tuple[str, ...], widths: Sequence[int] | None
) -> None:
    shape = source.shape[1:] if source.stacked else source.shape
    for name, width in zip(names, _shares(shape[-1], names, widths), strict=True):
        info = directory.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{directory.path}: tensor {shown(name)} is missing, which "
                f"{dotted(source.target)} needs.{_renamed(name, directory.tensors)}"
            )
        expected = (*shape[:-1], width)
        if source.layout == "transposed":
            expected = expected[::-1]
        elif source.layout == "row":
            expected = (1, *expected)
        if info.shape != expected:
            raise CheckpointError(
                f"{directory.file_name(name)}: tensor {shown(name)} has shape {info.shape}, "
                f"expected {expected} from {directory.config_name}."
            )
        if not jnp.issubdtype(info.dtype, jnp.floating) or info.dtype.itemsize < 2:
            raise CheckpointError(
                f"{directory.file_name(name)}: tensor {shown(name)} is {info.dtype}, expected "
                "floats of 16 bits or more. Already quantized checkpoints are not read here; use "
                "the original release."
            )
