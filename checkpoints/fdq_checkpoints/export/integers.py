"""fdq's integers as tools store them: unsigned codes, and a zero point that is one of them.

`half` levels, `(code - 2^(b-1) + 1/2) * scale`, are the odd numbers among those of more bits:
`(2 code - 2^b + 1) * (scale / 2)`, which is the same number exactly. So 2 and 3 bits are stored in
4, which every kernel has, and 4 in 8.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from fdq.formats import packing
from fdq.schemes.scheme import WeightSpec
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.export.layout import Layer
from fdq_checkpoints.export.origin import Origin
from fdq_checkpoints.sources import bits as words
from fdq_checkpoints.sources.stored_weight import StoredWeight

_WIDER = {2: 4, 3: 4, 4: 8}


@dataclasses.dataclass(frozen=True)
class Integers:
    """A weight `[K, N]`: fdq's packed unsigned codes, scales `[G, N]`, zero points where stored."""

    bits: int
    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None


def own_bits(spec: WeightSpec) -> int | None:
    """Bits of a code of fdq's; None of a format that is no integer."""
    digits = spec.format.removeprefix("int")
    return int(digits) if spec.format.startswith("int") and digits in "2348" else None


def stored_bits(spec: WeightSpec) -> int | None:
    """Bits of a code as it is stored; None where there are not enough."""
    own = own_bits(spec)
    return own if own is None or spec.zero_point != "half" else _WIDER.get(own)


def widened(layers: tuple[Layer, ...] | list[Layer]) -> tuple[str, ...]:
    """A note on those that are stored in more bits than they have."""
    found = {
        (own_bits(layer.spec), stored_bits(layer.spec))
        for layer in layers
        if layer.spec.zero_point == "half"
    }
    return tuple(
        f"Levels at odd multiples of scale / 2 have no counterpart in {own} bits; the same values "
        f"are stored in {more}."
        for own, more in sorted(found, key=str)
    )


def integers(layer: Layer, weight: StoredWeight) -> Integers:
    """The weight as it is stored, rows in its own order; its scales are one a column at least."""
    spec = weight.spec
    own, bits = own_bits(spec), stored_bits(spec)
    assert own is not None and bits is not None
    if spec.granularity == "tensor":
        channel = dataclasses.replace(spec, granularity="channel")
        weight = weight.as_spec(channel)
    codes, scale = weight.codes, weight.arrays["scale"]
    if own == 8 and spec.zero_point != "integer":
        codes = codes.view(np.uint8) ^ np.uint8(0x80)
    if spec.zero_point == "half":
        plain = np.asarray(
            packing.unpack(jnp.asarray(codes), own, packing.padding_rows(weight.k, own))
        )
        # Modulo 256: what is added may be more than a byte can hold, the sum is not.
        shift = (2 ** (bits - 1) - 2**own + 1) % 256
        codes = words.packed(plain * np.uint8(2) + np.uint8(shift), bits)
        halved = (scale.astype(np.float32) / np.float32(2)).astype(scale.dtype)
        if not np.array_equal(halved.astype(np.float32) * np.float32(2), scale.astype(np.float32)):
            raise CheckpointError(f"{layer.label}: a scale too small to be halved. Use --to dense.")
        scale = halved
    if spec.row_order:
        codes = words.in_order(codes, weight.k, bits, np.argsort(weight.arrays["row_order"]))
    return Integers(bits, codes, scale, weight.arrays.get("zero"))


def with_zero_points(weight: StoredWeight) -> StoredWeight | None:
    """A weight with offsets as one with zero points, the same numbers; None where there are none.

    Offsets are then whole multiples of the scales, from 0 to the highest code, as HQQ rounds them.
    """
    own = own_bits(weight.spec)
    assert own is not None
    scale, offset = (weight.arrays[name].astype(np.float64) for name in ("scale", "offset"))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        zero = np.where((scale == 0) & (offset == 0), 2.0 ** (own - 1), np.rint(-offset / scale))
    held = np.isfinite(zero) & (zero >= 0) & (zero < 2**own)
    # Exact: a product of 24 bits and 8.
    if not held.all() or (zero * scale != -offset).any():
        return None
    arrays = {name: array for name, array in weight.arrays.items() if name != "offset"}
    return StoredWeight(
        zero_point_spec(weight.spec),
        weight.k,
        weight.codes,
        {**arrays, "zero": zero.astype(np.uint8)},
    )


def without_offsets(layers: list[Layer], origin: Origin) -> list[Layer]:
    """Layers of one kernel, their offsets as zero points; CheckpointError where these are none."""
    if not layers or layers[0].spec.zero_point != "offset":
        return layers
    q = origin.read(layers[0].path)
    parts = [q] if q.ndim == 2 else [q[expert] for expert in range(q.shape[0])]
    if any(with_zero_points(StoredWeight.of(part)) is None for part in parts):
        raise CheckpointError(
            f"{origin.where}: {layers[0].label}: codes with offsets that are no whole multiples of "
            "their scales, and such layouts have zero points alone. Export it --to dense, or --to "
            "gguf where that holds it; or convert the original to the same scheme with -asym."
        )
    spec = zero_point_spec(layers[0].spec)
    return [dataclasses.replace(layer, spec=spec) for layer in layers]


def zero_point_spec(spec: WeightSpec) -> WeightSpec:
    """With zero points in place of offsets."""
    return dataclasses.replace(spec, zero_point="integer")


def group_index(layer: Layer, weight: StoredWeight) -> np.ndarray:
    """The group of each row of the weight, int32 `[K]`, which its codes are written in."""
    index = (np.arange(layer.k) // layer.group).astype(np.int32)
    if layer.spec.row_order:
        index = index[np.argsort(weight.arrays["row_order"])]
    return index


def packed_along_columns(zero: np.ndarray, bits: int) -> np.ndarray:
    """Zero points uint8 `[G, N]` -> int32 `[G, words]`, a dense stream along N."""
    each = (zero[..., None] >> np.arange(bits, dtype=np.uint8)) & np.uint8(1)
    stream = np.packbits(each.reshape(len(zero), -1), axis=-1, bitorder="little")
    return np.pad(stream, [(0, 0), (0, -stream.shape[1] % 4)]).view(np.int32)


def constant_zeros(groups: int, n: int, value: int, bits: int) -> np.ndarray:
    """The same zero point everywhere, packed along N."""
    return packed_along_columns(np.full((groups, n), value, np.uint8), bits)
