"""Layouts that devices want, and ``prepare``, which puts weights into them.

GPUs want ``mosaic_gpu``, the words that the kernels of ``pallas_kernels`` read. CPUs may want
``transposed``, int8 codes as ``[N, K]`` with everything else as in a checkpoint. On
CPUs with matrix units (AMX) an int8 dot whose weight is ``[N, K]`` is the fastest way to read it:
0.7 ms at 4096 x 4096 against 1.1 ms for the element-wise fusion over ``[K, N]``. On CPUs without
them it is the slower of the two (AMD Zen 4: 3.0 ms against 2.4 ms), and ``prepare`` changes
nothing.
"""

from __future__ import annotations

import collections
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from fdq.formats.qtensor import LAYOUTS, Layout, QTensor, canonical, materialize
from fdq.ops.implementation import requested
from fdq.ops.kernel_layout import MOSAIC_GPU, layout_obstacle

_SPLITS = 3
# 127 * 2 * 127: a part is rounded to 1/127 of the one before, and the remainder is half a step.
_STEP = 254.0


def _swap_codes(q: QTensor, layout: str) -> QTensor:
    codes = q.codes
    if isinstance(codes, jax.ShapeDtypeStruct):
        swapped: Any = jax.eval_shape(lambda a: jnp.swapaxes(a, -1, -2), codes)
    else:
        swapped = jnp.swapaxes(codes, -1, -2)
    return q.replace(codes=swapped, layout=layout)


def _transposed_shape(q: QTensor) -> tuple[int, ...]:
    *lead, n, k = q.codes.shape
    return (*lead, k, n)


LAYOUTS["transposed"] = Layout(
    shape=_transposed_shape,
    to_canonical=lambda q: _swap_codes(materialize(q), "canonical"),
    from_canonical=lambda q: _swap_codes(materialize(q), "transposed"),
)


def best_layout(q: QTensor, platform: str) -> str:
    """The layout in which ``matmul`` is fastest for this weight on ``platform``.

    ``FDQ_IMPLEMENTATION`` counts here as it does in ops: with ``mosaic_gpu`` the kernels' layout is
    the best on every platform, with ``xla`` on none.
    """
    spec = q.spec
    wanted = requested()
    if wanted is None:
        # With several devices XLA runs, which would have to undo the kernels' layout in every step.
        kernels = platform in ("gpu", "cuda") and _devices(platform) <= 1
        wanted = MOSAIC_GPU if kernels else "xla"
    if wanted == MOSAIC_GPU and q.ndim <= 3 and layout_obstacle(q) is None:
        return MOSAIC_GPU
    plain = spec.format == "int8" and spec.granularity in ("channel", "tensor")
    # Stacked weights (experts, layers) are sliced first: they stay as they are.
    plain = plain and spec.zero_point == "none" and q.ndim == 2
    if plain and platform == "cpu" and _has_matrix_units():
        return "transposed"
    return "canonical"


def _devices(platform: str) -> int:
    """Devices of a platform on this machine; 0 where they are elsewhere."""
    try:
        return len(jax.devices(platform))
    except RuntimeError:
        return 0


@functools.cache
def _has_matrix_units() -> bool:
    """Whether this machine's CPU multiplies int8 tiles (Intel AMX)."""
    try:
        return "amx_int8" in pathlib.Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:  # not Linux
        return False


def prepare(tree: Any, device: Any = None) -> Any:
    """A copy of ``tree`` whose QTensors are laid out for ``device``; ``unprepare`` undoes it.

    Results of ``fdq.matmul`` stay the same to float32 rounding. Do it once, before decoding:
    checkpoints hold the canonical layout only.

    Args:
      tree: a QTensor, any pytree that holds some, or a Flax NNX module.
      device: a ``jax.Device`` or a platform's name; the default device if None.
    """
    if device is None:
        device = jax.devices()[0]
    platform = device if isinstance(device, str) else device.platform
    return _map_qtensors(tree, lambda q: _to_layout(q, best_layout(q, platform)))


