"""bitsandbytes: NF4 with and without double quantization, and int8.

NF4: `weight` uint8 `[out in / 2, 1]` (or the same bytes as bfloat16), row by row and high nibble
first, blocks of 64 that may go on from one row into the next, in fdq groups of what divides both;
`weight.absmax` float32, or uint8 with `weight.nested_absmax` and `weight.nested_quant_map`;
`weight.quant_state.bitsandbytes__nf4` is JSON in bytes. int8: `weight`, `SCB` `[out]`, and
`w = code * SCB / 127`. Source: bitsandbytes 0.50 (`functional.QuantState`).
"""

import json
import math
from typing import Any

import numpy as np

from fdq.formats.normal_float import CODEBOOK
from fdq.schemes.scheme import WeightSpec
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.readers.source_directory import SourceDirectory
from fdq_checkpoints.sources import bits as packing
from fdq_checkpoints.sources.codec import Codec, Names, Section, codes_of_ignored
from fdq_checkpoints.sources.stored_weight import Linear, StoredWeight

_STORAGE = ("uint8", "bfloat16", "float16", "float32")  # what the bytes of codes are said to be
_LEAST_GROUP = 8  # or scales are most of what is stored
_STATE = "weight.quant_state.bitsandbytes__nf4"
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")


class BitsAndBytes(Codec):
    """Weights alone: what its int8 does with outliers of inputs is none of theirs."""

    methods = ("bitsandbytes",)
    codes = ("absmax", "SCB")

    def __init__(self, directory: SourceDirectory, section: Section):
        super().__init__(directory, section)
        names = section.names("llm_int8_skip_modules", "modules_to_not_convert")
        self.ignored = Names(names, section.where)
        self.is_int8 = section.flag("load_in_8bit", False)
        if self.is_int8 == section.flag("load_in_4bit", False):
            raise section.wrong("load_in_4bit", "true, or load_in_8bit")
        if not self.is_int8:
            section.one_of("bnb_4bit_quant_type", ("nf4",), "fp4")

    def linears(self) -> dict[str, Linear]:
        """All modules with codes; the names of NF4's tensors begin with the weight's."""
        found = {}
        for name in self.directory.tensors:
            end = ".SCB" if self.is_int8 else ".weight.absmax"
            if name.endswith(end):
                module = name.removesuffix(end)
                if self.leaves(module):
                    raise codes_of_ignored(self.directory, module)
                found[module] = self.linear(module)
        return found

    def leaves(self, module: str) -> bool:
        """What the config names, whole or by its end."""
        return self.ignored.match(module) or module.endswith(self.ignored.patterns)

    def linear(self, module: str) -> Linear:
        """By its state, or the shape of the codes."""
        if self.is_int8:
            info = self.matrix(module, "weight")
            self.check(module, "weight", info.shape, "int8")
            self.check(module, "SCB", info.shape[:1], "float32")
            ends = ("weight", "SCB", *self._there(module, "weight_format"))
            return _linear(module, info.shape, WeightSpec(format="int8"), ends)
        (n, k), state = self._state(module)
        block = state.get("blocksize")
        if type(block) is not int or block < 1 or k % 2:
            raise self.shape_problem(module, f"blocks of {block!r} of rows of {k}")
        group = math.gcd(block, k)
        if group < _LEAST_GROUP and group < min(block, k):
            raise self.shape_problem(module, f"blocks of {block} do not divide rows of {k}")
        stored = self.info(module, "weight").dtype
        if stored.name not in _STORAGE or n * k // 2 % stored.itemsize:
            raise self.shape_problem(module, f"{n * k // 2} bytes of codes stored as {stored.name}")
        self.check(module, "weight", (n * k // 2 // stored.itemsize, 1), stored.name)
        self.check(module, "weight.quant_map", (16,), "float32")
        nested = self.has(module, _NESTED[0])
        self.check(module, "weight.absmax", (-(-n * k // block),), "uint8" if nested else "float32")
        spec = WeightSpec(format="nf4", granularity="group", group_size=group)
        there = _NESTED if nested else ()
        if nested:
            self.check(module, _NESTED[0], (self.info(module, _NESTED[0]).nbytes // 4,), "float32")
            self.check(module, _NESTED[1], (256,), "float32")
        ends = ("weight", "weight.absmax", "weight.quant_map", _STATE, *there)
        return _linear(module, (n, k), spec, ends)

    def read(self, linear: Linear) -> StoredWeight:
        """Turned from `[out, in]` to `[in, out]`."""
        n, k = linear.shape
        if self.is_int8:
            if "weight_format" in linear.ends and self.read_end(linear, "weight_format").any():
                raise self.bad(linear, "weight_format", "another layout than rows")
            codes = self.read_end(linear, "weight").T
            scale = (self.scale_of(linear, "SCB") / np.float32(127)).reshape(1, n)
            return StoredWeight(linear.spec, k, np.ascontiguousarray(codes), {"scale": scale})
        if not np.array_equal(self.read_end(linear, "weight.quant_map"), CODEBOOK):
            raise self.bad(linear, "weight.quant_map", "another codebook than NF4's")
        codes = self.read_end(linear, "weight").view(np.uint8)
        codes = packing.nibbles_swapped(codes.reshape(n, k // 2))
        if _NESTED[0] in linear.ends:
            scale = self._nested(linear)
        else:
            scale = self.scale_of(linear, "weight.absmax", signed=True)
        group = linear.spec.group_size
        assert group is not None
        scale = _repeated(
            scale, self._state(linear.module)[1]["blocksize"] // group, n * k // group
        )
        scale = np.ascontiguousarray(scale.reshape(n, -1).T)
        return StoredWeight(linear.spec, k, np.ascontiguousarray(codes.T), {"scale": scale})

    def _nested(self, linear: Linear) -> np.ndarray:
        """The scales that are stored in 8 bits, as bitsandbytes computes them."""
        _, state = self._state(linear.module)
        block, offset = state.get("nested_blocksize"), state.get("nested_offset")
        codes = self.read_end(linear, "weight.absmax")
        largest, book = (self.read_end(linear, end) for end in _NESTED)
        block = block if type(block) is int and block > 0 else 0
        fits = block > 0 and largest.size == -(-codes.size // max(block, 1))
        if not fits or not isinstance(offset, float):
            raise self.bad(linear, _STATE, "a description that its tensors do not fit")
        scale = book[codes] * _repeated(largest, block, codes.size) + np.float32(offset)
        if not np.isfinite(book).all() or not np.isfinite(scale).all() or (scale < 0).any():
            raise self.bad(linear, _NESTED[0], "a scale that is negative or not finite")
        return scale.astype(np.float32)

    def _state(self, module: str) -> tuple[tuple[int, int], dict[str, Any]]:
        name = self.info(module, _STATE).name
        try:
            state = json.loads(self.directory.read(name).tobytes().decode("utf-8"))
            n, k = state["shape"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{self.directory.file_name(name)}: tensor {name} is no description of a weight "
                f"({error})."
            ) from None
        if type(n) is not int or type(k) is not int or min(n, k) < 1:
            raise self.shape_problem(module, f"its description says the shape {[n, k]}")
        return (n, k), state

    def _there(self, module: str, end: str) -> tuple[str, ...]:
        return (end,) if self.has(module, end) else ()


def _repeated(array: np.ndarray, times: int, size: int) -> np.ndarray:
    """`np.repeat` of each entry, of which `size` are wanted: `times` may be any number."""
    return array[np.arange(size) // min(times, max(size, 1))]


def _linear(module: str, shape: tuple[int, ...], spec: WeightSpec, ends: tuple[str, ...]) -> Linear:
    return Linear(module=module, shape=(shape[0], shape[1]), spec=spec, activation=None, ends=ends)
