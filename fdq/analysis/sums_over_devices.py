"""What the devices of a mesh add up over all of them in one decode step."""

from collections.abc import Iterator
from typing import Any

from flax import nnx

from fdq.formats.qtensor import QuantizedWeight
from fdq.models.decoder import Decoder
from fdq.nn.parameters import value
from fdq.schemes.mesh_rules import shards
from fdq.sharding.cut import Axes


def sums_over_devices(model: Decoder, width: float, rows: int) -> Iterator[tuple[int, float]]:
    """Devices and bytes of each sum, as float32; `width` are the bytes of all `rows`."""
    placement = model.placement
    activations = _activations(model)
    for path, cut in placement.cuts:
        axes: Axes = tuple(name for one in cut.axes[:-1] for name in one)
        if not axes or not path.endswith((".kernel", ".embedding")):
            continue
        experts = path.replace(".shared_experts.", ".experts.")
        if experts != path and experts in placement.of:
            continue  # in the sum of the others
        if path.endswith("gate_up_proj.kernel"):
            continue  # whole experts: the sum is after the second product
        count = shards(placement.mesh, axes)
        yield count, width
        activation = activations.get(path.removesuffix(".kernel"))
        if activation is not None and activation.granularity == "token" and len(cut.axes) == 2:
            yield count, 4.0 * rows  # the largest number of each row


def _activations(model: Decoder) -> dict[str, Any]:
    found = {}
    for keys, module in nnx.iter_modules(model):
        if isinstance(value(getattr(module, "kernel", None)), QuantizedWeight):
            found[".".join(map(str, keys))] = getattr(module, "activation", None)
    return found
