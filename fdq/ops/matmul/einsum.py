"""`einsum` of an array and a quantized weight with one contracted axis."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp

from fdq.formats.qtensor import QuantizedWeight
from fdq.ops.matmul.api import matmul
from fdq.ops.matmul.product import as_dtype, as_rows, as_weight
from fdq.ops.matmul.transposed import transposed_product
from fdq.schemes.scheme import ActivationSpec


def einsum(
    equation: str,
    x: jax.Array,
    w: Any,
    *,
    activation: ActivationSpec | str | None = None,
    activation_scale: jax.Array | None = None,
    implementation: str | None = None,
    out_dtype: Any = None,
    path: str = "fdq.einsum",
) -> jax.Array:
    """`jnp.einsum(equation, x, w)` for a quantized `w [..., K, N]`, without decoding it whole.

    Args:
      equation: of two operands and a result, such as `"btk,kn->btn"` or, with experts,
        `"etk,ekn->etn"`. The contracted axis is K, or N (`"btn,kn->btk"`, as with tied embeddings);
        leading axes of `w` are those of the result. `...` stands for axes of x.
      x: as in `matmul`.
      w: a QTensor or a prepared weight; with an array of floats it is `jnp.einsum`.
      activation: as in `matmul`; not over N, and not with an array.
      activation_scale: as in `matmul`.
      implementation: as in `matmul`; not over N, and not with an array.
      out_dtype: as in `matmul`.
      path: as in `matmul`.

    Raises:
      ValueError: another equation, shapes that do not match it, or an argument that has no meaning
        with it.
      TypeError: x or w is no array of real numbers.

    Examples:
      >>> q = fdq.quantize(jnp.ones((256, 64)), "W4A16")
      >>> fdq.einsum("btk,kn->btn", jnp.ones((2, 3, 256)), q).shape
      (2, 3, 64)
    """
    if isinstance(x, QuantizedWeight):
        raise TypeError(f"{path}: the quantized weight is the second operand, x the first.")
    x = as_rows(x, path)
    of_matmul = {
        "activation": activation,
        "activation_scale": activation_scale,
        "implementation": implementation,
    }
    given = {name: value for name, value in of_matmul.items() if value is not None}
    if not isinstance(w, QuantizedWeight):
        w = as_weight(w, path)
        if given:
            raise ValueError(
                f"{path}: {', '.join(given)}= is for quantized weights, w is an array."
            )
        y = jnp.einsum(equation, x, w)
        return y.astype(as_dtype(out_dtype, y.dtype, path))
    inputs, weight, output = _axes(equation, x.ndim, w.ndim)
    lead, (k, n) = weight[:-2], weight[-2:]
    contracted, made = (k, n) if k in inputs else (n, k)
    batch = [axis for axis in lead if axis in inputs]
    rows = [axis for axis in inputs if axis not in (contracted, *batch)]
    wrong = made in inputs or contracted not in inputs or contracted in output
    if wrong or sorted(output) != sorted([*lead, *rows, made]):
        raise ValueError(
            f"fdq.einsum: {equation!r} is no product with a quantized weight: of its axes [..., "
            f"{k}, {n}] one of the last two is contracted and all others are in the result, once."
        )
    if given and contracted == n:
        raise ValueError(
            f"{path}: {', '.join(given)}= is for products over K; {equation!r} contracts N."
        )
    options = {"out_dtype": out_dtype}
    if contracted == k:
        options |= {**given, "path": path}
    x = jnp.transpose(x, [inputs.index(axis) for axis in (*batch, *rows, contracted)])

    def product(x: jax.Array, w: QuantizedWeight) -> jax.Array:
        run: Any = matmul if contracted == k else transposed_product
        return run(x, w, **options)

    for axis in reversed(lead):
        # Those that x has are its first ones, in this order.
        product = jax.vmap(product, in_axes=(0 if axis in batch else None, 0))
    found = [*lead, *rows, made]
    return jnp.transpose(product(x, w), [found.index(axis) for axis in output])


def _axes(equation: str, x_ndim: int, w_ndim: int) -> tuple[list[str], list[str], list[str]]:
    """Axes of x, of the weight and of the result, `...` written out."""
    sides = re.fullmatch(r"([\w.]+),(\w+)->([\w.]+)", equation.replace(" ", ""))
    if sides is None or any(side.replace("...", "", 1).count(".") for side in sides.groups()):
        raise ValueError(
            f"fdq.einsum: cannot read {equation!r}; expected two operands and a result, such as "
            "'btk,kn->btn'."
        )
    inputs, weight, output = (re.findall(r"\.\.\.|\w", side) for side in sides.groups())
    more = [f"...{i}" for i in range(x_ndim - len(inputs) + 1)] if "..." in inputs else []

    def written_out(axes: list[str]) -> list[str]:
        return [one for axis in axes for one in (more if axis == "..." else [axis])]

    inputs, output = written_out(inputs), written_out(output)
    for name, axes, ndim in (("x", inputs, x_ndim), ("the weight", weight, w_ndim)):
        if len(axes) != ndim or len(set(axes)) != ndim or (name != "x" and ndim < 2):
            raise ValueError(
                f"fdq.einsum: {equation!r} gives {name} the axes {', '.join(axes)}, each once; it "
                f"has {ndim}."
            )
    return inputs, weight, output
