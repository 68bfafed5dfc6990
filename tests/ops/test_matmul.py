"""matmul means x @ dequantize(q), in every format, program, transformation and sharding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fdq
from fdq import ops
from fdq.formats.qtensor import dequantize
from fdq.ops import preparation
from fdq.ops.choice import Target
from fdq.ops.matmul import xla
from tests.closeness import error
from tests.covering import covering, slow, slow_but
from tests.formats.cases import PRODUCTS, VARIED, quantized
from tests.ops.products import TOLERANCE, decoded, rows

FORMULATIONS = (("fused", 4), ("tiles", 200), ("whole", 0))

every_product = pytest.mark.parametrize(
    "name",
    covering(
        PRODUCTS, lambda n: (PRODUCTS[n].format, PRODUCTS[n].granularity, PRODUCTS[n].zero_point)
    ),
)

varied_products = pytest.mark.parametrize("name", slow_but(VARIED, PRODUCTS))


@functools.cache
def compiled(program):
    """One jit per program: it is compiled once per format and number of rows."""

    def product(x, q):
        with ops.forced_program(*program):
            return fdq.matmul(x, q)

    return jax.jit(product)


@every_product
def test_equals_the_decoded_product(name, rng):
    q = quantized(name)
    for program, m in zip(FORMULATIONS, (1, 3, 3), strict=True):
        x = rows(rng, m)
        y = compiled(program)(x, q)
        assert y.dtype == jnp.float32
        assert error(y, np.asarray(x, np.float64) @ decoded(name)) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "program"),
    [
        ("nf4-g64", ("lookup", 8)),
        slow("int4-g32-asym", ("lookup", 3)),
        slow("nvfp4", ("lookup", 8)),
        slow("int2-g32-half", ("lookup", 4)),
        ("nf4-g64-dq", ("table", 128)),
        slow("fp8", ("table", 100)),
        ("int4-g64", ("split", 128)),
        ("int4-g64-affine", ("split", 128)),
        slow("int4-g64-affine", ("blocks", 128)),
        slow("int8-g16-affine", ("blocks", 100)),
        slow("int8-g16-affine", ("split", 100)),
        slow("int3-channel-affine", ("table", 64)),
        slow("int4-g64-affine", ("lookup", 3)),
        slow("int8", ("split", 96)),
        slow("int4-channel", ("split", 64)),
        slow("int2-g32-half", ("split", 512)),
        ("int3-g64", ("blocks", 192)),
        slow("int8", ("blocks", 100)),
        slow("fp8-block", ("blocks", 128)),
    ],
)
def test_other_programs_equal_the_decoded_product(name, program, rng):
    """Blocks of K that do not divide it included."""
    for m in (1, 3):
        x = rows(rng, m).at[0, 0].set(100.0)
        y = compiled(program)(x, quantized(name))
        assert error(y, np.asarray(x, np.float64) @ decoded(name)) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "size"), [("nf4-g64", 8), slow("int4-g32-asym", 3), slow("nvfp4", 16)]
)
@pytest.mark.parametrize("m", [2, 5])
def test_lookups_shared_by_two_rows(name, size, m, rng):
    """Each row has its own size: the smallest is not rounded by the largest."""
    sizes = 10.0 ** np.linspace(-25, 25, m, dtype=np.float32)[:, None]
    x = rows(rng, m) * sizes
    y = compiled(("lookup", size))(x, quantized(name))
    wanted = np.asarray(x, np.float64) @ decoded(name)
    for got, row in zip(y, wanted, strict=True):
        assert error(got, row) < TOLERANCE


@pytest.mark.parametrize("m", [1, 2])
def test_an_outlier_costs_other_blocks_nothing(m, rng):
    """Two rows count in steps of the largest value of a block of rows of K, not of all of K."""
    q = fdq.quantize(jnp.asarray(rng.standard_normal((256, 64)), jnp.float32), "WNF4A16-g256")
    x = rows(rng, m).at[:, 3].set(1e6)
    decoded_rows = np.asarray(dequantize(q), np.float64)
    y = compiled(("lookup", 2))(x, q)
    # What is left without the outlier's own column of products.
    rest = np.asarray(y, np.float64) - np.asarray(x, np.float64)[:, 3:4] * decoded_rows[3]
    wanted = np.asarray(x.at[:, 3].set(0.0), np.float64) @ decoded_rows
    zero = np.abs(decoded_rows[3]) == 0
    assert zero.any()
    assert np.abs(rest - wanted)[:, zero].max() < 0.015


def test_lookups_of_rows_that_are_zero_or_not_finite(rng):
    x = rows(rng, 4).at[0].set(0.0).at[1, 7].set(jnp.nan).at[2, 9].set(jnp.inf)
    y = np.asarray(compiled(("lookup", 8))(x, quantized("nf4-g64")))
    assert np.all(y[0] == 0.0)
    assert not np.isfinite(y[1]).any()
    assert not np.isfinite(y[2]).any()
    assert error(y[3], np.asarray(x[3], np.float64) @ decoded("nf4-g64")) < TOLERANCE


def test_lookups_in_transformations(rng):
    """The 64-bit sums inside are nobody else's business: vmap, scan, remat, export, one program."""
    q, x = quantized("nf4-g64"), rows(rng, 6).reshape(3, 2, -1)

    def product(x):
        with ops.forced_program("lookup", 8):
            return fdq.matmul(x, q)

    @jax.jit
    def program(x):
        _, scanned = jax.lax.scan(lambda carry, row: (carry, product(row)), 0, x)
        _, tangent = jax.jvp(jax.checkpoint(product), (x[0],), (x[1],))
        return scanned, jax.vmap(product)(x), tangent

    wanted = np.asarray(x, np.float64) @ decoded("nf4-g64")
    exported = jax.export.export(program)(jax.ShapeDtypeStruct(x.shape, x.dtype))
    scanned, mapped, tangent = exported.call(x)
    assert error(scanned, wanted) < TOLERANCE
    assert error(mapped, wanted) < TOLERANCE
    assert error(tangent, wanted[1]) < TOLERANCE
    with jax.disable_jit(), jax.enable_x64(True):
        assert error(product(x[0]), wanted[0]) < TOLERANCE


