"""Which axes of a mesh the kinds of tensors are cut over: names only, as those of schemes are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

Axes = str | tuple[str, ...] | None
"""One axis of a mesh, several (cut over the product of both), or none: whole on every device."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """What is cut over which axes of a mesh; an axis of the defaults that a mesh lacks is not used.

    Columns of a layer's first product and rows of its second one are cut together, so that what
    stands between them stays on its device and one sum a half of a layer crosses devices.

    Attributes:
      heads: queries, keys and values of attention (columns of `qkv_proj`, rows of `o_proj`), and
        the heads of a KV cache; fewer KV heads than devices are repeated.
      channels: of MLPs and of each expert (columns of `gate_up_proj`, rows of `down_proj`).
      experts: whole experts.
      vocabulary: rows of the embedding, columns of the head.
      batch: sequences.
      align: rows of a quantized weight that stay together, beside its packed units and groups.

    Raises:
      ValueError: an axis named twice in a field, what is no name, or `align` below 1.
    """

    heads: Axes = "tensor"
    channels: Axes = "tensor"
    experts: Axes = "expert"
    vocabulary: Axes = "tensor"
    batch: Axes = "data"
    align: int = 128

    def __post_init__(self):
        if type(self.align) is not int or self.align < 1:
            raise ValueError(f"Rules(align={self.align!r}): expected a whole number of 1 or more.")
        for kind in KINDS:
            axes: Any = getattr(self, kind)
            listed: Any = axes if isinstance(axes, str | Sequence | None) else (axes,)
            names = _named(listed)
            if len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
                raise ValueError(f"Rules({kind}={axes!r}): expected names of different axes.")

    def axes(self, kind: str, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
        """The axes of `mesh` that a kind (the name of a field) is cut over; of size 1 none."""
        return tuple(n for n in _named(getattr(self, kind)) if mesh.shape.get(n, 1) > 1)

    def check(self, mesh: Any) -> Any:
        """The mesh, once it and the rules belong together; axes that do nothing else are Auto.

        An AbstractMesh, of devices that are not there, is for models without values.

        Raises:
          TypeError: what is no mesh.
          ValueError: a rule names an axis that there is not, or no rule one that there is, or
            sequences are cut over an axis that weights are.
        """
        if not isinstance(mesh, Mesh | AbstractMesh):
            raise TypeError(
                "mesh: expected a jax.sharding.Mesh, such as "
                f'jax.make_mesh((8,), ("tensor",)), found {mesh!r:.100}.'
            )
        defaults = {field.name: field.default for field in dataclasses.fields(Rules)}
        have = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
        used: set[str] = set()
        for kind in KINDS:
            axes = _named(getattr(self, kind))
            used.update(axes)
            missing = [name for name in axes if name not in mesh.shape]
            if missing and getattr(self, kind) != defaults[kind]:
                raise ValueError(
                    f"Rules({kind}={getattr(self, kind)!r}): the mesh has no axis {missing[0]!r}, "
                    f"it has {have}. Name one of these, or None."
                )
        idle = [name for name, size in mesh.shape.items() if size > 1 and name not in used]
        if idle:
            raise ValueError(
                f"mesh ({have}): no rule uses the axis {idle[0]!r}; all devices along it would do "
                'the same. Name the axes "tensor", "expert" and "data", or give rules, such as '
                f"fdq.sharding.Rules(heads={idle[0]!r}, channels={idle[0]!r}, "
                f"vocabulary={idle[0]!r})."
            )
        weights = {n for kind in KINDS if kind != "batch" for n in self.axes(kind, mesh)}
        if both := weights & set(self.axes("batch", mesh)):
            raise ValueError(
                f"rules: sequences and weights are both cut over the axis {min(both)!r}. Give the "
                "mesh another one for sequences."
            )
        auto = (AxisType.Auto,) * len(mesh.axis_names)
        if mesh.axis_types == auto:
            return mesh
        if isinstance(mesh, AbstractMesh):
            return AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=auto)
        return Mesh(mesh.devices, mesh.axis_names, auto)


def as_set(mesh: Any) -> Any:
    """The mesh that `jax.set_mesh` made the current one, if it is `mesh` with Explicit axes.

    What is made then lies on that one: JAX refuses arrays of two kinds of axes in one operation.
    Else, and while tracing, `mesh`.
    """
    try:
        current = jax.sharding.get_mesh()
    except ValueError:  # while tracing nobody may ask
        return mesh
    twin = isinstance(mesh, Mesh) and explicit_twin(current.abstract_mesh, mesh)
    return current if twin and current.devices.tolist() == mesh.devices.tolist() else mesh


def explicit_twin(current: AbstractMesh, mesh: Any) -> bool:
    """Whether a mesh has the axes of `mesh`, all of them Explicit."""
    same = not current.empty and current.shape_tuple == mesh.shape_tuple
    return same and set(current.axis_types) == {AxisType.Explicit}


KINDS = ("heads", "channels", "experts", "vocabulary", "batch")
"""Fields of `Rules` that name axes."""


def _named(axes: Axes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


DEFAULT = Rules()


def shards(mesh: Mesh | AbstractMesh, axes: tuple[str, ...]) -> int:
    """Into how many parts these axes cut."""
    return math.prod(mesh.shape[name] for name in axes)


def repeats(kv_heads: int, devices: int) -> int:
    """How often each KV head is held so that as many devices have one each.

    Raises:
      ValueError: heads and devices of which neither divides the other.
    """
    if kv_heads % devices == 0:
        return 1
    if devices % kv_heads:
        raise ValueError(
            f"{kv_heads} KV heads over {devices} devices: one of the two must divide the other. "
            f"Use {math.gcd(kv_heads, devices)} devices on this axis, and the others for "
            '"data" or "expert".'
        )
    return devices // kv_heads


def parse_sizes(text: str) -> dict[str, int]:
    """Sizes of the axes of a mesh by name, of its description: `tensor=4,expert=2`.

    Raises:
      ValueError: another text.
    """
    if not isinstance(text, str):
        raise TypeError(f"mesh: expected a text such as 'tensor=4,expert=2', found {text!r:.100}.")
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        known = name.isidentifier() and size.isascii() and size.isdecimal() and len(size) < 10
        if not known or not int(size) or name in sizes:
            why = " (named twice)" if name in sizes else ""
            raise ValueError(
                f"mesh {text!r}: expected names of axes and sizes of 1 or more, such as "
                f"tensor=4,expert=2; could not read {part.strip()!r}{why}."
            )
        sizes[name] = int(size)
    return sizes


def abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
    """A mesh of devices that need not be there, for shapes."""
    auto = (AxisType.Auto,) * len(sizes)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=auto)


def parse_mesh(text: str) -> Mesh:
    """A mesh of its description, `tensor=4,expert=2`, over the first devices that there are.

    Raises:
      ValueError: another text, or fewer devices.
    """
    return make_mesh(parse_sizes(text))


def make_mesh(sizes: dict[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over the first of `devices`, by default of all.

    Raises:
      TypeError: no sizes by name.
      ValueError: a size below 1, or fewer devices.
    """
    if not isinstance(sizes, dict):
        raise TypeError(
            f"make_mesh: expected sizes by name, such as {{'tensor': 8}}, found {sizes!r:.100}."
        )
    for name, size in sizes.items():
        if not isinstance(name, str) or type(size) is not int or size < 1:
            raise ValueError(
                f"mesh: expected names of axes and sizes of 1 or more, found {name!r}: {size!r}."
            )
    devices = jax.devices() if devices is None else devices
    count, found = math.prod(sizes.values()), len(devices)
    if count > found:
        shape = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"mesh {shape}: it has {count} devices, and there are {found} "
            f"({devices[0].device_kind}). Use a smaller one{_more_of(devices[0], count)}."
        )
    auto = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=auto, devices=devices[:count]
    )


def _more_of(device: Any, count: int) -> str:
    flag = "XLA_FLAGS=--xla_force_host_platform_device_count"
    return f", or set {flag}={count}" if device.platform == "cpu" and count <= 64 else ""
