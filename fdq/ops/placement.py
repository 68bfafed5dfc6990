"""Where the arrays of an op lie: kernels read arrays of one device, or of one shard."""

from __future__ import annotations

from typing import Any

import jax
from jax.core import Tracer


def sharded(*trees: Any) -> str | None:
    """Why arrays may lie on several devices; None where they lie on one, and in `jax.shard_map`.

    Arrays and tracers say which mesh they belong to, so that other devices of the machine, and
    other meshes, do not matter.
    """
    current = jax.sharding.get_abstract_mesh()
    meshes = [jax.typeof(a).sharding.mesh for a in jax.tree.leaves(trees)]
    for mesh in (current, *meshes):
        if mesh.empty or all(size == 1 for size in mesh.axis_sizes):
            continue
        if not set(mesh.axis_names) <= set(current.manual_axes):
            return f"arrays may be sharded over the mesh {dict(mesh.shape)}"
    return None


def devices(*trees: Any) -> int:
    """On how many devices arrays lie; 1 where they do not say."""
    arrays = (a for a in jax.tree.leaves(trees) if isinstance(a, jax.Array))
    held = (a.sharding for a in arrays if not isinstance(a, Tracer))
    return max((len(sharding.device_set) for sharding in held), default=1)
