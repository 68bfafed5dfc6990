"""`fdq.merge_lora`: adapters added to the weights that they stand beside."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from fdq import nn
from fdq.adapters.low_rank import adapters_of
from fdq.formats.qtensor import QScale, QuantizedWeight, dequantize
from fdq.nn import general
from fdq.nn.parameters import value
from fdq.ops.interleaved_weight import InterleavedWeight
from fdq.ops.prepared_weight import PreparedWeight
from fdq.quantizers.modules import substituted
from fdq.quantizers.weight import quantize_array


def merge_lora(model: Any, *, requantize: bool = True, method: str | None = None) -> Any:
    """A new model without adapters, whose weights have them added; `model` is not changed.

    Float weights are exact to their dtype. Quantized ones are decoded, the adapters added in
    float32, and the sum is quantized again as the weight was stored (format, groups, dtype of the
    scales): what that costs is of the size of a rounding step, which may be more than the adapter
    changes. Compare both by `fdq.evaluate`, and decode with the adapters where it matters.

    Args:
      model: what `fdq.lora` or `fdq.load_lora` made.
      requantize: False leaves the layers that had adapters in floats, in the dtype of an fdq
        model's activations, of `nnx` layers in that of the kernel before it was quantized.
      method: the quantizer, as in `fdq.quantize`.

    Returns:
      The new model; what was laid out for a device is so again.

    Raises:
      ValueError: the model has no adapters, or the sum cannot be quantized (the message names the
        layer).

    Examples:
      >>> merged = fdq.merge_lora(tuned)  # doctest: +SKIP
      >>> fdq.save(merged, "tuned-w4a16")  # doctest: +SKIP
    """
    adapters_of(model)
    copy = nnx.clone(model)
    dtype = getattr(getattr(copy, "config", None), "dtype", "float32")
    paths = {id(one): ".".join(map(str, path)) for path, one in nnx.iter_modules(copy)}
    merged = {}
    for key, one in adapters_of(copy).items():
        layer = one.base_module
        kernel = value(layer.kernel)
        if not isinstance(kernel, QuantizedWeight):
            layer.kernel = nnx.data(_float_sum(layer, one))
        elif not requantize:
            w = dequantize(kernel) + one.weight(kernel.shape[-1])
            layer.kernel = nnx.data(nnx.Param(w.astype(getattr(layer, "kernel_dtype", dtype))))
        else:
            layer.kernel = nnx.data(_quantized_sum(layer.kernel, one, method, paths[key]))
        merged[key] = layer
    return substituted(copy, merged)


def _float_sum(layer: Any, adapters: nn.LoRA) -> Any:
    """The kernel of a float layer, in its Variable."""
    box, found = layer.kernel, general.fold_of(layer)
    fold = general.Fold((0, 1), 1) if isinstance(found, str) else found[0]
    kernel = value(box)
    folded = fold(kernel.astype(jnp.float32))
    folded = folded + adapters.weight(folded.shape[-1])
    sizes = tuple(kernel.shape[kernel.ndim - len(fold.order) :])
    return box.replace(fold.unfolded(folded, sizes).astype(kernel.dtype))


def _quantized_sum(old: Any, adapters: nn.LoRA, method: str | None, path: str) -> Any:
    """The kernel of a quantized layer, stored as `old` is, in Variables like its."""
    canonical = value(old).canonical()
    # An order of rows was chosen with the codes; new codes are in the weight's own.
    spec = dataclasses.replace(canonical.spec, row_order=False)
    w = dequantize(canonical) + adapters.weight(canonical.shape[-1])
    new = quantize_array(w, spec, method=method, path=f"{path}.kernel")
    if isinstance(old, InterleavedWeight):
        new = InterleavedWeight.of(new, old.order)
    elif isinstance(old, PreparedWeight) and type(old).unsupported(new) is None:
        new = type(old).of(new)
    boxes = old.arrays()
    codes = next(box for name, box in boxes.items() if name in ("codes", "data"))

    def boxed(name: str, array: Any) -> Any:
        if name in boxes:
            return boxes[name].replace(array)
        return codes.replace(array) if name in ("codes", "data") else QScale(array)

    return new.replace(**{name: boxed(name, array) for name, array in new.arrays().items()})