@varied_products
def test_transformations(name, rng):
    """jit, vmap over x, vmap over stacked weights, and the gradient, in one compiled program.

    N is odd, and K where no group must divide it: 331 rows fill neither a packed unit nor a block.
    """
    k, n = (384 if PRODUCTS[name].granularity == "group" else 331), 131
    q = quantized(name, k, n)
    assert q.shape == (k, n)
    stack = jax.tree.map(lambda a: jnp.stack([a, a[:, ::-1]]), q)
    x, direction = rows(rng, 2, k), rows(rng, 2, n)

    @jax.jit
    def program(x, q, stack, direction):
        over_x = jax.vmap(fdq.matmul, in_axes=(0, None))(x, q)
        over_both = jax.vmap(fdq.matmul)(x, stack)
        y, pull_back = jax.vjp(lambda x: fdq.matmul(x, q), x)
        return y, over_x, over_both, pull_back(direction)[0]

    y, over_x, over_both, gradient = program(x, q, stack, direction)
    w = decoded(name, k, n)
    expected = np.asarray(x, np.float64) @ w
    assert error(y, expected) < TOLERANCE
    assert error(over_x, expected) < TOLERANCE
    assert error(over_both[0], expected[0]) < TOLERANCE
    assert error(gradient, np.asarray(direction, np.float64) @ w.T) < TOLERANCE
    if name not in ("fp8-block", "nf4-g64-dq"):  # their scales span columns
        assert error(over_both[1], expected[1, ::-1]) < TOLERANCE


def _partition(q):
    """K over mesh axis "k" and N over "n"; scales coarser than a shard are replicated."""
    return jax.tree.map(
        lambda a: P("k" if a.shape[0] % 2 == 0 else None, "n" if a.shape[1] % 4 == 0 else None), q
    )


@varied_products
def test_sharded_over_eight_devices(name, rng):
    q, x = quantized(name), rows(rng, 3)
    expected = np.asarray(x, np.float64) @ decoded(name)
    mesh = jax.make_mesh((2, 4), ("k", "n"), axis_types=(AxisType.Auto,) * 2)
    partition = _partition(q)
    shards = jax.device_put(q, jax.tree.map(lambda s: NamedSharding(mesh, s), partition))
    x_shards = jax.device_put(x, NamedSharding(mesh, P(None, "k")))
    y = jax.jit(fdq.matmul)(x_shards, shards)
    assert error(y, expected) < TOLERANCE

    if name == "nf4-g64-dq":
        return  # a scale of scales spans 256 columns, two shards
    local = jax.shard_map(
        lambda x, q: jax.lax.psum(fdq.matmul(x, q), "k"),
        mesh=mesh,
        in_specs=(P(None, "k"), partition),
        out_specs=P(None, "n"),
    )
    assert error(jax.jit(local)(x_shards, shards), expected) < TOLERANCE


@pytest.mark.parametrize("name", ["int4-g64", "fp8-block"])
def test_explicit_mesh_axes(name, rng):
    q, x = quantized(name), rows(rng, 3)
    mesh = jax.make_mesh((2, 4), ("k", "n"), axis_types=(AxisType.Explicit,) * 2)
    shards = jax.device_put(q, jax.tree.map(lambda s: NamedSharding(mesh, s), _partition(q)))
    x_shards = jax.device_put(x, NamedSharding(mesh, P(None, "k")))
    with jax.set_mesh(mesh):
        y = jax.jit(fdq.matmul)(x_shards, shards)
    assert y.sharding.spec == P(None, "n")
    assert error(y, np.asarray(x, np.float64) @ decoded(name)) < TOLERANCE


