"""Quantized stand-ins for Flax's own ``nnx.Linear``, ``nnx.LinearGeneral`` and ``nnx.Einsum``.

Each keeps what its source promised: the attributes, the axes, the bias, and the dtype that
``promote_dtype`` gives to inputs, kernel and bias. The kernel is a ``QTensor`` of the folded weight
``[..., K, N]`` (contracted axes first, each group flattened); leading axes are those of layers
stacked by ``nnx.scan`` or ``nnx.vmap``. ``precision`` is kept and not used: quantized weights are
multiplied in float32 or in the activations' integers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from fdq.nn.parameters import value
from fdq.ops.matmul.api import matmul
from fdq.schemes.fold import Fold
from fdq.schemes.scheme import ActivationSpec


@dataclasses.dataclass(frozen=True)
class Equation:
    """An einsum of an input and a kernel as one matrix product.

    Axes are one letter or ``...`` each; those of the kernel are contracted or new: features.
    """

    inputs: tuple[str, ...]
    output: tuple[str, ...]
    contracted: tuple[str, ...]
    features: tuple[str, ...]
    fold: Fold

    @classmethod
    def parse(cls, text: str) -> Equation | str:
        """The equation of ``"nta,hab->nthb"``, or why it is no plain matrix product."""
        found = re.fullmatch(r"([^,]*),([^,]*)->([^,]*)", text.replace(" ", ""))
        if not found:
            return f"equation {text!r} has no input, kernel and output"
        inputs, kernel, output = (tuple(re.findall(r"\.\.\.|\w", side)) for side in found.groups())
        if "..." in kernel or any(len(set(s)) < len(s) for s in (inputs, kernel, output)):
            return f"equation {text!r} repeats an axis, or has '...' in its kernel"
        contracted = tuple(c for c in kernel if c in inputs and c not in output)
        features = tuple(c for c in kernel if c in output and c not in inputs)
        if len(contracted) + len(features) < len(kernel):
            return f"equation {text!r} has axes of its kernel in input and output (a batch)"
        if not contracted or not features or set(inputs) - {*contracted, *output}:
            return f"equation {text!r} is no matrix product"
        order = tuple(kernel.index(c) for c in (*contracted, *features))
        return cls(inputs, output, contracted, features, Fold(order, len(contracted)))


class Quantized(nnx.Module):
    """What the three have in common: promotion, the product, and the source's attributes.

    ``kernel`` is a QTensor of ``[..., K, N]`` in Variables; ``kernel_dtype``, that of the kernel
    it stands for, takes part in promotion. Activations are quantized as in ``fdq.nn.Linear``.
    """

    # Copied from the source: what promotion and the axes depend on.
    dtype: Any
    promote_dtype: Any
    preferred_element_type: Any

    def __init__(self, source: Any, kernel: Any, activation: Any, activation_scale: Any):
        skipped = ("kernel", "bias", "dot_general", "dot_general_cls", "einsum_op")
        for name, attribute in vars(source).items():
            if not name.startswith("_pytree__") and name not in skipped:
                setattr(self, name, attribute)
        self.kernel_dtype = str(source.kernel.dtype)
        self.kernel: Any = nnx.data(kernel)
        self.bias: Any = nnx.data(source.bias)
        self.activation: ActivationSpec | None = activation
        self.activation_scale: Any = nnx.data(activation_scale)

    def _product(self, x: jax.Array, fold_input: Any) -> tuple[jax.Array, jax.Array | None]:
        return product_of(self, x, fold_input)


def product_of(layer: Any, x: jax.Array, fold_input: Any) -> tuple[jax.Array, jax.Array | None]:
    """``fold_input(promoted x) @ kernel`` of a layer as `Quantized` is, and the promoted bias."""
    like = jnp.zeros((), layer.kernel_dtype)
    x, like, bias = layer.promote_dtype((x, like, value(layer.bias)), dtype=layer.dtype)
    y = matmul(
        fold_input(x),
        value(layer.kernel),
        activation=layer.activation,
        activation_scale=value(layer.activation_scale),
        out_dtype=layer.preferred_element_type or like.dtype,
    )
    return y, bias


def finish(y: jax.Array, bias: jax.Array | None, shape: Any, out_sharding: Any) -> jax.Array:
    """Adds the bias, reshaped to ``shape``, and places the result where the caller asked."""
    if out_sharding is not None:
        y = jax.sharding.reshard(y, out_sharding)
    if bias is None:
        return y
    dtype = jnp.promote_types(y.dtype, bias.dtype)
    return y.astype(dtype) + bias.reshape(shape).astype(dtype)


class QuantizedLinear(Quantized):
    """An ``nnx.Linear`` with a quantized kernel: ``[..., in] -> [..., out]``."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """As ``nnx.Linear``."""
        y, bias = self._product(inputs, lambda x: x)
        return finish(y, bias, (1,) * (y.ndim - 1) + (-1,), out_sharding)


class QuantizedLinearGeneral(Quantized):
    """An ``nnx.LinearGeneral`` without batch axes, with a quantized kernel."""

    axis: tuple[int, ...]
    out_features: tuple[int, ...]

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """As ``nnx.LinearGeneral``."""
        y, bias = self._product(inputs, functools.partial(rows_of, self))
        y = result_of(self, y)
        lead = (1,) * (y.ndim - len(self.out_features))
        return finish(y, bias, lead + tuple(self.out_features), out_sharding)


class QuantizedEinsum(Quantized):
    """An ``nnx.Einsum`` that is one matrix product, with a quantized kernel."""

    einsum_str: str
    kernel_shape: tuple[int, ...]

    def __call__(
        self, inputs: jax.Array, einsum_str: str | None = None, out_sharding: Any = None
    ) -> jax.Array:
        """As ``nnx.Einsum``; the equation of the constructor only, since the kernel is folded."""
        if einsum_str is not None and einsum_str.replace(" ", "") != self.einsum_str:
            raise ValueError(
                f"This Einsum's kernel is quantized for {self.einsum_str!r}; it cannot be called "
                f"with {einsum_str!r}."
            )
        y, bias = self._product(inputs, functools.partial(rows_of, self))
        y = result_of(self, y)
        equation, sizes = _equation_of(self)
        names = _expanded(equation.output, y.ndim)
        return finish(y, bias, tuple(sizes.get(name, 1) for name in names), out_sharding)


def rows_of(layer: Any, x: jax.Array) -> jax.Array:
    """The input of a layer, Flax's or one here, as rows ``[..., K]`` for its folded kernel."""
    if isinstance(layer, nnx.LinearGeneral | QuantizedLinearGeneral):
        kept = x.ndim - len(layer.axis)
        # nnx.LinearGeneral takes its axes in ascending order, however they were given.
        axes = sorted(axis % x.ndim for axis in layer.axis)
        x = jnp.moveaxis(x, axes, tuple(range(kept, x.ndim)))
    elif isinstance(layer, nnx.Einsum | QuantizedEinsum):
        equation, _ = _equation_of(layer)
        names = _expanded(equation.inputs, x.ndim)
        others = [name for name in names if name not in equation.contracted]
        kept = len(others)
        x = lax.transpose(x, [names.index(name) for name in (*others, *equation.contracted)])
    else:
        return x
    return x.reshape(*x.shape[:kept], math.prod(x.shape[kept:]))


