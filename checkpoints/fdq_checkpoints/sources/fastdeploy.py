"""FastDeploy's offline checkpoints of ERNIE-4.5: names of Paddle, weights `[in, out]`.

============================  ==========================================  =========================
method                        `quant_weight` of a layer                   scales
============================  ==========================================  =========================
`block_wise_fp8`              e4m3 `[in, out]` (or int8 that holds it)    `weight_scale` float32,
                                                                          128 x 128 blocks
`wint8`                       int8 `[out, in]`, permuted                  `weight_scale` `[out]`
`wint4`                       int8 `[out / 2, in]`, permuted              the same
`wint2` (experts)             uint8 `[in / 4, out]`                       `weight_scale` uint8
                                                                          `[in / 128, out]`, three
                                                                          of columns
============================  ==========================================  =========================

The permutation is what Paddle's `weight_quantize` makes for its mixed GEMM (arch 75 and newer):
rows within 16 (32) of int8 (int4), 2 (4) columns interleaved every 64 rows, codes unsigned, bytes 1
and 2 of four swapped (nibbles in the order 0 2 4 6 1 3 5 7). `cachek_matmul.activation_scale` is
the largest magnitude of keys. Sources: FastDeploy 2 (`layers/quantization`), Paddle 3.3.
"""

import logging
import re
from typing import Any

import ml_dtypes
import numpy as np

from fdq.schemes.recipe import Recipe
from fdq.schemes.scheme import CacheSpec, WeightSpec
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.readers.source_directory import SourceDirectory
from fdq_checkpoints.sources import bits as packing
from fdq_checkpoints.sources.codec import SCALE_DTYPES, Codec, Section, scale_dtype
from fdq_checkpoints.sources.stored_cache import StoredCache
from fdq_checkpoints.sources.stored_weight import Linear, StoredWeight

_KERNELS = "its codes are in the layout of a kernel, which nothing but that kernel reads"
_REFUSED = {
    "w4a8": f"{_KERNELS}, and down_proj may be rotated",
    "w4afp8": f"{_KERNELS}, and down_proj may be rotated",
    "tensor_wise_fp8": "its weights are rotated by a Hadamard matrix, which is not undone",
    "w8a8": "its scales are in files of their own",
    "wfp8afp8": "FastDeploy makes it as it loads floats",
    "mxfp4": "FastDeploy makes it as it loads others' files",
}
_TYPES = ("quantization", "dense_quant_type", "moe_quant_type")
_COLUMNS = ("super_scales", "code_scale", "code_zp")
_CODES, _SCALE = "quant_weight", "weight_scale"
# By bits: rows that are permuted together, columns that are interleaved, codes of a register.
_TILES = {8: (16, 2, 4), 4: (32, 4, 8)}
_INTERLEAVED_ROWS = 64
_BYTES = ("int8", "uint8")
_LOGGER = logging.getLogger("fdq")