@pytest.mark.parametrize("k, n", [(96, 1), (7, 3)])
@pytest.mark.parametrize("name", ["int8 channel", "int4 channel", "int3 channel", "fp8 block"])
def test_odd_shapes(name, k, n, rng):
    """One column; K that does not fill the last packed unit or block; leading axes of x."""
    from fdq.quantizers import quantize_array
    from fdq.schemes.scheme import WeightSpec

    spec = {
        "int8 channel": WeightSpec(format="int8"),
        "int4 channel": WeightSpec(format="int4"),
        "int3 channel": WeightSpec(format="int3"),
        "fp8 block": WeightSpec(format="float8_e4m3", granularity="block", block_size=(32, 4)),
    }[name]
    w = jnp.asarray(rng.standard_normal((k, n)), jnp.float32)
    q = quantize_array(w, spec, method="absmax")
    x = jnp.asarray(rng.standard_normal((2, 1, k)), jnp.float32)
    y, one = jax.jit(lambda x, q: (fdq.matmul(x, q), fdq.matmul(x[0, 0], q)))(x, q)
    assert y.shape == (2, 1, n)
    expected = np.asarray(x, np.float64) @ np.asarray(dequantize(q), np.float64)
    assert error(y, expected) < TOLERANCE
    assert error(one, expected[0, 0]) < TOLERANCE


@pytest.mark.parametrize("activation", [None, "int8"])
def test_no_rows(activation):
    q = quantized("int4-g64")
    assert fdq.matmul(jnp.zeros((2, 0, 256)), q, activation=activation).shape == (2, 0, 512)


def test_groups_that_split_a_packed_unit(rng):
    """Groups of 6 rows of 3-bit codes: a unit of 8 rows has two scales."""
    from fdq.quantizers import quantize_array
    from fdq.schemes.scheme import WeightSpec

    spec = WeightSpec(format="int3", granularity="group", group_size=6, scale_dtype="bfloat16")
    q = quantize_array(jnp.asarray(rng.standard_normal((48, 8)), jnp.float32), spec)
    x = rows(rng, 2, 48)
    expected = np.asarray(x, np.float64) @ np.asarray(dequantize(q), np.float64)
    assert error(fdq.matmul(x, q), expected) < TOLERANCE


@pytest.mark.parametrize("name", ["int8", "int8-tensor"])
def test_prepared_weights(name, rng, monkeypatch):
    monkeypatch.setattr(preparation, "cpu_class", lambda: "amx")
    q = quantized(name)
    tree = ops.prepare({"a": q, "b": jnp.ones(3)}, "cpu")
    prepared = tree["a"]
    assert prepared.layout == "transposed" and prepared.shape == q.shape
    back = ops.unprepare(tree)["a"]
    assert back.layout == "canonical" and (back.codes == q.codes).all()
    for m in (1, 3):
        x = rows(rng, m)
        x = x.at[0, 0].set(1e4)  # the rest must not drown in the largest element's step
        expected = np.asarray(x, np.float64) @ decoded(name)
        assert error(fdq.matmul(x, prepared), expected) < TOLERANCE
    gradient = jax.grad(lambda x: fdq.matmul(x, prepared).sum())(x)
    assert error(gradient, np.broadcast_to(decoded(name).sum(1), x.shape)) < TOLERANCE
    assert ops.prepare(quantized("int4-g64"), "cpu").layout == "canonical"
    assert ops.prepare(q, "gpu").layout == "mosaic_gpu"
    monkeypatch.setattr(preparation, "cpu_class", lambda: "avx512")
    assert ops.prepare(q, "cpu").layout == "canonical"


def test_prepare_walks_modules(rng, monkeypatch):
    monkeypatch.setattr(preparation, "cpu_class", lambda: "amx")
    from flax import nnx

    class Layer(nnx.Module):
        def __init__(self):
            q = quantized("int8")
            boxed = {n: nnx.Variable(a) for n, a in q.arrays().items()}
            self.kernel = nnx.data(type(q)(**boxed, spec=q.spec))

    layer = Layer()
    prepared = ops.prepare(layer, "cpu")
    assert layer.kernel.layout == "canonical" and prepared.kernel.layout == "transposed"
    assert isinstance(prepared.kernel.data, nnx.Variable)
    x = rows(rng, 1)
    assert error(fdq.matmul(x, prepared.kernel), np.asarray(x) @ decoded("int8")) < 1e-5


