"""Checkpoints know no mesh: saved on eight devices, restored on any number, bit for bit."""

import jax
import numpy as np
import pytest
from flax import nnx

import fdq
from fdq.sharding import make_mesh
from fdq_checkpoints import CheckpointError
from tests.covering import longest, slow
from tests.sharding.many_devices import model_of


def same(one, other):
    """Whether two models have the same tensors, specs too."""
    left, right = (nnx.split(model)[1] for model in (one, other))
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)
    kernels = (model.layers[0].self_attn.qkv_proj.kernel for model in (one, other))
    assert len({getattr(kernel, "spec", None) for kernel in kernels}) == 1


@pytest.mark.parametrize(
    ("name", "scheme"), [slow("llama", "block_wise_fp8"), longest("gpt_oss", "W4A16C8")]
)
def test_saved_on_eight_devices(name, scheme, tmp_path):
    one = model_of(name, scheme)
    many = fdq.shard(one, make_mesh({"tensor": 8}))
    fdq.save(many, tmp_path / "model")
    same(fdq.load(tmp_path / "model", prepare=False), one)
    for sizes in ({"tensor": 2}, {"tensor": 4, "data": 2}, {"tensor": 8}):
        loaded = fdq.load(tmp_path / "model", mesh=make_mesh(sizes))
        held = loaded.layers[0].self_attn.qkv_proj.kernel.codes
        assert len(held.sharding.device_set) == make_mesh(sizes).size
        same(fdq.unshard(loaded), one)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(many), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim) and a.shape == b.shape


def test_floats_are_quantized_on_the_way_to_a_mesh(tmp_path):
    plain, mesh = model_of("llama", None), make_mesh({"tensor": 8})
    fdq.save(plain, tmp_path / "model")
    loaded = fdq.load(tmp_path / "model", "W8A16", mesh=mesh)
    same(fdq.unshard(loaded), fdq.quantize(plain, "W8A16"))
    same(fdq.unshard(fdq.quantize(plain, "W8A16", mesh=mesh)), fdq.quantize(plain, "W8A16"))
    with pytest.raises(ValueError, match="leave out sharding, template"):
        fdq.load(tmp_path / "model", mesh=mesh, template=plain)
    with pytest.raises(ValueError, match="not multiples of 256"):
        fdq.load(tmp_path / "model", "W8A16", mesh=mesh, mesh_rules=fdq.sharding.Rules(align=256))
    fdq.save({"w": np.ones((4, 4), np.float32)}, tmp_path / "tree")
    with pytest.raises(CheckpointError, match="mesh= is for models of fdq"):
        fdq.load(tmp_path / "tree", mesh=mesh)