def result_of(layer: Any, y: jax.Array) -> jax.Array:
    """Rows ``[..., N]`` of a product with the folded kernel, as the layer returns them."""
    if isinstance(layer, nnx.LinearGeneral | QuantizedLinearGeneral):
        return y.reshape(*y.shape[:-1], *layer.out_features)
    if not isinstance(layer, nnx.Einsum | QuantizedEinsum):
        return y
    equation, sizes = _equation_of(layer)
    names = _expanded(equation.inputs, y.ndim - 1 + len(equation.contracted))
    kept = [name for name in names if name not in equation.contracted]
    y = y.reshape(*y.shape[:-1], *(sizes[name] for name in equation.features))
    result = _expanded(equation.output, y.ndim)
    return lax.transpose(y, [(*kept, *equation.features).index(name) for name in result])


def _equation_of(layer: Any) -> tuple[Equation, dict[str, int]]:
    """The equation of a layer's kernel, and the sizes of the kernel's axes."""
    equation = Equation.parse(layer.einsum_str)
    assert isinstance(equation, Equation)
    letters = layer.einsum_str.replace(" ", "").split(",")[1].split("->")[0]
    # Of layers that are stacked the kernel has more axes than its equation.
    sizes = layer.kernel_shape[-len(letters) :]
    return equation, dict(zip(letters, sizes, strict=True))


def _expanded(names: tuple[str, ...], ndim: int) -> list[str]:
    """Axis names with ``...`` replaced by ``...0``, ``...1`` and so on."""
    if "..." not in names:
        return list(names)
    at, extra = names.index("..."), ndim - (len(names) - 1)
    return [*names[:at], *(f"...{i}" for i in range(extra)), *names[at + 1 :]]


def fold_of(module: Any) -> tuple[Fold, type[Quantized]] | str:
    """How a Flax layer's kernel folds and what replaces the layer, or why nothing does."""
    kind = type(module)  # exact: a subclass may use its kernel in other ways, and is not replaced
    if kind is nnx.Linear:
        if module.dot_general is not lax.dot_general:
            return "nnx.Linear: has a dot_general of its own"
        return Fold((0, 1), 1), QuantizedLinear
    if kind is nnx.LinearGeneral:
        if module.batch_axis:
            return "nnx.LinearGeneral: has batch axes"
        if module.dot_general is not None or module.dot_general_cls is not None:
            return "nnx.LinearGeneral: has a dot_general of its own"
        count = len(module.in_features)
        return Fold(tuple(range(count + len(module.out_features))), count), QuantizedLinearGeneral
    if kind is nnx.Einsum:
        if module.einsum_op is not jnp.einsum:
            return "nnx.Einsum: has an einsum_op of its own"
        if module.einsum_str is None:
            return "nnx.Einsum: its equation is only known when it is called"
        equation = Equation.parse(module.einsum_str)
        if isinstance(equation, str):
            return f"nnx.Einsum: {equation}"
        return equation.fold, QuantizedEinsum
    return f"{name_of(kind)}: not quantized"


def name_of(kind: type) -> str:
    """``nnx.Conv``, ``fdq.nn.Router``, ``MyLayer``."""
    for prefix, shown in (("flax.nnx", "nnx."), ("fdq.nn", "fdq.nn.")):
        if kind.__module__.startswith(prefix):
            return shown + kind.__name__
    return kind.__name__
