"""Static scales of keys and values that a checkpoint has for the KV cache."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fdq.schemes.scheme import CacheSpec
from fdq_checkpoints.errors import CheckpointError, shown
from fdq_checkpoints.readers.source_directory import SourceDirectory

_LOGGER = logging.getLogger("fdq")
_FLOATS = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class StoredCache:
    """The scales of all layers.

    Attributes:
      spec: how fdq's cache holds keys and values with them.
      names: of the tensors by what fdq calls them (`k_cache_scale`), with `{i}` for the layer.
      made: from what is stored (float32, of the shape that the spec wants) what fdq stores.
      shape: of the scales of a layer, `(kv_heads, head_dim or 1)`.
    """

    spec: CacheSpec
    names: Mapping[str, str]
    made: Mapping[str, Callable[[np.ndarray], np.ndarray]]
    shape: tuple[int, int]
    directory: SourceDirectory

    @classmethod
    def of(
        cls,
        directory: SourceDirectory,
        config: Any,
        spec: CacheSpec,
        names: Mapping[str, str],
        made: Mapping[str, Callable[[np.ndarray], np.ndarray]],
        where: str,
    ) -> "StoredCache | None":
        """Looks at all of them; where a layer has none one line says so, and there is no cache."""
        shape = spec.static_shape(config.num_kv_heads, config.head_dim)
        found = cls(spec, names, made, shape, directory)
        wanted = [name.format(i=i) for name in names.values() for i in range(config.num_layers)]
        missing = [name for name in wanted if name not in directory.tensors]
        if missing:
            _LOGGER.warning(
                "%s: a cache of %s is meant, but %s is missing; choose one, such as cache='C8'.",
                where,
                spec,
                missing[0],
            )
            return None
        for name in wanted:
            info = directory.tensors[name]
            size = int(np.prod(info.shape, dtype=np.int64))
            if info.dtype.name not in _FLOATS or size not in (1, shape[0] * shape[1]):
                raise CheckpointError(
                    f"{directory.file_name(name)}: tensor {shown(name)} is {info.dtype} "
                    f"{info.shape}, expected floats, one or {shape}, for the KV cache."
                )
        return found

    def read(self, layer: int, what: str) -> np.ndarray:
        """The scale or zero point `what` of a layer, `[kv_heads, head_dim or 1]`."""
        name = self.names[what].format(i=layer)
        stored = self.directory.read(name).astype(np.float32)
        if not np.isfinite(stored).all() or ("zero" not in what and (stored <= 0).any()):
            raise CheckpointError(
                f"{self.directory.file_name(name)}: tensor {shown(name)} holds a scale that is not "
                "a finite number above 0. Download it again, or take the float original."
            )
        whole = stored.reshape(self.shape if stored.size > 1 else (1, 1))
        return self.made[what](np.ascontiguousarray(np.broadcast_to(whole, self.shape)))


def as_stored(scale: np.ndarray) -> np.ndarray:
    """A scale that multiplies codes, as fdq's does."""
    return scale


def plain_scales(
    directory: SourceDirectory, config: Any, spec: CacheSpec, k: str, v: str, where: str
) -> StoredCache | None:
    """Of scales that multiply codes, by the names of those of keys and of values."""
    names = {"k_cache_scale": k, "v_cache_scale": v}
    made = dict.fromkeys(names, as_stored)
    return StoredCache.of(directory, config, spec, names, made, where)
