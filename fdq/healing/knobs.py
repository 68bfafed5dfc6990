"""What healing may move in a quantized model, as offsets that an optimizer can take steps in.

A knob is an array of floats: a scale or offset inside of a `QTensor`, a norm, a router, a bias. It
is moved by a float32 offset, in units of its own size, so that one learning rate suits all:

    new = stored + rounding(old + offset * unit)        unit = |old| for scales, else its RMS

`rounding` is to what the checkpoint stores; derivatives go straight through it. With free codes a
weight has also an offset `[..., K, N]` in units of steps between levels, and its codes are the
levels nearest to what that gives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdq.formats import FORMATS, ScaledFormat, grouping, packing
from fdq.formats.qtensor import QTensor, QuantizedWeight
from fdq.nn.parameters import bind, split
from fdq.schemes.recipe import protected_word

KINDS = ("scales", "norms", "routers", "biases", "embeddings", "head")
"""What may be tuned; the last two are large, and tuned where they are asked for."""

DEFAULT = KINDS[:4]
CODES = "codes"
CODE_UNIT = 5.0
"""Steps between levels for an offset of 1: codes move when a weight has gone half a step."""

_WORDS = {"norm": "norms", "router": "routers", "embed": "embeddings", "lm_head": "head"}
_STEPPED = ("code_scale", "code_offset")  # of WINT2: they act through floor, without a derivative
_SMALLEST_UNIT = 1e-3  # of arrays that are zero, such as fresh biases

Offsets = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Knobs:
    """A model taken apart: `leaves` by path, and which of their arrays move (`units`, by name).

    The name of an array in a `QTensor` is its path and the array's name, that of free codes
    `path.codes`. All arrays are arguments of compiled functions, never constants.
    """

    template: Any
    treedef: Any
    paths: tuple[str, ...]
    leaves: tuple[Any, ...]
    units: Mapping[str, jax.Array]
    starts: Mapping[str, jax.Array]

    @classmethod
    def of(cls, model: nnx.Module, tuned: Collection[str] = DEFAULT, free: bool = False) -> Knobs:
        """Of a model whose weights are not prepared for a device.

        Raises:
          ValueError: `tuned` has an unknown kind, or names nothing that the model has; free codes
            of a format whose codes are not chosen one by one.
        """
        unknown = sorted(set(tuned) - set(KINDS))
        if unknown:
            raise ValueError(f"heal: unknown kinds {unknown}; there are {', '.join(KINDS)}.")
        template, params = split(model)
        flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_weight)
        paths = tuple(".".join(str(entry.key) for entry in keys) for keys, _ in flat)
        units: Offsets = {}
        starts: Offsets = {}
        for path, (_, leaf) in zip(paths, flat, strict=True):
            if not _is_weight(leaf):
                if jnp.issubdtype(leaf.dtype, jnp.floating) and kind_of(path, leaf) in tuned:
                    starts[path], units[path] = leaf, _root_mean_square(leaf)
                continue
            if "scales" in tuned:
                for name, array in leaf.arrays().items():
                    if _is_wide_float(array) and name not in _STEPPED:
                        starts[f"{path}.{name}"] = array
                        units[f"{path}.{name}"] = _unit(name, array, leaf)
            if free:
                starts[f"{path}.{CODES}"] = _levels(leaf, path)
                units[f"{path}.{CODES}"] = jnp.full((), CODE_UNIT, jnp.float32)
        if not any(_is_weight(leaf) for _, leaf in flat):
            raise ValueError("heal: the model has no quantized weights; fdq.quantize it first.")
        if not starts:
            raise ValueError(
                f"heal: the model has none of {', '.join(tuned)} in 16 bits or more, so there is "
                "nothing to tune."
            )
        return cls(template, treedef, paths, tuple(leaf for _, leaf in flat), units, starts)

    def zeros(self) -> Offsets:
        """Of every knob no change: float32, in order of names."""
        return {n: jnp.zeros(a.shape, jnp.float32) for n, a in sorted(self.starts.items())}

    def arrays(self) -> tuple[Any, ...]:
        """What `model` needs beside offsets, for compiled functions to take as an argument."""
        return self.leaves, dict(self.units), dict(self.starts)

    def model(self, offsets: Offsets, arrays: tuple[Any, ...], *, train: bool = True) -> Any:
        """The module with its knobs moved; for `train` activations are float32."""
        leaves, units, starts = arrays
        moved = [
            self._moved(path, leaf, offsets, units, starts, train)
            for path, leaf in zip(self.paths, leaves, strict=True)
        ]
        return bind(self.template, jax.tree.unflatten(self.treedef, moved))

    def _moved(
        self, path: str, leaf: Any, offsets: Offsets, units: Offsets, starts: Offsets, train: bool
    ) -> Any:
        def new(name: str, dtype: Any) -> jax.Array:
            old = starts[name].astype(jnp.float32)
            return _rounded(old + offsets[name] * units[name], dtype)

        if not _is_weight(leaf):
            if path not in starts:
                is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
                return leaf.astype(jnp.float32) if train and is_float else leaf
            w = new(path, leaf.dtype)
            return w if train else w.astype(leaf.dtype)
        names = [name for name in leaf.arrays() if f"{path}.{name}" in units and name != CODES]
        changes = {n: new(f"{path}.{n}", leaf.arrays()[n].dtype) for n in names}
        stored = {n: a.astype(leaf.arrays()[n].dtype) for n, a in changes.items()}
        q = leaf.replace(**stored)
        if f"{path}.{CODES}" not in starts:
            return q
        name = f"{path}.{CODES}"
        return _with_levels(q, starts[name] + offsets[name] * units[name], train)


def kind_of(path: str, leaf: Any) -> str | None:
    """Which of `KINDS` an array that is not quantized is; None for weights of layers."""
    word = protected_word(path)
    last = path.rpartition(".")[2]
    if word == "correction_bias" or last.endswith("bias") or last == "sinks":
        return "biases"
    if word in _WORDS:
        return _WORDS[word]
    return "norms" if leaf.ndim == 1 else None


def _is_weight(x: Any) -> bool:
    return isinstance(x, QuantizedWeight)


def _is_wide_float(array: Any) -> bool:
    """8-bit floats have too few steps to be tuned by small ones."""
    return jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize >= 2


def _root_mean_square(a: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.sqrt(jnp.mean(jnp.square(a.astype(jnp.float32)))), _SMALLEST_UNIT)


def _unit(name: str, array: jax.Array, q: QTensor) -> jax.Array:
    """Of an array of a `QTensor`: its own magnitudes; an offset's are those of the scale."""
    like = q.scale if name == "offset" and q.scale.shape == array.shape else array
    return jnp.abs(like.astype(jnp.float32))


