"""`matmul` of many rows on GPUs: a kernel decodes the weight, a library multiplies it.

Nothing decoded stays: each weight is written when its rows are there, into the memory that the one
before it had, and read by one product. Where both sides are float8, or int8 with scales per
channel, the library multiplies the codes; float8 in blocks is multiplied by a kernel on Hopper.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from fdq.formats.qtensor import QuantizedWeight
from fdq.ops import self_check
from fdq.ops.activation import activation_values, quantize_activation
from fdq.ops.choice import compute_capability, trace_target, traced_for
from fdq.ops.dots import exact_dot
from fdq.ops.kernels import Kernel
from fdq.ops.matmul import check_cases, float8_blocks, mosaic_gpu
from fdq.ops.matmul.mosaic_gpu import preferred, unprepared
from fdq.ops.matmul.product import Product, takes_integers
from fdq.ops.matmul.xla import compute_dtype
from fdq.ops.placement import sharded
from fdq.ops.prepared_weight import WordsWeight, kernel_weight
from fdq.ops.rows import as_array, flattened
from fdq.schemes.scheme import WeightSpec
from pallas_kernels.device import MOST_ROWS, default_device

if TYPE_CHECKING:
    from pallas_kernels.weights.kernel_weight import KernelWeight

KERNEL = "decode_weight"
"""Its name in the tuning table."""

_TOLERANCE = 0.01  # of 16-bit floats that may be rounded to either side


class Decoded(Kernel[Product]):
    """Two launches: a decoding kernel, and a product of the library's."""

    name = "decoded"

    def unsupported(self, arguments: Product) -> str | None:
        """Arrays, weights that no kernel reads, unknown numbers of rows, and sharded arrays."""
        a = arguments
        if not isinstance(a.w, QuantizedWeight):
            return "the weight is an array: there is nothing to decode"
        if not isinstance(a.rows, int) or not a.rows:
            return f"a known number of rows is decoded for, found {a.rows}"
        return WordsWeight.unsupported(a.w) or sharded(a.x, a.w)

    def declined(self, arguments: Product) -> str | None:
        """Few rows, canonical weights, what is slower than XLA, and what is wrong here."""
        a = arguments
        if a.rows <= MOST_ROWS:
            return f"{a.rows} rows are few: XLA decodes as it multiplies"
        return unprepared(a.w) or preferred(KERNEL, a.w, a.rows, self_check_of(a.w.spec))

    def __call__(self, arguments: Product) -> jax.Array:
        """One part, `[1, ..., N]`, float32; of the wanted dtype where the library rounds to it."""
        a, weight = arguments, kernel_weight(arguments.w)
        x = flattened(as_array(a.x))
        # Partial sums of a mesh are added up before they are rounded.
        out = a.dtype if jax.sharding.get_abstract_mesh().empty else jnp.dtype(jnp.float32)
        if a.activation is None:
            y = decoded_product(x, weight, out)
        else:
            codes, scale = quantize_activation(x, a.activation, a.activation_scale, path=a.path)
            if float8_blocks.unsupported(a, weight) is None:
                y = float8_blocks.product(codes, scale, weight, out)
            elif a.activation.granularity == "token_group":
                values = activation_values(codes, scale, a.activation.group_size, x.dtype)
                y = decoded_product(values, weight, out)
            elif _multiplies_codes(a, codes.dtype, weight):
                y = _codes_product(codes, weight) * scale
            else:
                rows = codes.astype(compute_dtype(x.dtype, trace_target()))
                y = decoded_product(rows, weight, jnp.float32) * scale
        return y.reshape(1, *a.x.shape[:-1], y.shape[-1])


def decoded_product(x: jax.Array, w: KernelWeight, out_dtype: Any) -> jax.Array:
    """Rows `[M, K]` times a weight -> `[M, N]`, `out_dtype` where no scale is left, else float32.

    Operands are rounded to the dtype that `compute_dtype` says; sums are float32.
    """
    return _decoded_product(x, w, jnp.dtype(out_dtype).name, traced_for())


@functools.partial(jax.jit, static_argnums=(2, 3))
def _decoded_product(x: jax.Array, w: KernelWeight, out_dtype: str, _: Hashable) -> jax.Array:
    """Traced once for all layers whose weights are alike."""
    layout, dtype = w.layout, compute_dtype(x.dtype, trace_target())
    exponent = None
    if dtype == jnp.float16 and x.dtype != jnp.float16:
        # Outliers of a bfloat16 model pass 65504; dividing by a power of two rounds nothing.
        x = x.astype(jnp.float32)
        exponent = jnp.frexp(jnp.max(jnp.abs(x), axis=-1, keepdims=True))[1]
        x = jnp.ldexp(x, -exponent)
    x = _padded_rows(x.astype(dtype), w)
    decoded, after = decoded_operand(w, dtype, x)
    final = after is None and exponent is None and dtype.itemsize == 2 and out_dtype == dtype.name
    # A library sums in float32 whatever it rounds to.
    y = lax.dot(x, decoded, preferred_element_type=dtype) if final else exact_dot(x, decoded)
    y = y if after is None else y * after
    y = y if exponent is None else jnp.ldexp(y, exponent)
    return y[:, : layout.n]