def prepare_in_place(module: nnx.Module) -> None:
    """``prepare`` of a module that nobody else holds: a weight at a time takes the old one's place.

    So a model whose weights fill more than half of the device's memory can be prepared.
    """
    platform = jax.devices()[0].platform
    modules = [one for _, one in nnx.iter_modules(module)]
    uses = collections.Counter(
        id(value.codes)
        for one in modules
        for value in vars(one).values()
        if isinstance(value, QTensor)
    )
    shared: dict[int, tuple[QTensor, QTensor]] = {}  # the old ones too, so that ids stay theirs
    for one in modules:
        for name, value in list(vars(one).items()):
            if not isinstance(value, QTensor):
                continue
            key = id(value.codes)
            if key in shared:
                setattr(one, name, shared[key][1])
                continue
            new = _to_layout(value, best_layout(value, platform))
            if uses[key] > 1:
                shared[key] = value, new
            setattr(one, name, new)
            del value
            jax.block_until_ready(jax.tree.leaves(new))


def unprepare(tree: Any) -> Any:
    """The inverse of ``prepare``: every QTensor in the canonical layout of checkpoints."""
    return _map_qtensors(tree, lambda q: _to_layout(q, "canonical"))


def _to_layout(q: QTensor, layout: str) -> QTensor:
    if q.layout == layout:
        return q
    raw = canonical(q)
    new = raw if layout == "canonical" else LAYOUTS[layout].from_canonical(raw)
    old = q.arrays()
    if not any(isinstance(v, nnx.Variable) for v in old.values()):
        return new
    # Layouts differ in which fields they use: a field that is new is a Variable like the others.
    variable = old.get("scale", old["codes"])
    rewrapped = {n: old.get(n, variable).replace(a) for n, a in new.arrays().items()}
    return new.replace(**rewrapped)


def _map_qtensors(tree: Any, change: Callable[[QTensor], QTensor]) -> Any:
    changed: dict[int, QTensor] = {}

    def visit(leaf: Any) -> Any:
        if not isinstance(leaf, QTensor):
            return leaf
        # A shared QTensor is changed once; inside modules its Variables are what is shared.
        if id(leaf.codes) not in changed:
            changed[id(leaf.codes)] = change(leaf)
        return changed[id(leaf.codes)]

    if not isinstance(tree, nnx.Module):
        return jax.tree.map(visit, tree, is_leaf=lambda a: isinstance(a, QTensor | nnx.Variable))
    # New modules and Variables around the same arrays, shared where they were.
    copy = nnx.merge(*nnx.split(tree), copy=True)
    for _, module in nnx.iter_modules(copy):
        for name, attribute in list(vars(module).items()):
            if isinstance(attribute, QTensor):
                setattr(module, name, visit(attribute))
    return copy


def transposed_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """int8 ``x [M, K]`` times ``w [N, K]`` over K -> int32 ``[M, N]``.

    The weight is the left operand: the right one is repacked by the CPU's matrix kernels, and x is
    the small one. Rows are padded to two (see ``padded_integer_dot``).
    """
    m = x.shape[0]
    if m == 1:
        x = jnp.concatenate([x, jnp.zeros_like(x)], axis=0)
    y = lax.dot_general(w, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return y[:, :m].T


def transposed_integer_product(x: jax.Array, q: QTensor) -> jax.Array:
    """int8 rows ``[M, K]`` times a transposed int8 weight -> float32 ``[M, N]``: int32, scaled."""
    return transposed_dot(x, q.codes).astype(jnp.float32) * q.scale.astype(jnp.float32)


def transposed_split_product(x: jax.Array, q: QTensor) -> jax.Array:
    """Float rows ``[M, K]`` times a transposed int8 weight -> float32 ``[M, N]``.

    A row of x is split into three int8 rows, ``x = step * (a + b / 254 + c / 254^2)`` with
    ``step = max|x| / 127``, so that 8-bit dots do the work and the sums are exact. What is cut off
    is at most ``max|x| * 2^-24``, half a unit in the last place of the row's largest element.
    """
    m = x.shape[0]
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    largest = jnp.where(largest == 0, jnp.float32(1), largest)
    rest = x / largest * jnp.float32(127)
    parts = []
    for _ in range(_SPLITS):
        part = jnp.round(rest)
        parts.append(part)
        rest = (rest - part) * jnp.float32(_STEP)
    sums = transposed_dot(jnp.concatenate(parts, axis=0).astype(jnp.int8), q.codes)
    sums = sums.astype(jnp.float32)
    y = sums[2 * m :] / jnp.float32(_STEP)
    y = (y + sums[m : 2 * m]) / jnp.float32(_STEP) + sums[:m]
    return y * (largest / jnp.float32(127)) * q.scale.astype(jnp.float32)