def test_the_weight_is_never_decoded_whole():
    """Temporary memory of one row, and of a tile, is a fraction of the decoded weight."""
    q = quantized("int4-g64", 1024, 2048)
    for m, program in ((1, ("fused", 8)), (64, ("tiles", 256))):
        x = jax.ShapeDtypeStruct((m, 1024), jnp.float32)
        memory = compiled(program).lower(x, q).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 1024 * 2048 * 4 / 2


def test_implementation(monkeypatch):
    q, x = quantized("int8"), jnp.ones((1, 256))
    with pytest.raises(ValueError, match=r"unknown implementation 'triton'; use one of 'xla'"):
        fdq.matmul(x, q, implementation="triton")
    many = jnp.ones((65, 256))
    with pytest.raises(
        NotImplementedError, match=r"matmul\[mosaic_gpu\]: .*1 to 64 rows.*found 65"
    ):
        fdq.matmul(many, q, implementation="mosaic_gpu")
    monkeypatch.setenv("FDQ_IMPLEMENTATION", "mosaic_gpu")
    assert fdq.matmul(many, q).shape == (65, 512)  # XLA does what the kernels cannot
    monkeypatch.setenv("FDQ_IMPLEMENTATION", "cuda")
    with pytest.raises(ValueError, match="unknown FDQ_IMPLEMENTATION 'cuda'"):
        fdq.matmul(x, q)
    assert fdq.matmul(x, q, implementation="xla").shape == (1, 512)


def test_wrong_shapes():
    q = quantized("int8")
    with pytest.raises(ValueError, match=r"layer.w: matmul expects x \[..., K\]"):
        fdq.matmul(jnp.ones((1, 255)), q, path="layer.w")
    with pytest.raises(ValueError, match=r"map over leading axes with jax.vmap"):
        fdq.matmul(jnp.ones((1, 256)), jax.tree.map(lambda a: a[None], q))


@pytest.mark.parametrize("name", ["int4-g64", *map(slow, ("int8", "int3-g64", "fp8-block"))])
def test_programs_of_other_devices(name, rng, monkeypatch):
    """What GPUs run, run here: a reduction for few rows, dots in the dtype of x for more."""
    gpu = Target("gpu", has_bfloat16=True)
    monkeypatch.setattr(xla, "trace_target", lambda: gpu)
    q = quantized(name)
    for m, dtype, tolerance in (
        (1, jnp.float32, TOLERANCE),
        (3, jnp.bfloat16, TOLERANCE),
        (8, jnp.float32, TOLERANCE),
        (8, jnp.bfloat16, 2e-2),
        (8, jnp.float16, 2e-3),
    ):
        x = rows(rng, m).astype(dtype)
        y = fdq.matmul(x, q, out_dtype=jnp.float32)
        assert error(y, np.asarray(x, np.float64) @ decoded(name)) < tolerance
    if name.startswith("int"):
        codes, scale = ops.quantize_activation(x, ops.parse_activation("int8"))
        expected = np.asarray(codes, np.float64) @ decoded(name) * np.asarray(scale, np.float64)
        y = fdq.matmul(x, q, activation="int8", out_dtype=jnp.float32)
        assert error(y, expected) < 1e-6
    lowered = jax.jit(lambda x, q: fdq.matmul(x, q)).lower(x[:1], q)
    assert lowered.as_text().count("\n") < 300, "programs must not grow with K"


@pytest.mark.parametrize("m", [1, 4])
def test_a_loop_does_not_keep_decoded_weights(m):
    """XLA moves what does not change out of a loop; the decoding must stay inside."""
    q = quantized("int4-g64", 1024, 2048)

    @jax.jit
    def loop(x, q):
        def step(x, _):
            return jnp.tanh(fdq.matmul(x, q)[:, :1024]), None

        return jax.lax.scan(step, x, None, length=3)[0]

    memory = loop.lower(jnp.ones((m, 1024)), q).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1024 * 2048 * 4 / 2


@pytest.mark.parametrize(
    ("program", "scheme", "m", "n"),
    [
        # Sums of all rows together; memory of more than 32 MB is mapped anew at every call.
        (("fused", 32), "W8A16", 4, 4096),
        (("fused", 32), "W4A16", 8, 4096),
        # Blocks of few rows, where a tile of columns would be a copy of half the weight.
        (("blocks", 256), "W8A16", 4, 14336),
        (("blocks", 256), "W4A16", 4, 14336),
    ],
)
def test_temporary_memory_is_kept_from_call_to_call(program, scheme, m, n):
    x = jax.ShapeDtypeStruct((m, 4096), jnp.float32)
    q = fdq.quantize(jax.ShapeDtypeStruct((4096, n), jnp.float32), scheme)
    memory = compiled(program).lower(x, q).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 20 * 2**20