def decoded_operand(
    w: KernelWeight, dtype: Any, after: jax.Array, **experts: Any
) -> tuple[jax.Array, jax.Array | None]:
    """A weight `[..., K', N']` of a dtype, and what multiplies the product's columns, or None."""
    from pallas_kernels.matmul.decode import decode_weight
    from pallas_kernels.weights.decoded_weight import group_scales

    factor = largest = None
    if dtype == jnp.float16 and w.scale is not None:
        # Scales relative to the largest of their channel keep weights inside float16's range.
        largest = jnp.max(jnp.abs(group_scales(w)), axis=-2, keepdims=True)
        largest = jnp.where(largest == 0, jnp.float32(1), largest)
        factor = 1 / largest
    decoded = decode_weight(w, dtype, after=after, factor=factor, **experts)
    found = [a for a in (largest, w.column_scale) if a is not None]
    return decoded, functools.reduce(jnp.multiply, found) if found else None


def _padded_rows(x: jax.Array, w: KernelWeight) -> jax.Array:
    """Zeros for the rows of K that fill the last segment."""
    missing = w.layout.segments * w.layout.segment - x.shape[-1]
    return jnp.pad(x, [(0, 0), (0, missing)]) if missing else x


# e4m3 and e5m2 as four consecutive rows of a word, and int8: what libraries multiply as it is.
_CODES = {"float8_e4m3": jnp.float8_e4m3fn, "float8_e5m2": jnp.float8_e5m2, "int8": jnp.int8}


def _multiplies_codes(a: Product, rows_dtype: Any, w: KernelWeight) -> bool:
    """Whether a library multiplies codes of rows and of the weight as they are."""
    layout = w.layout
    codes = _CODES.get(layout.format)
    if codes is None or layout.group is not None or layout.zero_point != "none":
        return False
    if codes == jnp.int8:
        return takes_integers(a.w, a.activation)
    # cuBLAS multiplies float8 from Ada on, in sixteens.
    if rows_dtype != jnp.float8_e4m3fn or compute_capability() < 8.9 or w.words.shape[-2] % 4:
        return False
    return float8_check(layout.format).failure(default_device()) is None


@jax.jit
def _codes_product(codes: jax.Array, w: KernelWeight) -> jax.Array:
    """Codes `[M, K]` times the codes of a weight, float32 `[M, N]` with the scale of columns."""
    from pallas_kernels.weights.word_format import turned_bytes

    codes = _padded_rows(codes, w)
    codes, words = lax.optimization_barrier((codes, w.words))  # as in `_quantized_product`
    dtype = _CODES[w.layout.format]
    integers = dtype == jnp.int8
    right = turned_bytes(words, dtype)
    if integers:  # offset binary; bytes, as XLA makes two passes of one over words and their turn
        right = right ^ jnp.int8(-128)
    y = lax.dot_general(
        codes,
        right,
        (((1,), (1,)), ((), ())),
        # Of float8: without it Hopper's sums have 14 bits.
        precision=None if integers else lax.Precision.HIGHEST,
        preferred_element_type=jnp.int32 if integers else jnp.float32,
    )
    return (y.astype(jnp.float32) * w.column_scale)[:, : w.layout.n]


def self_check_of(spec: WeightSpec) -> self_check.Check:
    """The self-check of the decoding kernel, with weights of a spec."""
    return mosaic_gpu.self_check_of(
        KERNEL, spec, functools.partial(_decoding_case, spec), _TOLERANCE
    )


def float8_check(format: str) -> self_check.Check:
    """That the library's product of codes with such a float8 format's is right."""
    return self_check.Check("float8_product", format, functools.partial(_float8_case, format))


def _decoding_case(spec: WeightSpec) -> tuple[Any, Any]:
    """Both widths of blocks that weights are decoded in, scaled float16, and of a stack a part."""
    from pallas_kernels.matmul.decode import decode_weight, decode_weight_reference

    dtype = compute_dtype(jnp.bfloat16, trace_target())
    wide, narrow = (kernel_weight(check_cases.sample(spec, columns)) for columns in (1024, 256))
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), narrow)
    counts = jnp.asarray([0, 3], jnp.int32)
    k, n = narrow.shape
    factor = jnp.linspace(0.01, 0.02, narrow.layout.padded_n, dtype=jnp.float32)[None]
    results = [decode_weight(w, dtype)[:k] for w in (wide, narrow)]
    results.append(decode_weight(narrow, jnp.float16, factor=factor)[:k])
    results.append(decode_weight(stack, dtype, counts=counts)[1, :k, :n])
    results.append(decode_weight(stack, dtype, counts=counts, experts=(1, 1))[0, :k, :n])
    wanted = [decode_weight_reference(w, dtype) for w in (wide, narrow)]
    wanted.append(decode_weight_reference(narrow, jnp.float16, factor=factor))
    pairs = results, [*wanted, wanted[1], wanted[1]]
    return jax.tree.map(lambda a: a.astype(jnp.float32), pairs)


def _float8_case(format: str) -> tuple[Any, Any]:
    from pallas_kernels.weights.decoded_weight import decoded_weight

    spec = WeightSpec(format=format, granularity="channel")
    w = kernel_weight(check_cases.sample(spec, 256))
    rows = jax.random.normal(jax.random.key(1), (128, w.shape[0])).astype(jnp.float8_e4m3fn)
    wanted = exact_dot(rows.astype(jnp.float32), decoded_weight(w))
    return _codes_product(rows, w), wanted
