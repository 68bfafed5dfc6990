"""`fdq.quantize`: an array, a pytree of parameters, or anyone's NNX module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from fdq.calibration.statistics import Calibration
from fdq.formats.qtensor import QTensor, QuantizedWeight
from fdq.models.decoder import Decoder
from fdq.quantizers.assigned import Assigned, fastdeploy_has, parse
from fdq.quantizers.layer_inputs import LayerInputs
from fdq.quantizers.weight import quantize_array
from fdq.schemes.assignment import MatchTable
from fdq.sharding.distribution import plan, shard


def quantize(
    target: Any,
    scheme: Any,
    *,
    method: str | None = None,
    compat: str | None = None,
    importance: Any = None,
    calibration: Any = None,
    rules: Any = None,
    donate: bool = False,
    verbose: bool = False,
    mesh: Any = None,
    mesh_rules: Any = None,
) -> Any:
    """Quantizes weights; a pure function of its arguments.

    What becomes of what:

    - an array or `jax.ShapeDtypeStruct` `[..., K, N]`: a `QTensor`;
    - an NNX module: a new module in which `fdq.nn.Linear` and `fdq.nn.Experts` hold QTensors, and
      `nnx.Linear` (also stacked by `nnx.scan` or `nnx.vmap`), `nnx.LinearGeneral` without batch
      axes (so `nnx.MultiHeadAttention` as well) and `nnx.Einsum` that are one matrix product are
      replaced by `fdq.nn.QuantizedLinear` and its kin. Modules and Variables that were shared stay
      shared. The module passed in is not changed;
    - any other pytree (Linen's params, dicts, `nnx.State`): the same tree with QTensors in place
      of the 2-D float leaves `[in, out]` named kernel or w, and of whatever a rule names. Where a
      product contracts other axes than the last but one, as with weights `[out, in]` of torch and
      Equinox and attention kernels `[D, H, d]` of Linen, the rule says which, as in
      `("*.weight", "W4A16", dict(contract=1))`: such leaves become a
      `fdq.formats.folded.FoldedWeight`, which decodes to their own shape.

    Which tensors: see `fdq.Recipe`. What is left as it is, and why, says `fdq.match_table`.

    Memory: one tensor at a time, and the temporaries of its quantizer (the scale search of 4 bits
    and fewer works on one float32 matrix of a stack). The source stays alive, as the caller holds
    it; with `donate=True` each source array is freed as soon as it is quantized, and the original
    can no longer be used.

    Args:
      target: what to quantize; modules and trees may hold `jax.ShapeDtypeStruct` s.
      scheme: whatever `fdq.Recipe.parse` takes, e.g. `"W4A16C8"`. Activation formats become part
        of modules; in arrays and trees they have no place, pass `activation=` to `fdq.matmul`. The
        cache format matters to `fdq.KVCache` only.
      method: the quantizer of all tensors to which no rule gives another: `"absmax"`,
        `"signed_max"`, `"four_over_six"`, `"search"` (see `fdq.quantizers.quantize_array`),
        `"hqq"`; by second moments (`fdq.calibrate(..., moments=True)`, for those that end in 2 also
        `output_moments=True`) `"gptq"` and `"gptq2"` of formats with a code a weight, `"ldlq"` and
        `"ldlq2"` of trellis codes, `"ccq"` and `"ccq2"` of WINT2; or one of yours. By default
        `"search"` for 4 bits and fewer, else `"absmax"`.
      compat: `"fastdeploy"` reads names as FastDeploy does (`fdq.Recipe.parse`) and rounds its
        WINT8 and WINT4 bit for bit; `"fastdeploy-cpu"` as its CPU kernel.
      importance: mean square of each input channel, `[K]`; for trees and modules what
        `fdq.calibrate` returns, or a mapping from paths to such arrays. Guides the scale search,
        and is not used by other methods.
      calibration: for trees and modules: what `fdq.calibrate` returns (not the sample tokens).
        Quantizers get the statistics that they use from it, and static activations (`-static`) and
        caches their scales. For modules also a mapping from paths to the absmax of the layer's
        input (a number, or by channel), for static activations alone.
      rules: more rules, ahead of the recipe's own: a dict or a list of pairs.
      donate: frees source arrays on the way.
      verbose: prints what was quantized, and what was left and why.
      mesh: puts the result, an `fdq.models.Decoder`, on the devices of a mesh, as `fdq.shard` does.
      mesh_rules: which axes of the mesh cut what, see `fdq.sharding.Rules`.

    Returns:
      Of the kind of `target`, see above.

    Raises:
      ValueError: an unknown scheme, a rule or a path of statistics that matches nothing, a shape
        that does not fit, NaN or infinity in a weight, static activations without calibration.
        Names the path.
      TypeError: no array, tree or module; statistics that are none.

    Examples:
      >>> model = fdq.quantize(model, "W4A16C8")
      >>> params = fdq.quantize(params, {"*.attention": "W8A16", "head": None, "*": "W4A16"})
    """
    if isinstance(target, (nnx.Variable, QuantizedWeight)):
        kind = type(target).__name__
        raise TypeError(f"Cannot quantize a {kind}; pass the array, or the module that holds it.")
    if mesh is None and mesh_rules is not None:
        raise ValueError("quantize: mesh_rules= say what a mesh cuts; give the mesh= too.")
    if mesh is not None and not isinstance(target, Decoder):
        raise TypeError(
            f"mesh= is for a fdq.models.Decoder, found a {type(target).__name__}; put its arrays "
            "on devices with jax.device_put."
        )
    if getattr(target, "placement", None) is not None:
        raise ValueError(
            "The model is on a mesh, its columns in the order of devices. Quantize it first, or "
            "while it is loaded: fdq.load(path, scheme, mesh=mesh). fdq.unshard undoes fdq.shard."
        )
    if mesh is not None:
        plan(target, mesh, mesh_rules)  # what cannot be cut is refused before anything runs
    is_array = hasattr(target, "shape") and hasattr(target, "dtype")
    has_layers = isinstance(target, nnx.Pytree)
    has_paths = isinstance(calibration, Calibration) and not is_array
    if calibration is not None and not (has_layers or has_paths):
        raise ValueError(
            "calibration= gives the layers of an NNX module their static scales. An array or a "
            "pytree has no layers: pass activation_scale= to fdq.matmul."
        )
    if is_array:
        q = _quantize_array(target, scheme, method, compat, importance, rules)
        if donate and isinstance(target, jax.Array):
            target.delete()
        return q
    assigned = Assigned.of(target, scheme, compat=compat, rules=rules, method=method)
    inputs = LayerInputs.of(assigned.leaves, importance=importance, calibration=calibration)
    result = assigned.quantize(inputs, donate=donate)
    assigned.table.report(verbose=verbose)
    return result if mesh is None else shard(result, mesh, mesh_rules)


def match_table(
    target: Any, scheme: Any, *, compat: str | None = None, rules: Any = None
) -> MatchTable:
    """What `quantize` would do with each tensor, without doing it.

    Args:
      target: an NNX module or any pytree, concrete or abstract.
      scheme: as in `quantize`.
      compat: as in `quantize`.
      rules: as in `quantize`.

    Returns:
      A `MatchTable`: prints aligned, `rows` for programs.
    """
    return Assigned.of(target, scheme, compat=compat, rules=rules).table


def _quantize_array(
    array: Any, scheme: Any, method: str | None, compat: str | None, importance: Any, rules: Any
) -> QTensor:
    recipe = parse(scheme, rules, compat, has_experts=False)
    if recipe.default is None or recipe.default.weight is None or recipe.rules:
        raise ValueError(
            f"One array takes one scheme with a weight format, such as 'W4A16'; got {recipe}."
        )
    if isinstance(importance, (Mapping, Calibration)):
        raise TypeError(
            f"importance= of one array is an array [K], got {type(importance).__name__}."
        )
    method = recipe.quantizer or method
    if recipe.quantizer is not None or not fastdeploy_has(recipe.default, array.dtype):
        compat = None
    return quantize_array(
        array, recipe.default.weight, method=method, compat=compat, importance=importance
    )
