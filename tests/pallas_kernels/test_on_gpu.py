"""The kernels on the GPU of this machine: `JAX_PLATFORMS=cuda,cpu pytest -m gpu`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from canonical_weights import CASES, generator, random_weight
from closeness import error
from flax import nnx

import fdq
from fdq import ops
from fdq.cache import parse_format, quantize_cache
from fdq.models import Decoder, DecoderConfig
from fdq.nn.rotary import RotaryConfig
from fdq.ops import self_check
from fdq.ops.kernels import kernel_arrays
from pallas_kernels.append.cache_update import append, append_reference
from pallas_kernels.matmul import float8_blocks
from pallas_kernels.matmul.gathered import gathered_matrix_vector
from pallas_kernels.matmul.gathered_mma import gathered_mma
from pallas_kernels.matmul.integer import integer_matrix_vector
from pallas_kernels.matmul.matrix_vector import matrix_vector
from pallas_kernels.matmul.mma import mma_matmul, unsupported
from pallas_kernels.router.routing import router_logits, top_k_experts, top_k_experts_reference
from pallas_kernels.weights.formats import WORD_FORMATS

pytestmark = pytest.mark.gpu
BOUND = 5e-6


@pytest.fixture(autouse=True)
def on_gpu():
    with jax.default_device(jax.devices("gpu")[0]):
        yield


@pytest.mark.parametrize("m", [1, 3, 8])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products(case, m):
    w, values = random_weight(case, 1024, 640)
    x = jnp.asarray(generator("gpu", m).normal(size=(m, 1024)) + 0.25, jnp.float16)
    y = matrix_vector(x, w)
    assert error(y.sum(axis=0), np.asarray(x, np.float64) @ values) < BOUND
    np.testing.assert_array_equal(y, matrix_vector(x, w))


@pytest.mark.parametrize("m", [1, 9, 64])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_on_tensor_cores(case, m):
    w, values = random_weight(case, 1024, 640)
    for dtype in (jnp.bfloat16, jnp.float16):
        if reason := unsupported(w.layout, dtype):
            pytest.skip(reason)
        x = jnp.asarray(generator("gpu", m).normal(size=(m, 1024)) + 0.25, dtype)
        y = mma_matmul(x, w)
        assert error(y.sum(axis=0), np.asarray(x, np.float64) @ values) < 3e-5
        np.testing.assert_array_equal(y, mma_matmul(x, w))


@pytest.mark.parametrize("case", [c for c in CASES if WORD_FORMATS[c.format].byte_rows], ids=str)
def test_integer_products(case):
    w, values = random_weight(case, 512, 256)
    x = generator("gpu integers").integers(-127, 128, (2, 512))
    y = integer_matrix_vector(jnp.asarray(x, jnp.int8), w)
    assert error(y.sum(axis=0), x.astype(np.float64) @ values) < BOUND


@pytest.mark.parametrize("m", [1, 9, 64])
@pytest.mark.parametrize("case", [c for c in CASES if WORD_FORMATS[c.format].byte_rows], ids=str)
def test_integer_products_on_tensor_cores(case, m):
    w, values = random_weight(case, 1024, 640)
    if reason := unsupported(w.layout, jnp.int8):
        pytest.skip(reason)
    x = generator("gpu integers", m).integers(-128, 128, (m, 1024))
    y = mma_matmul(jnp.asarray(x, jnp.int8), w)
    assert error(y.sum(axis=0), x.astype(np.float64) @ values) < BOUND


@pytest.mark.parametrize(("m", "k"), [(65, 1000), (400, 4096)])
def test_float8_in_blocks(m, k):
    w, values = random_weight(next(c for c in CASES if c.block_size == (128, 128)), k, 640)
    if reason := float8_blocks.unsupported(w.layout):
        pytest.skip(reason)
    rng = generator("gpu float8", m)
    x = jnp.asarray(rng.normal(size=(m, k)) * 20, jnp.float8_e4m3fn)
    scale = jnp.asarray(rng.uniform(0.01, 0.1, (m, -(-k // 128))), jnp.float32)
    wanted = np.asarray(x, np.float64) * np.repeat(np.asarray(scale), 128, axis=1)[:, :k] @ values
    for dtype, bound in ((jnp.float32, 2e-3), (jnp.bfloat16, 5e-3)):  # sums of 14 bits
        y = float8_blocks.float8_blocks(x, scale, w, dtype)
        assert error(y, wanted) < bound
        np.testing.assert_array_equal(y, float8_blocks.float8_blocks(x, scale, w, dtype))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_experts(case):
    w, values = random_weight(case, 512, 384, (3,))
    shared, shared_values = random_weight(case, 512, 256)
    x = jnp.asarray(generator("gpu experts").normal(size=(2, 512)), jnp.float16)
    index = np.asarray([2, 0, 0, 1], np.int32)
    y, z = gathered_matrix_vector(x, w, jnp.asarray(index), shared=(x, shared))
    rows = np.asarray(x, np.float64)
    picked = np.einsum("pk,pkn->pn", np.repeat(rows, 2, axis=0), values[index])
    assert error(y.sum(axis=0), picked) < BOUND
    assert error(z.sum(axis=0), rows @ shared_values) < BOUND


def test_experts_on_tensor_cores():
    w, values = random_weight(CASES[4], 512, 384, (3,))
    index = np.asarray([2, 0, 0, 1, *[2] * 16], np.int32)
    x = jnp.asarray(generator("gpu experts").normal(size=(20, 512)), jnp.bfloat16)
    y = gathered_mma(x, w, jnp.asarray(index))
    picked = np.einsum("pk,pkn->pn", np.asarray(x, np.float64), values[index])
    assert error(y.sum(axis=0), picked) < 3e-5


@pytest.mark.parametrize("name", ["C16", "C8", "Cfp8", "C4"])
def test_append(name):
    spec = parse_format(name)
    rng = generator("gpu append", name)
    parts = jnp.asarray(rng.normal(size=(2, 3, (4 + 2 * 2) * 128)), jnp.float32)
    angle = rng.uniform(0, 6, (3, 64))
    angles = [jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin)]
    side = kernel_arrays(quantize_cache(jnp.zeros((3, 2, 40, 128), jnp.float16), spec))
    options = {"heads": 4, "interleaved": False, "dtype": jnp.float16}
    slots = jnp.asarray([0, 39, 7], jnp.int32)
    found = append(parts, *angles, slots, side, side, **options)
    wanted = append_reference(parts, *angles, slots, side, side, **options)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        # The rotation may differ by a bit of float16, and a code by one.
        bound = 2e-3 if jnp.issubdtype(one.dtype, jnp.floating) else 1
        packed = name == "C4" and one.ndim == 4 and bound == 1  # two codes in a byte
        one, other = (np.asarray(a).astype(np.float64) for a in (one, other))
        if packed:
            one, other = (np.stack([a % 16, a // 16]) for a in (one, other))
        assert np.abs(one - other).max() <= bound


@pytest.mark.parametrize("group", [1, 2, 5, 8])
@pytest.mark.parametrize("name", ["C16", "C8", "Cfp8", "C4"])
def test_attention(name, group):
    spec = parse_format(name)
    rng = generator("gpu attention", name, group)
    q, k, v = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((3, 1, 2 * group, 128), (3, 2, 700, 128), (3, 2, 700, 128))
    )
    if spec is None:
        k, v = k.astype(jnp.float16), v.astype(jnp.float16)
    k, v = quantize_cache(k, spec), quantize_cache(v, spec)
    lengths = jnp.asarray([700, 333, 1], jnp.int32)
    y = fdq.attention(q, k, v, lengths=lengths, implementation="mosaic_gpu")
    with jax.default_device(jax.devices("cpu")[0]):
        host = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), (q, k, v, lengths))
        wanted = ops.attention_reference(*host[:3], lengths=host[3])
    assert error(y, np.asarray(wanted, np.float64)) < BOUND


def test_routing():
    rng = generator("gpu routing")
    x = jnp.asarray(rng.normal(size=(3, 2560)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(2560, 64)), jnp.float32)
    logits = router_logits(x, kernel)
    wanted = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    assert error(logits.sum(axis=0)[:, :64], wanted) < BOUND
    found = top_k_experts(logits, None, experts=64, top_k=6)
    reference = top_k_experts_reference(logits, None, experts=64, top_k=6)
    np.testing.assert_array_equal(found[0], reference[0])
    assert error(found[1], np.asarray(reference[1], np.float64)) < BOUND


@pytest.mark.parametrize("scheme", ["W4A16C8-g64", "W8A8C4"])
def test_a_decoder_uses_kernels_by_itself_and_none_is_switched_off(scheme):
    config = DecoderConfig(
        model_type="llama",
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        rms_norm_epsilon=1e-6,
        rotary=RotaryConfig(),
        dtype="float16",
    )
    model = fdq.quantize(Decoder(config, rngs=nnx.Rngs(params=0)), scheme)
    wanted = fdq.generate(model, [[1, 2, 3, 4]], 8)
    found = fdq.generate(fdq.prepare(model), [[1, 2, 3, 4]], 8)
    assert len(found[0]) == len(wanted[0]) == 8
    assert found[0][0] == wanted[0][0]
    assert self_check._RESULTS
    assert not any(self_check._RESULTS.values())