def _rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """float32 rounded to what `dtype` holds, with the derivative of x."""
    kept = jax.lax.optimization_barrier(x.astype(dtype)).astype(jnp.float32)
    return x + jax.lax.stop_gradient(kept - x)


def _parts(q: QTensor) -> tuple[ScaledFormat, Any, Any, Any]:
    """The format, and multiplier, zero and offset as they meet `[..., K, N]`."""
    format = FORMATS[q.spec.format]
    assert isinstance(format, ScaledFormat)
    k, n = q.shape[-2:]

    def wide(a: Any) -> Any:
        return None if a is None else grouping.expand(a.astype(jnp.float32), q.spec, k, n)

    held = q.arrays()
    scale = wide(format.multiplier(held, q.spec))
    return format, scale, wide(held.get("zero")), wide(held.get("offset"))


def _levels(q: Any, path: str) -> jax.Array:
    """The levels `[..., K, N]` of the codes, float32."""
    if not isinstance(FORMATS[q.spec.format], ScaledFormat) or q.spec.row_order:
        raise ValueError(
            f"heal: {path}: codes of {q.spec.format} are not chosen one by one, so codes='free' "
            "cannot tune them. Use codes='fixed'."
        )
    format, _, zero, _ = _parts(q)
    return format.from_codes(packing.unpack(q.codes, format.bits, q.padding), q.spec, zero)


def _with_levels(q: QTensor, wanted: jax.Array, train: bool) -> Any:
    """The weight whose levels are nearest to `wanted`: decoded to `train`, else as a `QTensor`."""
    format, scale, zero, offset = _parts(q)
    levels = format.project(jax.lax.stop_gradient(wanted), q.spec, zero)
    if not train:
        return q.replace(codes=packing.pack(format.to_codes(levels, q.spec, zero), format.bits))
    levels = wanted + jax.lax.stop_gradient(levels - wanted)
    return levels * scale if offset is None else levels * scale + offset


def size(offsets: Offsets) -> int:
    """How many numbers are tuned."""
    return sum(int(np.prod(a.shape)) for a in offsets.values())