class FastDeploy(Codec):
    """Weights of ERNIE as FastDeploy loads them, by the method of each layer."""

    methods = ("mix_quant", "wint2", "wint4", "wint8", "block_wise_fp8", *_REFUSED)
    codes = (_CODES,)
    unused = ("activation_scale", "activation_zero_point")
    out_first = False

    def __init__(self, directory: SourceDirectory, section: Section):
        super().__init__(directory, section)
        said, config = dict(section.content), directory.config
        if said.pop("weight_block_size", None) not in (None, [128, 128]):
            raise section.wrong("weight_block_size", "[128, 128]")
        for key in _TYPES:
            if said.get(key) in _REFUSED:
                raise section.wrong(key, f"another method: {_REFUSED[said[key]]}")
        for folder in (directory.path.resolve(), directory.path.resolve().parent.parent):
            if re.search(r"-TP\d+(-|$)", folder.name):
                raise CheckpointError(
                    f"{directory.path}: weights that were split for several devices (TP), which "
                    "cannot be put together again. Use the unsplit release of the model."
                )
        if said.get("is_permuted") is False:
            raise section.wrong("is_permuted", "true: another layout of codes is not read")
        layers = config.get("num_hidden_layers")
        self.recipe = Recipe.from_fastdeploy(
            said, num_layers=layers if isinstance(layers, int) else None
        )
        of_experts = said.get("is_moe_quantized") is True
        self.floats_are_meant = said.get("is_quantized") is False or of_experts
        if said.get("quantization") == "wint2":
            _LOGGER.warning(
                "%s: how wint2 is stored is known from FastDeploy's code alone, and was not "
                "checked against a published file. Look at what the model says.",
                section.where,
            )

    def leaves(self, module: str) -> bool:
        """What no method is given to; everything where FastDeploy is to quantize it."""
        return self.floats_are_meant or self.recipe.scheme_for(_path(module)) is None

    def linear(self, module: str) -> Linear:
        """By the method of the layer, which says what shape its codes have."""
        scheme = self.recipe.scheme_for(_path(module))
        if scheme is None or scheme.weight is None:
            raise CheckpointError(
                f"{self.directory.path}: {module} has codes, but {self.section.where} leaves it "
                "in floats. Check that they belong together."
            )
        info, format = self.matrix(module, _CODES), scheme.weight.format
        rows, columns = info.shape
        ends: tuple[str, ...] = (_CODES, _SCALE)
        if format == "cc2":
            n, k, spec = columns, 4 * rows, scheme.weight
            self.check(module, _CODES, info.shape, *_BYTES)
            if k % 128:
                raise self.shape_problem(module, f"{k} rows are no multiple of 128")
            self.check(module, _SCALE, (k // 128, n), *_BYTES)
            for end in _COLUMNS:
                shape = self.info(module, end).shape
                self.check(module, end, shape if shape == (1, n) else (n,), *SCALE_DTYPES)
            ends = (*ends, *_COLUMNS)
        elif format == "float8_e4m3":
            k, n = rows, columns
            self.check(module, _CODES, info.shape, "float8_e4m3fn", *_BYTES)
            shape = (-(-k // 128), -(-n // 128))
            dtype = self.check(module, _SCALE, shape, *SCALE_DTYPES).dtype.name
            spec = WeightSpec(
                format=format, granularity="block", block_size=(128, 128), scale_dtype=dtype
            )
        else:
            width = int(format.removeprefix("int"))
            n, k = rows * 8 // width, columns
            self.check(module, _CODES, info.shape, *_BYTES)
            if k % _INTERLEAVED_ROWS or n % _TILES[width][1]:
                raise self.shape_problem(module, f"[{k}, {n}] is not permuted for a mixed GEMM")
            shape = self.info(module, _SCALE).shape
            scales = self.check(module, _SCALE, shape if shape == (1, n) else (n,), *SCALE_DTYPES)
            spec = WeightSpec(format=format, scale_dtype=scale_dtype(scales, self.directory))
        return Linear(
            module=module, shape=(n, k), spec=spec, activation=scheme.activation, ends=ends
        )

    def read(self, linear: Linear) -> StoredWeight:
        """The permutation undone; codes of other methods as they are."""
        (n, k), spec = linear.shape, linear.spec
        if spec.format == "float8_e4m3":
            codes = self.read_end(linear, _CODES).view(ml_dtypes.float8_e4m3fn)
            if ((codes.view(np.uint8) & np.uint8(0x7F)) == 0x7F).any():
                raise self.bad(linear, _CODES, "NaN")
            return StoredWeight(spec, k, codes, {"scale": self.scale_of(linear, _SCALE)})
        codes = self.read_end(linear, _CODES).view(np.uint8)
        if spec.format == "cc2":
            # The even group is in the high nibble.
            arrays = {
                "scale": packing.nibbles_swapped(self.read_end(linear, _SCALE).view(np.uint8))
            }
            of_columns = ("super_scale", "code_scale", "code_offset")
            for name, end in zip(of_columns, _COLUMNS, strict=True):
                value = self.read_end(linear, end).astype(np.float32).reshape(1, n)
                if not np.isfinite(value).all():
                    raise self.bad(linear, end, "NaN or infinity")
                arrays[name] = value
            return StoredWeight(spec, k, codes, arrays)
        width = int(spec.format.removeprefix("int"))
        plain = unpermuted(codes, k, n, width)
        codes = packing.signed(plain) if width == 8 else packing.packed(plain, width)
        scale = self.scale_of(linear, _SCALE).reshape(1, n)
        return StoredWeight(spec, k, codes, {"scale": scale})

    def cache(self, config: Any) -> StoredCache | CacheSpec | None:
        """Static scales of what `kv_cache_quant_type` says, or a dynamic format."""
        spec = self.recipe.cache
        if spec is None or spec.dynamic:
            return spec
        names, made = {}, {}
        bound = {"int8": 127.0, "float8_e4m3": 448.0}.get(spec.format, 1.0)
        for part in "kv":
            prefix = f"ernie.layers.{{i}}.self_attn.cache{part}_matmul.activation_"
            names[f"{part}_cache_scale"] = prefix + "scale"
            made[f"{part}_cache_scale"] = lambda scale: scale / np.float32(bound)
            if spec.zero_point:
                names[f"{part}_cache_zero"] = prefix + "zero_point"
                made[f"{part}_cache_zero"] = self._zero
        return StoredCache.of(self.directory, config, spec, names, made, self.section.where)

    def _zero(self, zero: np.ndarray) -> np.ndarray:
        """FastDeploy's codes are less by 8 than fdq's."""
        found = zero + np.float32(8)
        if ((found != np.round(found)) | (found < 0) | (found > 15)).any():
            raise CheckpointError(
                f"{self.directory.path}: zero points of the cache that are no whole numbers in "
                "-8 ... 7. Take another cache: load the model's float original."
            )
        return found.astype(np.uint8)


def unpermuted(codes: np.ndarray, k: int, n: int, width: int) -> np.ndarray:
    """Codes of `weight_quantize`, uint8 of any shape -> unsigned uint8 `[K, N]`."""
    rows, columns, register = _TILES[width]
    flat = codes.reshape(-1)
    if width == 8:
        flat = flat.reshape(-1, 4)[:, [0, 2, 1, 3]]
    else:
        flat = np.stack([flat & np.uint8(15), flat >> np.uint8(4)], axis=-1).reshape(-1, 8)
        flat = flat[:, [0, 4, 1, 5, 2, 6, 3, 7]]
    plain = flat.reshape(n // columns, k // _INTERLEAVED_ROWS, columns, _INTERLEAVED_ROWS)
    plain = plain.transpose(0, 2, 1, 3).reshape(n, k // rows, rows)
    row = np.arange(rows)
    source = 8 * (row % register // 2) + row % 2 + 2 * (row // register)
    return np.ascontiguousarray(plain[:, :, np.argsort(source)].reshape(n, k).T)


def _path(module: str) -> str:
    """What fdq calls a layer: `ernie.layers.3.mlp.experts.7.up_gate_proj` without the expert."""
    path = re.sub(r"\.experts\.\d+\.", ".experts.", module.removeprefix("ernie."))
    return path.replace("up_gate_proj", "gate_up_proj") + ".kernel"
