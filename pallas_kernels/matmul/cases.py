"""The shapes that matrix-vector kernels are compiled for ahead of time.

One representative case for each kernel and format, and the layers of published models besides.
Shapes are `K x N` of a weight: Llama-3-8B's fused query, key and value projection is 4096 x 6144.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.aot.gpu_targets import ALL
from pallas_kernels.aot.kernel_cases import (
    KernelCase,
    Program,
    abstract,
    activation_dtype,
    dot_weights,
    fma_weights,
    mma_weights,
)
from pallas_kernels.matmul.decode import decode_weight
from pallas_kernels.matmul.float8_blocks import BLOCK, float8_blocks
from pallas_kernels.matmul.gathered import gathered_matrix_vector
from pallas_kernels.matmul.gathered_mma import gathered_mma
from pallas_kernels.matmul.integer import integer_matrix_vector
from pallas_kernels.matmul.matrix_vector import matrix_vector
from pallas_kernels.matmul.mma import mma_matmul
from pallas_kernels.matmul.mma_products import UNITS
from pallas_kernels.matmul.row_sources import Gated, Normed
from pallas_kernels.weights.formats import WORD_FORMATS
from pallas_kernels.weights.kernel_weight import to_kernel
from pallas_kernels.weights.layout import WeightLayout
from pallas_kernels.weights.word_format import Storage, WordFormat

_REPRESENTATIVE = (4096, 6144)
_LAYERS = {
    "Llama-3-8B gate and up": (4096, 28672),
    "Llama-3-8B down": (14336, 4096),
    "Qwen3-32B o": (8192, 5120),
    "ERNIE-4.5-21B qkv": (2560, 3584),
    "ERNIE-4.5-300B qkv": (8192, 10240),
}


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A format, and a way to store it."""

    format: WordFormat
    storage: Storage

    def layout(self, k: int, n: int) -> WeightLayout:
        """Of a weight of that size."""
        settings = dataclasses.asdict(self.storage)
        del settings["title"], settings["instruction_limit"]
        return WeightLayout(format=self.format.name, k=k, n=n, **settings)

    def arrays(self, k: int, n: int, *experts: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The canonical arrays, abstract, with leading axes or none."""
        storage = self.storage
        packed = self.format.scale_dtype is not None
        dtypes = {
            "codes": storage.code_dtype,
            "scale": "uint8" if packed else storage.scale_dtype,
            "zero": "uint8",
        }
        return {
            name: abstract((*experts, *shape), dtypes.get(name, "float32"))
            for name, shape in self.layout(k, n).canonical_shapes.items()
        }

    def kernel_weight(self, k: int, n: int, *experts: int) -> Any:
        """The weight in the kernel's layout, abstract."""
        names = ("granularity", "group_size", "block_size", "zero_point")
        settings = {name: getattr(self.storage, name) for name in names}
        convert = functools.partial(to_kernel, format=self.format.name, k=k, n=n, **settings)
        return jax.eval_shape(convert, self.arrays(k, n, *experts))

    def bytes_per_weight(self) -> float:
        """Stored bytes, scales included."""
        arrays = self.arrays(4096, 4096).values()
        return sum(a.size * a.dtype.itemsize for a in arrays) / 4096**2


def _weights() -> dict[str, _Weight]:
    """By the title of their storage."""
    return {
        storage.title: _Weight(format, storage)
        for format in WORD_FORMATS.values()
        for storage in format.storages
    }


def kernel_cases() -> list[KernelCase]:
    """Dense products, of int8 activations too, an MLP, experts, and decoded weights."""
    dense = [*_matrix_vector_cases(), *_integer_cases(), *_mma_cases(), *_mlp_cases()]
    return [*dense, *_experts_cases(), *_decode_cases(), *_float8_cases()]


def _matrix_vector_cases() -> list[KernelCase]:
    def case(name: str, rows: int, k: int, n: int, *, label: str = "") -> KernelCase:
        weight = _weights()[name]
        return KernelCase(
            name=f"matrix-vector {name}, {rows} x {k} x {n}{label}",
            kernel=f"matrix-vector {name}",
            build=functools.partial(_matrix_vector, weight, rows, k, n),
            representative=not label and rows == 1,
            weights_per_iteration=functools.partial(fma_weights, rows),
            bytes_per_weight=weight.bytes_per_weight(),
            instruction_limit=weight.storage.instruction_limit if rows == 1 else None,
        )

    cases = [case(name, rows, *_REPRESENTATIVE) for name in _weights() for rows in (1, 2, 4, 8)]
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
        weight = _weights()[name]
        k, n = _REPRESENTATIVE
        return KernelCase(
            name=f"int8 x {name}, {rows} x {k} x {n}",
            kernel=f"int8 x {name}",
            build=functools.partial(_integer, weight, rows, k, n),
            representative=rows == 1,
            weights_per_iteration=functools.partial(dot_weights, rows),
            bytes_per_weight=weight.bytes_per_weight(),
            report="integer_matrix_vector",
        )

    names = ("int8 per channel", "int4 groups of 128", "int4 per channel", "int2 groups of 128")
    return [case(name, rows) for name in names for rows in (1, 8)]


def _integer(weight: _Weight, rows: int, k: int, n: int) -> Program:
    arguments = (abstract((rows, k), "int8"), weight.kernel_weight(k, n))
    return Program(function=integer_matrix_vector, arguments=arguments)


def _mma_cases() -> list[KernelCase]:
    """Tensor cores, from sm_80 on, where there is a form of the format for them.

    Two formats stand for their instructions at 8 to 64 rows, the others are one kernel at 16.
    """
    gpus = tuple(gpu for gpu in ALL if gpu != "t4")
    often = {"int4 groups of 128": (8, 16, 32, 64), "int8 per channel": (8, 64)}
    others = [name for name, weight in _weights().items() if _has_mma(weight)]
    others = [name for name in others if name not in often]
    k, n = _REPRESENTATIVE
    size, experts = f"{k} x {n}", "experts, 6 of 64"

    def case(kernel: str, name: str, rows: int, build: Any, detail: str, first: bool) -> KernelCase:
        weight = _weights()[name]
        integer = build in (_mma_integers, _experts_mma_integers)
        counted = functools.partial(
            mma_weights,
            8 if detail == experts else rows,
            16 if integer and weight.format.bits < 8 else 8 / weight.format.terms,
        )
        if integer and weight.storage.zero_point != "none":
            counted = None  # sums of rows are products too
        return KernelCase(
            name=f"{rows}{' int8' if integer else ''} rows x {name}, {detail}",
            kernel=kernel,
            build=functools.partial(build, weight, rows),
            gpus=gpus,
            representative=first,
            weights_per_iteration=counted,
            bytes_per_weight=weight.bytes_per_weight(),
            report="mma",
        )

    return [
        *(
            case(f"{rows} rows x {name}", name, rows, _mma, size, True)
            for name, numbers in often.items()
            for rows in numbers
        ),
        *(
            case("16 rows x other formats", name, 16, _mma, size, name == others[0])
            for name in others
        ),
        *(
            case("16 rows x experts", name, 16, _experts_mma, experts, name in often and i == 0)
            for i, name in enumerate((*often, "WINT2's code"))
        ),
        *(
            case(f"{rows} int8 rows x {name}", name, rows, _mma_integers, size, True)
            for name in often
            for rows in (16, 64)
        ),
        *(
            case("16 int8 rows x other formats", name, 16, _mma_integers, size, i == 0)
            for i, name in enumerate(("int2 groups of 128", "int4 groups of 128, zero points"))
        ),
        case(
            "16 int8 rows x experts", "int4 groups of 128", 16, _experts_mma_integers, experts, True
        ),
    ]


def _has_mma(weight: _Weight) -> bool:
    words, layout = weight.format, weight.layout(*_REPRESENTATIVE)
    whole = words.scaled_fragments or layout.segment_units % UNITS == 0
    return words.paired_rows is not None and whole


def _mma(weight: _Weight, rows: int, dtype: str = "bfloat16") -> Program:
    k, n = _REPRESENTATIVE
    arguments = (abstract((rows, k), dtype), weight.kernel_weight(k, n))
    return Program(function=mma_matmul, arguments=arguments)


def _experts_mma(weight: _Weight, tokens: int, dtype: str = "bfloat16") -> Program:
    experts, picks, hidden, inner = 64, 6, 2560, 1536
    index, x = abstract((tokens * picks,), "int32"), abstract((tokens, hidden), dtype)
    return Program(gathered_mma, (x, weight.kernel_weight(hidden, 2 * inner, experts), index))


_mma_integers = functools.partial(_mma, dtype="int8")
_experts_mma_integers = functools.partial(_experts_mma, dtype="int8")


def _mlp_cases() -> list[KernelCase]:
    """Rows that are normalized, and gated, as the products read them: Llama-3-8B's MLP."""
    return [
        KernelCase(
            name=f"MLP int4 groups of 128, {rows} x 4096 x 14336",
            kernel="MLP int4 groups of 128",
            build=functools.partial(_mlp, _weights()["int4 groups of 128"], rows, 4096, 14336),
            representative=rows == 1,
        )
        for rows in (1, 2, 8)
    ]


def _mlp(weight: _Weight, rows: int, hidden: int, inner: int) -> Program:
    dtype = activation_dtype()
    x, scale = abstract((rows, hidden), dtype), abstract((hidden,), dtype)
    products = weight.kernel_weight(hidden, 2 * inner), weight.kernel_weight(inner, hidden)
    return Program(functools.partial(_mlp_step, dtype), (x, scale, *products))


def _mlp_step(dtype: str, x: Any, scale: Any, gate_up: Any, down: Any) -> jax.Array:
    partials = matrix_vector(Normed(x, scale, 1e-6), gate_up)
    return matrix_vector(Gated(partials, jnp.dtype(dtype)), down)


def _decode_cases() -> list[KernelCase]:
    """Weights that libraries multiply; one stands for all, which decode as the products do."""

    def case(name: str) -> KernelCase:
        k, n = _REPRESENTATIVE
        one = name == "int4 groups of 128"
        return KernelCase(
            name=f"decoded {name}, {k} x {n}",
            kernel="decoded weight" if one else f"decoded {name}",
            build=functools.partial(_decode, _weights()[name], k, n),
            representative=True,
        )

    return [case("int4 groups of 128")]


def _decode(weight: _Weight, k: int, n: int) -> Program:
    function = functools.partial(decode_weight, dtype=activation_dtype())
    return Program(function, (weight.kernel_weight(k, n),))


def _float8_cases() -> list[KernelCase]:
    """float8 by float8 with scales of both, on Hopper; of bfloat16, and of float32 for meshes."""

    def case(rows: int, dtype: str, *, label: str = "", size: tuple[int, int]) -> KernelCase:
        k, n = size
        return KernelCase(
            name=f"float8 rows x fp8 blocks of 128, {rows} x {k} x {n}, {dtype}{label}",
            kernel="float8 rows x fp8 blocks of 128",
            build=functools.partial(_float8, rows, k, n, dtype),
            gpus=("h100", "h200"),
            representative=dtype == "bfloat16" and not label,
        )

    layer = "Llama-3-8B down"
    return [
        case(2048, "bfloat16", size=_REPRESENTATIVE),
        case(100, "float32", size=_REPRESENTATIVE),
        case(2048, "bfloat16", label=f" ({layer})", size=_LAYERS[layer]),
    ]


def _float8(rows: int, k: int, n: int, dtype: str) -> Program:
    weight = _weights()["fp8 blocks of 128"].kernel_weight(k, n)
    x, scale = abstract((rows, k), "float8_e4m3fn"), abstract((rows, -(-k // BLOCK)), "float32")
    return Program(functools.partial(float8_blocks, dtype=dtype), (x, scale, weight))


def _experts_cases() -> list[KernelCase]:
    """Experts of ERNIE-4.5-21B-A3B, 6 of 64 picked, the shared ones along.

    The down product stands for both: its rows are gated as they are read. Both in a row are a case
    of some formats besides.
    """

    def case(name: str, tokens: int, *, both: bool = False) -> KernelCase:
        weight = _weights()[name]
        return KernelCase(
            name=f"experts {name}, {tokens} x 6 of 64{', both products' if both else ''}",
            kernel=f"experts {name}",
            build=functools.partial(_experts, weight, tokens, both),
            representative=tokens == 1 and not both,
            weights_per_iteration=functools.partial(fma_weights, 1),
            bytes_per_weight=weight.bytes_per_weight(),
            instruction_limit=weight.storage.instruction_limit,
        )

    often = ("int4 groups of 128", "int8 per channel", "WINT2's code")
    return [
        *(case(name, 1) for name in _weights()),
        *(case(name, tokens, both=True) for name in often for tokens in (1, 4)),
    ]


def _experts(weight: _Weight, tokens: int, both: bool) -> Program:
    experts, picks, hidden, inner = 64, 6, 2560, 1536
    dtype = activation_dtype()
    index = abstract((tokens * picks,), "int32")
    sums = (tokens * picks, 2 * inner), (tokens, 4 * inner)
    down = (weight.kernel_weight(inner, hidden, experts), weight.kernel_weight(2 * inner, hidden))
    if both:
        rows: Any = abstract((tokens, hidden), dtype)
        own = weight.kernel_weight(hidden, 2 * inner, experts)
        arguments = (index, rows, own, weight.kernel_weight(hidden, 4 * inner), *down)
        return Program(functools.partial(_both_products, dtype), arguments)
    rows = [abstract((2, *shape), "float32") for shape in sums]
    return Program(functools.partial(_down_product, dtype), (index, *rows, *down))


def _both_products(dtype, index, x, gate_up, shared_gate_up, down, shared_down) -> Any:
    picked, shared = gathered_matrix_vector(x, gate_up, index, shared=(x, shared_gate_up))
    return _down_product(dtype, index, picked, shared, down, shared_down)


def _down_product(dtype, index, picked, shared, down, shared_down) -> Any:
    picked, shared = (Gated(partials, jnp.dtype(dtype)) for partials in (picked, shared))
    return gathered_matrix_vector(picked, down, index, shared=(shared, shared_down))
