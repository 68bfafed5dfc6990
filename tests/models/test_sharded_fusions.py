"""Fused products (qkv, gate and up) over two devices: nothing moves but what the sums need."""

import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fdq
import fdq.models
from fdq.ops.interleaved_weight import InterleavedWeight
from fdq.ops.rows import Order
from tests.covering import longest, slow
from tests.models import oracles

COLUMNS = re.compile(r"(qkv_proj|gate_up_proj)\.kernel\.(codes|scale|zero)$")
ROWS = re.compile(r"(o_proj|down_proj)\.kernel\.(codes|scale|zero)$")


def moving(text):
    """Collectives of a compiled program, and where they come from."""
    kinds = "all-reduce|all-gather|collective-permute|all-to-all|reduce-scatter"
    lines = [re.search(rf" ({kinds})(?:-start)?\(.*", line) for line in text.splitlines()]
    names = re.compile('op_name="([^"]*)"')
    return [(m[1], *names.findall(m[0])) for m in lines if m]


def test_an_order_is_undone():
    x = np.arange(24)
    order = Order(2, (12, 8, 4))
    dealt = x[order.columns()]
    assert dealt[:12].tolist() == [0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 20, 21]
    np.testing.assert_array_equal(dealt[order.columns(back=True)], x)


@pytest.mark.parametrize(
    ("name", "scheme", "axis_type"),
    [
        slow("llama", "W4A16-g32", AxisType.Auto),
        longest("llama", "W8A8", AxisType.Explicit),
        longest("qwen2", "W4A16-asym-g32", AxisType.Auto),
        slow("qwen3", "WNF4A16-g32", AxisType.Auto),
    ],
    ids=str,
)
def test_a_step_holds_two_sums_a_layer(name, scheme, axis_type, tmp_path):
    """Loaded from a checkpoint, the same tokens and weights as on one device, saved too."""
    # Widths of which a shard has whole groups.
    config = oracles.oracle_config(name).replace(
        hidden_size=64, intermediate_size=128, num_heads=4, num_kv_heads=2, head_dim=16
    )
    model = fdq.models.Decoder(config.replace(num_layers=1), rngs=nnx.Rngs(params=0))
    fdq.save(fdq.quantize(model, scheme), tmp_path / "one")
    one = fdq.load(tmp_path / "one")
    mesh = jax.make_mesh((2,), ("tp",), devices=jax.devices()[:2], axis_types=(axis_type,))

    def place(path, array):
        spec = PartitionSpec()
        if COLUMNS.search(path) and array.ndim == 2 and array.shape[-1] > 1:
            spec = PartitionSpec(None, "tp")
        elif ROWS.search(path) and array.shape[0] % 2 == 0:
            spec = PartitionSpec("tp", None)
        return NamedSharding(mesh, spec)

    two = fdq.load(tmp_path / "one", sharding=place)
    kernel = two.layers[0].self_attn.qkv_proj.kernel
    assert isinstance(kernel, InterleavedWeight)
    assert kernel.inner.codes.sharding.spec == PartitionSpec(None, "tp")

    row = [3, 1, 4, 1, 5]
    tokens = fdq.generate(two, [row], 6, stop_tokens=())
    assert tokens == fdq.generate(one, [row], 6, stop_tokens=())

    heads = NamedSharding(mesh, PartitionSpec(None, "tp"))
    cache = two.init_cache(1, 32, "C8", sharding=heads)
    state = fdq.prefill(two, np.asarray([row]), cache)
    step, params = fdq.functional(two)
    with jax.set_mesh(mesh):
        text = jax.jit(step).lower(params, state).compile().as_text()
    found = moving(text)
    if name == "qwen2":  # XLA shards its bias by itself, as it lies, and moves parts of it
        moved = "collective-permute", "jit(step)/layers.0/self_attn/rope_append/slice"
        found = [one for one in found if one != moved]
    assert {kind for kind, *_ in found} == {"all-reduce"}, found
    # Rows that are quantized need their largest value too, where they are sharded.
    sums = [name for _, name in found if "reduce_max" not in name]
    assert len(sums) == 2, found

    fdq.save(two, tmp_path / "two")
    again = fdq.load(tmp_path / "two")
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))
