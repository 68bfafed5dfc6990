"""A directory with config.json and safetensors, as Hugging Face and Paddle publish models."""

import os
import pathlib
import re
import stat
from collections.abc import Mapping
from typing import Any

import numpy as np

from fdq_checkpoints.errors import CheckpointError, nearest, shown
from fdq_checkpoints.readers import local_directory, strict_json
from fdq_checkpoints.readers.file_names import COMPANION_FILES as COMPANION_FILES
from fdq_checkpoints.readers.file_names import INDEX_NAME, MAX_INDEX_BYTES, companion_names
from fdq_checkpoints.readers.file_names import PICKLE_SUFFIXES as PICKLE_SUFFIXES
from fdq_checkpoints.readers.safetensors_reader import SafetensorsFile, TensorInfo

MAX_CONFIG_BYTES = 1_000_000
_WHOLE = "model.safetensors"
# Files that are no part of the model that they are beside: PEFT's, and the same weights under their
# publisher's names.
_BESIDE = ("adapter_model", "consolidated")
# Marks blobs that the models of a cache share.
_SHARED = ".huggingface-shared-blobs"
# What a config may ask for, (least, most), checked before a model of that size is built.
_CONFIG_LIMITS = {
    "num_hidden_layers": (1, 1000),
    "hidden_size": (1, 2**20),
    "intermediate_size": (1, 2**24),
    "vocab_size": (1, 2**26),
    "num_attention_heads": (1, 2**16),
    "num_key_value_heads": (1, 2**16),
    "head_dim": (1, 2**16),
    "moe_intermediate_size": (0, 2**24),
    "num_experts": (0, 2**16),
    "num_local_experts": (0, 2**16),
    "n_routed_experts": (0, 2**16),
    "n_shared_experts": (0, 2**12),
    "num_nextn_predict_layers": (0, 2**12),
    "q_lora_rank": (1, 2**24),
    "kv_lora_rank": (1, 2**24),
    "qk_nope_head_dim": (1, 2**16),
    "qk_rope_head_dim": (1, 2**16),
    "v_head_dim": (1, 2**16),
    "moe_num_experts": (0, 2**16),
    "moe_num_shared_experts": (0, 2**12),
}


def check_sizes(config: Mapping[str, Any], where: str) -> None:
    """CheckpointError where a config asks for a model of sizes that none has."""
    for key, (least, most) in _CONFIG_LIMITS.items():
        value = config.get(key)
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]  # some ERNIE keys are lists
        if not all(type(number) is int and least <= number <= most for number in values):
            raise CheckpointError(
                f"{where}: {key} = {value!r} is not a whole number in {least}…{most}."
            )


def _is_beside_whole(name: str) -> bool:
    """Whether a file is no part of the model in `model.safetensors`: neither shard nor variant."""
    return not name.startswith(("model", "pytorch_model"))


