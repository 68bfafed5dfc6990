"""`prepare`, which puts weights into the layout that a device wants, and `unprepare`."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from fdq.formats.qtensor import QScale, QuantizedWeight, materialize
from fdq.ops.choice import cpu_class
from fdq.ops.implementation import requested
from fdq.ops.interleaved_weight import InterleavedWeight
from fdq.ops.kernels import MOSAIC_GPU
from fdq.ops.placement import devices
from fdq.ops.prepared_weight import PreparedWeight, TransposedWeight, WordsWeight


def best_layout(w: QuantizedWeight, platform: str) -> type[PreparedWeight] | None:
    """What `matmul` multiplies fastest with on `platform`; None for the weight as it is.

    FDQ_IMPLEMENTATION counts as it does in ops: with `mosaic_gpu` the kernels' layout is the best
    on every platform, with `xla` on none. Kernels read weights of one device: others stay.
    """
    if isinstance(w, InterleavedWeight):  # decided by the module that it is in
        return InterleavedWeight
    wanted = requested()
    if wanted is None and platform in ("gpu", "cuda") and devices(w) <= 1:
        wanted = MOSAIC_GPU
    if wanted == MOSAIC_GPU and w.ndim <= 3 and WordsWeight.unsupported(w) is None:
        return WordsWeight
    # Stacked weights (experts, layers) are sliced first: they stay as they are.
    plain = w.ndim == 2 and TransposedWeight.unsupported(w) is None
    return TransposedWeight if plain and platform == "cpu" and cpu_class() == "amx" else None


def prepare(tree: Any, device: Any = None) -> Any:
    """A copy of `tree` whose QTensors are laid out for `device`; `unprepare` undoes it.

    Results of `fdq.matmul` stay the same to float32 rounding. Do it once, before decoding:
    checkpoints hold the canonical layout only.

    Args:
      tree: a QTensor, any pytree that holds some, or a Flax NNX module.
      device: a `jax.Device` or a platform's name; the default device if None.
    """
    if getattr(tree, "placement", None) is not None:
        raise ValueError(
            "prepare: the model is on a mesh. fdq.load(path, mesh=mesh) prepares what each device "
            "has, and fdq.sharding.prepare(model) does it in place."
        )
    if device is None:
        device = jax.devices()[0]
    platform = device if isinstance(device, str) else device.platform
    return _map_weights(tree, lambda q: _changed(q, best_layout(q, platform)))


def prepare_in_place(module: nnx.Module) -> None:
    """`prepare` of a module that nobody else holds: a weight at a time takes the old one's place.

    So a model whose weights fill more than half of the device's memory can be prepared.
    """
    platform = jax.devices()[0].platform
    _change_module(module, lambda q: jax.block_until_ready(_changed(q, best_layout(q, platform))))


def unprepare(tree: Any) -> Any:
    """The inverse of `prepare`: every QTensor in the canonical layout of checkpoints."""
    if getattr(tree, "placement", None) is not None:
        raise ValueError(
            "unprepare: the model is on a mesh, where each device has parts of weights. "
            "fdq.unshard(model) has them whole, as checkpoints do."
        )
    return _map_weights(tree, lambda q: _changed(q, None))


def _changed(w: QuantizedWeight, kind: type[PreparedWeight] | None) -> QuantizedWeight:
    """A weight as a `kind`; None is the layout of checkpoints."""
    if (kind is None and w.layout == "canonical") or type(w) is kind:
        return w
    raw = materialize(w)
    new = raw.canonical() if kind is None else kind.of(raw)
    boxes = [box for box in w.arrays().values() if isinstance(box, nnx.Variable)]
    if not boxes:
        return new
    codes = boxes[0].replace  # keeps the metadata of what the module held
    return new.replace(
        **{n: (codes if n in ("codes", "data") else QScale)(a) for n, a in new.arrays().items()}
    )


def _identity(w: QuantizedWeight) -> int:
    """Of what holds its arrays: inside modules Variables are what is shared."""
    return id(next(iter(w.arrays().values())))


def _change_module(module: nnx.Module, change: Callable[[QuantizedWeight], Any]) -> None:
    held = [
        (one, name)
        for _, one in nnx.iter_modules(module)
        for name, attribute in vars(one).items()
        if isinstance(attribute, QuantizedWeight)
    ]
    uses = collections.Counter(_identity(getattr(one, name)) for one, name in held)
    # The old ones too, so that ids stay theirs.
    shared: dict[int, tuple[QuantizedWeight, QuantizedWeight]] = {}
    for one, name in held:
        old = getattr(one, name)
        key = _identity(old)
        new = shared[key][1] if key in shared else change(old)
        if uses[key] > 1:
            shared[key] = old, new
        setattr(one, name, new)


def _map_weights(tree: Any, change: Callable[[QuantizedWeight], Any]) -> Any:
    if isinstance(tree, nnx.Module):
        # New modules and Variables around the same arrays, shared where they were.
        copy = nnx.merge(*nnx.split(tree), copy=True)
        _change_module(copy, change)
        return copy
    changed: dict[int, QuantizedWeight] = {}

    def visit(leaf: Any) -> Any:
        if not isinstance(leaf, QuantizedWeight):
            return leaf
        if _identity(leaf) not in changed:
            changed[_identity(leaf)] = change(leaf)
        return changed[_identity(leaf)]

    is_leaf = (QuantizedWeight, nnx.Variable)
    return jax.tree.map(visit, tree, is_leaf=lambda a: isinstance(a, is_leaf))
