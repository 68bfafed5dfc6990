"""The shapes that matrix-vector kernels are compiled for ahead of time.

One representative case for each kernel and format, and the layers of published models besides.
Shapes are ``K x N`` of a weight: Llama-3-8B's fused query, key and value projection is 4096 x 6144.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.aot.kernel_cases import (
    KernelCase,
    Program,
    abstract,
    activation_dtype,
    dot_weights,
    fma_weights,
)
from pallas_kernels.matmul.gathered import gathered_matrix_vector
from pallas_kernels.matmul.integer import integer_matrix_vector
from pallas_kernels.matmul.matrix_vector import matrix_vector
from pallas_kernels.matmul.row_sources import Gated, Normed
from pallas_kernels.weights.kernel_weight import to_kernel
from pallas_kernels.weights.word_format import WORD_FORMATS

_REPRESENTATIVE = (4096, 6144)
_LAYERS = {
    "Llama-3-8B gate and up": (4096, 28672),
    "Llama-3-8B down": (14336, 4096),
    "Qwen3-32B o": (8192, 5120),
    "ERNIE-4.5-21B qkv": (2560, 3584),
    "ERNIE-4.5-300B qkv": (8192, 10240),
}
# Three FFMA and LOP3 a weight and what they share; above five, an H200 is below 74 % of its memory.
_INT4_LIMIT = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Weight:
    """A way to store a weight: the arguments of `to_kernel`, and dtypes of its arrays."""

    format: str
    bits: int
    granularity: str = "group"
    group_size: int | None = None
    block_size: tuple[int, int] | None = None
    zero_point: str = "none"
    code_dtype: str = "uint8"
    scale_dtype: str = "bfloat16"
    extras: tuple[str, ...] = ()
    limit: float | None = None

    def arrays(self, k: int, n: int, *experts: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The canonical arrays, abstract, with leading axes or none."""
        packed = self.code_dtype == "uint8"
        rows = k * self.bits // 8 if packed else k
        scale_rows = {"group": k // (self.group_size or k), "channel": 1}.get(self.granularity, 1)
        scale_shape = (scale_rows, n)
        if self.block_size is not None:
            scale_shape = (k // self.block_size[0], n // self.block_size[1])
        scale = abstract(scale_shape, self.scale_dtype)
        if self.scale_dtype == "uint4":  # two in a byte
            scale = abstract((scale_rows // 2, n), "uint8")
        arrays = {"codes": abstract((rows, n), self.code_dtype), "scale": scale}
        if self.zero_point == "integer":
            arrays["zero"] = abstract(scale_shape, "uint8")
        for name in self.extras:
            arrays[name] = abstract((1, 1 if name == "global_scale" else n), "float32")
        return {name: abstract((*experts, *a.shape), a.dtype) for name, a in arrays.items()}

    def kernel_weight(self, k: int, n: int, *experts: int) -> Any:
        """The weight in the kernel's layout, abstract."""
        convert = functools.partial(
            to_kernel,
            format=self.format,
            granularity=self.granularity,
            group_size=self.group_size,
            block_size=self.block_size,
            zero_point=self.zero_point,
            k=k,
            n=n,
        )
        return jax.eval_shape(convert, self.arrays(k, n, *experts))

    def bytes_per_weight(self) -> float:
        """Stored bytes, scales included."""
        k, n = 4096, 4096
        total = sum(a.size * a.dtype.itemsize for a in self.arrays(k, n).values())
        return total / (k * n)


_CHANNEL: dict[str, Any] = {"granularity": "channel", "scale_dtype": "float32"}
_WEIGHTS = {
    "int8 per channel": _Weight(format="int8", bits=8, code_dtype="int8", **_CHANNEL),
    "int8 groups of 128": _Weight(format="int8", bits=8, code_dtype="int8", group_size=128),
    "int4 groups of 128": _Weight(format="int4", bits=4, group_size=128, limit=_INT4_LIMIT),
    "int4 groups of 128, zero points": _Weight(
        format="int4", bits=4, group_size=128, zero_point="integer", limit=_INT4_LIMIT
    ),
    "int4 per channel": _Weight(format="int4", bits=4, limit=_INT4_LIMIT, **_CHANNEL),
    "int3 groups of 128": _Weight(format="int3", bits=3, group_size=128),
    "int2 groups of 128": _Weight(format="int2", bits=2, group_size=128, zero_point="half"),
    "WINT2's code": _Weight(
        format="cc2",
        bits=2,
        group_size=64,
        scale_dtype="uint4",
        extras=("code_scale", "code_offset", "super_scale"),
    ),
    "NF4 groups of 64": _Weight(format="nf4", bits=4, group_size=64),
    "fp8 per channel": _Weight(
        format="float8_e4m3", bits=8, code_dtype="float8_e4m3fn", **_CHANNEL
    ),
    "fp8 blocks of 128": _Weight(
        format="float8_e4m3",
        bits=8,
        granularity="block",
        block_size=(128, 128),
        code_dtype="float8_e4m3fn",
        scale_dtype="float32",
    ),
    "MXFP4": _Weight(format="mxfp4", bits=4, group_size=32, scale_dtype="float8_e8m0fnu"),
    "NVFP4": _Weight(
        format="nvfp4",
        bits=4,
        group_size=16,
        scale_dtype="float8_e4m3fn",
        extras=("global_scale",),
    ),
    "MXFP8": _Weight(
        format="mxfp8",
        bits=8,
        group_size=32,
        code_dtype="float8_e4m3fn",
        scale_dtype="float8_e8m0fnu",
    ),
}


def kernel_cases() -> list[KernelCase]:
    """Dense products, of int8 activations too, an MLP, and experts."""
    return [
        *_matrix_vector_cases(),
        *_integer_cases(),
        *_mlp_cases(),
        *_experts_cases(),
    ]


def _readable() -> list[str]:
    """The ways to store a weight that kernels read."""
    return [name for name, weight in _WEIGHTS.items() if weight.format in WORD_FORMATS]


def _matrix_vector_cases() -> list[KernelCase]:
    def case(name: str, rows: int, k: int, n: int, *, label: str = "") -> KernelCase:
        weight = _WEIGHTS[name]
        return KernelCase(
            name=f"matrix-vector {name}, {rows} x {k} x {n}{label}",
            kernel=f"matrix-vector {name}",
            build=functools.partial(_matrix_vector, weight, rows, k, n),
            representative=not label and rows == 1,
            weights_per_iteration=fma_weights(rows),
            bytes_per_weight=weight.bytes_per_weight(),
            instruction_limit=weight.limit if rows == 1 else None,
        )

    cases = [case(name, rows, *_REPRESENTATIVE) for name in _readable() for rows in (1, 2, 4, 8)]
    return cases + [
        case("int4 groups of 128", 1, k, n, label=f" ({layer})")
        for layer, (k, n) in _LAYERS.items()
    ]


def _matrix_vector(weight: _Weight, rows: int, k: int, n: int) -> Program:
    x = abstract((rows, k), activation_dtype())
    return Program(function=_product, arguments=(x, weight.kernel_weight(k, n)))


def _product(x: jax.Array, w: Any) -> jax.Array:
    return matrix_vector(x, w).sum(0)


def _integer_cases() -> list[KernelCase]:
    """int8 activations."""

    def case(name: str, rows: int) -> KernelCase:
        weight = _WEIGHTS[name]
        k, n = _REPRESENTATIVE
        return KernelCase(
            name=f"int8 x {name}, {rows} x {k} x {n}",
            kernel=f"int8 x {name}",
            build=functools.partial(_integer, weight, rows, k, n),
            representative=rows == 1,
            weights_per_iteration=dot_weights(rows),
            bytes_per_weight=weight.bytes_per_weight(),
            report="integer_matrix_vector",
        )

    names = ("int8 per channel", "int4 groups of 128", "int4 per channel", "int2 groups of 128")
    return [case(name, rows) for name in names for rows in (1, 8)]


def _integer(weight: _Weight, rows: int, k: int, n: int) -> Program:
    arguments = (abstract((rows, k), "int8"), weight.kernel_weight(k, n))
    return Program(function=integer_matrix_vector, arguments=arguments)


def _mlp_cases() -> list[KernelCase]:
    """Rows that are normalized, and gated, as the products read them: Llama-3-8B's MLP."""
    return [
        KernelCase(
            name=f"MLP int4 groups of 128, {rows} x 4096 x 14336",
            kernel="MLP int4 groups of 128",
            build=functools.partial(_mlp, _WEIGHTS["int4 groups of 128"], rows, 4096, 14336),
            representative=rows == 1,
        )
        for rows in (1, 2, 8)
    ]


def _mlp(weight: _Weight, rows: int, hidden: int, inner: int) -> Program:
    dtype = activation_dtype()
    return Program(
        function=functools.partial(_mlp_step, dtype),
        arguments=(
            abstract((rows, hidden), dtype),
            abstract((hidden,), dtype),
            weight.kernel_weight(hidden, 2 * inner),
            weight.kernel_weight(inner, hidden),
        ),
    )


def _mlp_step(dtype: str, x: Any, scale: Any, gate_up: Any, down: Any) -> jax.Array:
    partials = matrix_vector(Normed(x, scale, 1e-6), gate_up)
    return matrix_vector(Gated(partials, jnp.dtype(dtype)), down)


def _experts_cases() -> list[KernelCase]:
    """Experts of ERNIE-4.5-21B-A3B, 6 of 64 picked, the shared ones along.

    The down product stands for both: its rows are gated as they are read. Both in a row are a case
    of some formats besides.
    """

    def case(name: str, tokens: int, *, both: bool = False) -> KernelCase:
        weight = _WEIGHTS[name]
        return KernelCase(
            name=f"experts {name}, {tokens} x 6 of 64{', both products' if both else ''}",
            kernel=f"experts {name}",
            build=functools.partial(_experts, weight, tokens, both),
            representative=tokens == 1 and not both,
            weights_per_iteration=fma_weights(1),
            bytes_per_weight=weight.bytes_per_weight(),
            instruction_limit=weight.limit,
        )

    often = ("int4 groups of 128", "int8 per channel", "WINT2's code")
    return [
        *(case(name, 1) for name in _readable()),
        *(case(name, tokens, both=True) for name in often for tokens in (1, 4)),
    ]


def _experts(weight: _Weight, tokens: int, both: bool) -> Program:
    experts, picks, hidden, inner = 64, 6, 2560, 1536
    dtype = activation_dtype()
    index = abstract((tokens * picks,), "int32")
    down = (weight.kernel_weight(inner, hidden, experts), weight.kernel_weight(2 * inner, hidden))
    gate_up: tuple[Any, ...]
    if both:
        gate_up = (
            abstract((tokens, hidden), dtype),
            weight.kernel_weight(hidden, 2 * inner, experts),
            weight.kernel_weight(hidden, 4 * inner),
        )
        function = _both_products
    else:
        gate_up = (
            abstract((2, tokens * picks, 2 * inner), "float32"),
            abstract((2, tokens, 4 * inner), "float32"),
        )
        function = _down_product
    return Program(function=functools.partial(function, dtype), arguments=(index, *gate_up, *down))


def _both_products(
    dtype: str,
    index: Any,
    x: Any,
    gate_up: Any,
    shared_gate_up: Any,
    down: Any,
    shared_down: Any,
) -> Any:
    picked, shared = gathered_matrix_vector(x, gate_up, index, shared=(x, shared_gate_up))
    return _down_product(dtype, index, picked, shared, down, shared_down)


def _down_product(
    dtype: str, index: Any, picked: Any, shared: Any, down: Any, shared_down: Any
) -> Any:
    kind = jnp.dtype(dtype)
    return gathered_matrix_vector(
        Gated(picked, kind), down, index, shared=(Gated(shared, kind), shared_down)
    )