class SourceDirectory:
    """The tensors of all shards in a directory of safetensors; a context manager."""

    config_name = "config.json"

    def __init__(self, path: str | os.PathLike[str]):
        self.path = local_directory.local_directory(path)
        self.config = self._read_config()
        self._files: dict[str, SafetensorsFile] = {}
        self._file_of: dict[str, SafetensorsFile] = {}
        try:
            self._open_shards()
        except BaseException:
            self.close()
            raise
        self.tensors: dict[str, TensorInfo] = {
            name: file.tensors[name] for name, file in self._file_of.items()
        }

    def __enter__(self) -> "SourceDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all shards."""
        for file in self._files.values():
            file.close()

    def file_name(self, name: str) -> str:
        """The path of the shard that holds a tensor, for errors."""
        return self._file(name).path

    has_rows = True  # are read without the others

    def files_of(self, name: str) -> set[str]:
        """The paths of all files that a tensor is read from."""
        return {self.file_name(name)}

    def read(self, name: str) -> np.ndarray:
        """The whole tensor, in its stored dtype."""
        return self._file(name).read(name)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `[start, stop)` of the tensor's first dimension."""
        return self._file(name).read_rows(name, start, stop)

    def metadata_of(self, name: str) -> dict[str, str]:
        """What the file that holds a tensor says of itself."""
        return self._file(name).metadata

    def companions(self) -> list[pathlib.Path]:
        """The config, tokenizer and generation files that are there."""
        return [self._checked(name) for name in companion_names(self.path)]

    def _file(self, name: str) -> SafetensorsFile:
        try:
            return self._file_of[name]
        except KeyError:
            raise CheckpointError(
                f"{self.path}: no tensor {shown(name)}.{nearest(name, self._file_of)}"
            ) from None

    def _checked(self, name: str) -> pathlib.Path:
        """The path of a file of the directory, which must be regular and not lead outside.

        Links are followed only inside the directory or, in a Hugging Face cache
        (`models--x/snapshots/<revision>/f -> ../../blobs/<hash>`), into the same model's blobs or
        those that all models share.
        """
        path = self.path / name
        try:
            resolved, root = path.resolve(), self.path.resolve()
        except (RuntimeError, OSError):  # links that lead to themselves, or too many
            raise CheckpointError(f"{path}: a link that leads nowhere.") from None
        allowed = [root]
        if root.parent.name == "snapshots":
            allowed.append(root.parent.parent / "blobs")
            if (root.parent.parent.parent / "blobs" / _SHARED).is_file():
                allowed.append(root.parent.parent.parent / "blobs")
        if not any(resolved.is_relative_to(folder) for folder in allowed):
            raise CheckpointError(
                f"{path}: a link to {resolved}, outside of the checkpoint. Copy the file instead."
            )
        if not resolved.exists():
            raise CheckpointError(f"{path}: a link to a file that does not exist.")
        if not stat.S_ISREG(resolved.stat().st_mode):
            raise CheckpointError(f"{path}: not a regular file.")
        return path

    def _read_config(self) -> dict[str, Any]:
        if not os.path.lexists(self.path / "config.json"):
            if advice := local_directory.without_config(self.path):
                raise CheckpointError(advice)
            raise CheckpointError(
                f"{self.path}: no config.json (nor fdq.json). Give the directory that holds the "
                "model's config.json and .safetensors files."
            )
        config = strict_json.read_object(self._checked("config.json"), max_bytes=MAX_CONFIG_BYTES)
        check_sizes(config, str(self.path / "config.json"))
        return config

    def _open_shards(self) -> None:
        names = sorted(os.listdir(self.path))
        files = [name for name in names if name.endswith(".safetensors")]
        indices = [name for name in names if name.endswith(".safetensors.index.json")]
        if not files:
            raise CheckpointError(self._nothing_to_read(names))
        if own := [name for name in files if not name.startswith(_BESIDE)]:
            files = own
            indices = [name for name in indices if not name.startswith(_BESIDE)]
        if _WHOLE in files:
            # An index that was left over names shards that are not there.
            indices = [name for name in indices if self._has_shards(name, files)]
            if not indices:
                files = [name for name in files if not _is_beside_whole(name)]
        if len(indices) > 1:
            raise CheckpointError(f"{self.path}: several indices {indices}; keep one.")
        if indices:
            self._open_index(indices[0], files)
            return
        if len(files) > 1:
            raise CheckpointError(
                f"{self.path}: {len(files)} safetensors files but no {INDEX_NAME} that says which "
                "belong together. Download the index, or keep one file."
            )
        match = re.fullmatch(r".*-(\d+)-of-(\d+)\.safetensors", files[0])
        if match and int(match[2]) != 1:
            raise CheckpointError(
                f"{self.path / files[0]}: shard {match[1]} of {match[2]}, and the others and "
                f"{INDEX_NAME} are missing. Download them."
            )
        file = self._open(files[0])
        self._file_of = dict.fromkeys(file.tensors, file)

    def _has_shards(self, index_name: str, files: list[str]) -> bool:
        """Whether a file that an index names is there."""
        index = strict_json.read_object(self._checked(index_name), max_bytes=MAX_INDEX_BYTES)
        shards = index.get("weight_map")
        return not isinstance(shards, dict) or not set(files).isdisjoint(map(str, shards.values()))

    def _nothing_to_read(self, names: list[str]) -> str:
        pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
        if pickles:
            return (
                f"{self.path}: only pickled weights ({pickles[0]}), which can run code when "
                "loaded, so fdq does not read them. Convert the model to safetensors, or use a "
                "release that has them."
            )
        if "rank0" in names or "rank_0" in names:
            return (
                f"{self.path}: weights split per rank (rank0/ …), which cannot be put together "
                "again. Use the unsplit release of the model."
            )
        return f"{self.path}: no .safetensors file."

    def _open(self, name: str) -> SafetensorsFile:
        file = SafetensorsFile(self._checked(name))
        self._files[name] = file
        return file

    def _open_index(self, index_name: str, files: list[str]) -> None:
        index_path = self._checked(index_name)
        index = strict_json.read_object(index_path, max_bytes=MAX_INDEX_BYTES)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index_path}: weight_map is missing or not an object.")
        shards: dict[str, set[str]] = {}
        for tensor, shard in weight_map.items():
            legal = r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]*\.safetensors"
            if not isinstance(shard, str) or not re.fullmatch(legal, shard):
                raise CheckpointError(
                    f"{index_path}: tensor {shown(tensor)} is said to be in {shown(str(shard))}, "
                    "which is not the name of a .safetensors file of this directory."
                )
            shards.setdefault(shard, set()).add(tensor)
        for shard in shards:
            if not os.path.lexists(self.path / shard):
                raise CheckpointError(
                    f"{self.path}: the shard {shard} that {index_name} names is missing. "
                    "Download it."
                )
            match = re.fullmatch(r".*-of-(\d+)\.safetensors", shard)
            if match and int(match[1]) != len(shards):
                raise CheckpointError(
                    f"{index_path}: names {len(shards)} shards, but {shard} is one of "
                    f"{int(match[1])}. Download the whole model again."
                )
        extra = [name for name in files if name.startswith("model") and name not in shards]
        if extra:
            raise CheckpointError(
                f"{self.path}: {extra[0]} is beside {index_name}, which does not name it, so it is "
                "not clear which is the model. Remove one."
            )
        for shard, expected in shards.items():
            file = self._open(shard)
            for tensor in file.tensors:
                where = f"{file.path}: tensor {shown(tensor)} is"
                if tensor in self._file_of:
                    raise CheckpointError(f"{where} also in {self._file_of[tensor].path}.")
                if tensor not in expected:
                    raise CheckpointError(f"{where} not listed for this shard in {index_name}.")
                self._file_of[tensor] = file
            if missing := expected - file.tensors.keys():
                name = min(missing)
                raise CheckpointError(
                    f"{file.path}: tensor {shown(name)}, which {index_name} lists for it, is "
                    f"absent.{nearest(name, file.tensors)}"
                )
