"""Models over several devices: rules that cut tensors over the axes of a mesh, and programs on it.

A mesh is JAX's own, `jax.make_mesh((4, 2), ("tensor", "expert"))`. Each device holds a part of a
model that is a model by itself (its heads, its channels, its experts), runs the same code as one
device does, and two sums a layer cross devices.
"""

from fdq.schemes.mesh_rules import Rules as Rules
from fdq.schemes.mesh_rules import make_mesh as make_mesh
from fdq.schemes.mesh_rules import parse_mesh as parse_mesh
from fdq.sharding.distribution import prepare as prepare
from fdq.sharding.distribution import shard as shard
from fdq.sharding.distribution import unshard as unshard
from fdq.sharding.placement import Placement as Placement
