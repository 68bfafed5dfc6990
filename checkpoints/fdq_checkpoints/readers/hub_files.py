"""Which files of a repository a model is read from; the others are not fetched."""

import pathlib
import re
from collections.abc import Callable, Collection, Mapping

from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.readers import strict_json
from fdq_checkpoints.readers.file_names import (
    COMPANION_FILES,
    INDEX_NAME,
    MAX_INDEX_BYTES,
    PICKLE_SUFFIXES,
    templates,
)

# Small files beside a model may be of its tokenizer or of whoever quantized it.
_SUFFIXES, _SMALL = (".json", ".jinja", ".txt", ".model"), 1_000_000
_MOST_SMALL = 256
_NOT_NEEDED = ("README", "LICENSE", "trainer_state", "training")
_BESIDE = ("adapter_model", "consolidated")
_WHOLE = "model.safetensors"


def needed(
    address: str,
    names: Collection[str],
    file: str | None,
    sizes: Mapping[str, int],
    read_index: Callable[[str], pathlib.Path],
) -> list[str]:
    """The files to fetch, of those of `sizes` bytes that a repository has.

    Args:
      address: for errors.
      names: all files, as paths.
      file: the GGUF that was asked for.
      sizes: bytes of each.
      read_index: fetches an index, which says what the shards are.

    Raises:
      FileNotFoundError: `file` is not among them.
      CheckpointError: nothing that fdq reads, or several models.
    """
    if file is not None:
        if file not in names:
            others = [name for name in names if name.lower().endswith(".gguf")]
            has = f"It has {', '.join(sorted(others)[:8])}." if others else "It has no GGUF."
            raise FileNotFoundError(f"{address}: no such file in the repository. {has}")
        return _parts(file, names)
    if "fdq.json" in names:
        first = [name for name in names if not name.startswith((".", "README"))]
        return sorted(first, key=lambda name: name != "fdq.json")
    top = [name for name in sorted(names) if "/" not in name]
    small = [
        name
        for name in top
        if name in COMPANION_FILES or (name.endswith(_SUFFIXES) and sizes.get(name, 0) <= _SMALL)
        if not name.startswith(_NOT_NEEDED) and not name.endswith(".index.json")
    ]
    # A bounded number of them, those that are known by name first.
    small = sorted(small, key=lambda name: name not in COMPANION_FILES)[:_MOST_SMALL]
    small += templates(names)
    if weights := _safetensors(top, read_index):
        return [*small, *weights]
    if gguf := [name for name in top if name.lower().endswith(".gguf")]:
        models = [name for name in gguf if not name.lower().startswith("mmproj")] or gguf
        firsts = list(dict.fromkeys(_parts(name, names)[0] for name in models))
        if len(firsts) > 1:
            listed = ", ".join(firsts[:12])
            raise CheckpointError(
                f"{address}: {len(firsts)} models in GGUF: {listed}. Name one of them: "
                f"{address}/{firsts[0]}"
            )
        return _parts(firsts[0], names)
    if any(name.split("/")[-1] in ("_METADATA", "manifest.ocdbt") for name in names):
        return [name for name in names if not name.startswith((".", "README"))]
    pickles = [name for name in top if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise CheckpointError(
            f"{address}: only pickled weights ({pickles[0]}), which can run code when loaded, so "
            "fdq does not read them. Use a release in safetensors."
        )
    found = ", ".join(top[:8]) or "nothing"
    raise CheckpointError(f"{address}: no weights that fdq reads; it has {found}.")


def _safetensors(top: list[str], read_index: Callable[[str], pathlib.Path]) -> list[str]:
    files = [name for name in top if name.endswith(".safetensors")]
    files = [name for name in files if not name.startswith(_BESIDE)] or files
    if not files:
        return []
    indices = [name for name in top if name.endswith(".safetensors.index.json")]
    indices = [name for name in indices if not name.startswith(_BESIDE)]
    index = INDEX_NAME if INDEX_NAME in indices else next(iter(indices), None)
    if index is not None:
        shards = _shards(read_index(index))
        if shards and shards <= set(files):
            return [index, *sorted(shards)]
    if _WHOLE in files:
        return [_WHOLE]
    return [*indices, *files]


def _shards(index: pathlib.Path) -> set[str]:
    found = strict_json.read_object(index, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    return set(map(str, found.values())) if isinstance(found, dict) else set()


def _parts(name: str, names: Collection[str]) -> list[str]:
    """All parts of a model in GGUF, the first of them first."""
    match = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})(\.gguf)", name, re.IGNORECASE)
    if match is None:
        return [name]
    count = min(int(match[2]), 10_000)
    parts = [f"{match[1]}-{i:05}-of-{match[2]}{match[3]}" for i in range(1, count + 1)]
    return [part for part in parts if part in names] or [name]


def whole_gguf(names: Collection[str], file: str | None) -> str | None:
    """The first part of a model in GGUF, `file` or the only one, if `names` have all its parts."""
    found = [name for name in names if name.lower().endswith(".gguf") and "/" not in name]
    models = [name for name in found if not name.lower().startswith("mmproj")] or found
    firsts = {_parts(name, names)[0] for name in ([file] if file else models)}
    if len(firsts) != 1:
        return None
    first = firsts.pop()
    of = re.fullmatch(r".+-00001-of-(\d{5})\.gguf", first, re.IGNORECASE)
    parts = _parts(first, names)
    return first if first in names and (of is None or len(parts) == int(of[1])) else None


def is_complete(folder: pathlib.Path) -> bool:
    """Whether all shards that an index names are there, or some weights without one."""
    files = {path.name for path in folder.iterdir() if path.exists()}
    if "fdq.json" in files:
        return (folder / "weights").is_dir()
    if INDEX_NAME in files:
        return _shards(folder / INDEX_NAME) <= files
    return any(name.endswith(".safetensors") for name in files)
