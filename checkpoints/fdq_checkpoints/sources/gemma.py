"""Gemma's own releases in integers of 2, 4 and 8 bits (`quant_method: "gemma"`).

Of a layer `[out, in]`: `weight` uint8 `[out, ceil(in bits / 8)]`, the lowest bits first, levels of
code - 2^(bits - 1), or int8; `weight_scale` float32 `[out, 1]`. An embedding has
`embedding_quantized` and `embedding_scale` `[rows, blocks]`. Which layer has how many bits the
config says, by patterns. Scales of inputs, outputs and caches are not applied. Source: transformers
5.23 (`integrations/gemma_quant.py`).
"""

import logging

import numpy as np

from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.readers.source_directory import SourceDirectory
from fdq_checkpoints.sources import bits as packing
from fdq_checkpoints.sources.codec import (
    MOST_REPETITIONS,
    Codec,
    Names,
    Section,
    check_ignored,
    integer_spec,
    matcher,
)
from fdq_checkpoints.sources.stored_weight import Linear, StoredWeight

_OF_INPUTS = ("input_activation_scale", "output_activation_scale")
_LOGGER = logging.getLogger("fdq")


class Gemma(Codec):
    """Weights of text models."""

    methods = ("gemma",)
    codes = ("weight_scale", "embedding_scale")
    unused = (*_OF_INPUTS, "k_cache_scale", "v_cache_scale")

    def __init__(self, directory: SourceDirectory, section: Section):
        super().__init__(directory, section)
        self.bits = section.one_of("num_bits", (2, 4, 8), 4)
        self.rules: list[tuple[str, int]] = []
        rules = section.part("module_quant_configs")
        for pattern in () if rules is None else tuple(rules.content):
            part = rules.part(pattern) if rules else None
            if part is None:
                raise section.wrong("module_quant_configs", "an object of objects")
            self.rules.append((pattern, part.one_of("num_bits", (2, 4, 8), self.bits)))
        self.ignored = Names(section.names("modules_to_not_convert"), section.where)
        if any(name.rpartition(".")[2] in _OF_INPUTS for name in directory.tensors):
            _LOGGER.warning(
                "%s: ranges of inputs and outputs are not applied; these stay in 16 bits.",
                directory.path,
            )

    def linears(self) -> dict[str, Linear]:
        """Also checks that what is to be ignored has no codes, and that codes have scales."""
        found = super().linears()
        check_ignored(self.directory, found, self.ignored)
        for name, info in self.directory.tensors.items():
            module, _, end = name.rpartition(".")
            is_codes = end in ("weight", "embedding_quantized") and info.dtype.kind in "iu"
            if is_codes and module not in found:
                raise CheckpointError(
                    f"{self.directory.file_name(name)}: tensor {name} holds codes without scales. "
                    "Download the model again."
                )
        return found

    def linear(self, module: str) -> Linear:
        """By the dtype of the codes and the patterns of the config."""
        end, scales = "weight", "weight_scale"
        if self.has(module, "embedding_scale"):
            end, scales = "embedding_quantized", "embedding_scale"
        info = self.matrix(module, end)
        n, k = info.shape
        bits = self._bits(module)
        self.check(module, end, (n, k), "int8" if bits == 8 else "uint8")
        k = k * 8 // bits
        blocks = 1 if end == "weight" else self.matrix(module, scales).shape[1]
        if blocks < 1 or k % blocks:
            raise self.shape_problem(module, f"{blocks} blocks do not divide rows of {k}")
        self.check(module, scales, (n, blocks), "float32")
        spec = integer_spec(bits, None if blocks == 1 else k // blocks, zero_point="none")
        return Linear(module=module, shape=(n, k), spec=spec, activation=None, ends=(end, scales))

    def _bits(self, module: str) -> int:
        """By the pattern that is found first in the name: the leftmost, then the config's first."""
        found = []
        for pattern, bits in self.rules:
            # One less than patterns that are matched from the start: a search starts anywhere.
            repetitions = MOST_REPETITIONS - 1
            rule = matcher(pattern, module, self.section.where, repetitions=repetitions)
            if place := rule.search(module):
                found.append((place.start(), len(found), bits))
        return min(found)[2] if found else self.bits

    def read(self, linear: Linear) -> StoredWeight:
        """Turned from `[out, in]` to `[in, out]`."""
        k, (end, scales) = linear.shape[1], linear.ends
        codes, bits = self.read_end(linear, end), int(linear.spec.format.removeprefix("int"))
        turned = codes.T if bits == 8 else packing.along_in(codes, k, bits)
        arrays = {"scale": np.ascontiguousarray(self.scale_of(linear, scales).T)}
        return StoredWeight(linear.spec, k, np.ascontiguousarray(turned), arrays)
