"""A directory of another tool's codes as tensor names see it: weights in floats."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from fdq import models
from fdq.formats.qtensor import dequantize
from fdq.schemes.scheme import WeightSpec
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.readers.safetensors_reader import TensorInfo
from fdq_checkpoints.readers.source_directory import SourceDirectory
from fdq_checkpoints.sources.codec import Codec
from fdq_checkpoints.sources.stored_weight import Linear, StoredWeight, joined_spec


class LinearNames:
    """A directory as tensor names see it: `<module>.weight` in floats, whatever it is stored as."""

    config_name = "config.json"

    def __init__(self, directory: SourceDirectory, codec: Codec, dtype: np.dtype):
        self.directory, self.codec = directory, codec
        self.path, self.config = directory.path, directory.config
        self.linears = codec.linears()
        hidden = {name for linear in self.linears.values() for name in linear.names}
        self.tensors = {
            name: info
            for name, info in directory.tensors.items()
            if name not in hidden and name.rpartition(".")[2] not in codec.unused
        }
        for linear in self.linears.values():
            name = linear.floats
            if name in self.tensors:
                raise CheckpointError(
                    f"{directory.file_name(name)}: tensor {name} is beside the codes of the same "
                    "layer, so it is not clear which counts."
                )
            shape = linear.float_shape
            if not codec.out_first:
                shape = shape[::-1]
            self.tensors[name] = TensorInfo(name, dtype, shape, 0, 0)
        self._by_weight = {linear.floats: linear for linear in self.linears.values()}

    def linear(self, name: str) -> Linear | None:
        """The quantized layer whose weight has this name."""
        return self._by_weight.get(name)

    def joined_spec(self, parts: Sequence[Linear]) -> WeightSpec | None:
        """How fdq holds layers that it joins; None where they have nothing in common."""
        return joined_spec(parts)

    def weight(self, linear: Linear) -> StoredWeight:
        """The codes of a layer."""
        return self.codec.stored(linear)

    def input_scale(self, linear: Linear) -> np.float32:
        """The static scale of a layer's input."""
        return self.codec.input_scale_of(linear)

    def cache(self, config: models.DecoderConfig) -> Any:
        """Static scales of a KV cache, or a scheme's part that says which cache; None for none."""
        return self.codec.cache(config)

    def file_name(self, name: str) -> str:
        """The path of the shard that holds a tensor, for errors."""
        linear = self.linear(name)
        return self.directory.file_name(name if linear is None else linear.names[0])

    has_rows = False  # codes are decoded as a whole

    def files_of(self, name: str) -> set[str]:
        """The paths of all shards that a tensor, or its codes, scales and so on, are read from."""
        linear = self.linear(name)
        names = (name,) if linear is None else linear.names
        return {self.directory.file_name(one) for one in names}

    def read(self, name: str) -> np.ndarray:
        """A tensor in floats: codes decoded, `[out, in]` (as the codec has floats)."""
        linear = self.linear(name)
        if linear is None:
            return self.directory.read(name)
        if linear.experts is not None:
            return self.read_rows(name, 0, linear.experts)
        floats = np.asarray(dequantize(self.codec.stored(linear).qtensor()))
        if linear.input_factor is not None:
            floats = floats * self.codec.factor_of(linear)[:, None]
        floats = floats.T if self.codec.out_first else floats
        return floats.astype(self.tensors[name].dtype)

    def companions(self) -> list[pathlib.Path]:
        """The config, tokenizer and generation files that are there."""
        return self.directory.companions()

    def close(self) -> None:
        """Closes the shards."""
        self.directory.close()

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of a tensor in floats, or experts of a stack."""
        linear = self.linear(name)
        if linear is None:
            return self.directory.read_rows(name, start, stop)
        if linear.experts is None:
            return self.read(name)[start:stop]
        result = np.empty((stop - start, *linear.float_shape[1:]), self.tensors[name].dtype)
        for row, expert in zip(result, linear.each()[start:stop], strict=True):
            row[:] = dequantize(self.codec.stored(expert).qtensor())
        return result
