"""Which directory is meant: errors that point the way from a name, an address or a file to one."""

import logging
import os
import pathlib
import re

from fdq_checkpoints.errors import CheckpointError, shown
from fdq_checkpoints.readers import hub

_LOGGER = logging.getLogger("fdq")
_EXPECTED = (
    "Expected the directory of a checkpoint: a Hugging Face one (config.json and *.safetensors), "
    "one that `fdq convert` made (fdq.json), Orbax's, or a model in GGUF."
)
# As owner/name on the hub; a path of two parts may look like one.
_REPOSITORY = r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*"
_PAGE = rf"https?:/+(?:www\.)?(?:huggingface\.co|hf\.co)/(?:models/)?({_REPOSITORY})"
_ADDRESS = r"(?:[a-z][a-z0-9+.-]+):/"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pdparams")


def local_directory(path: str | os.PathLike[str]) -> pathlib.Path:
    """The path, if it is a directory, or a model in GGUF; of `hf://owner/name` where it now is.

    Raises:
      FileNotFoundError: there is none; says how to download what looks like a name on a hub.
      CheckpointError: it is another file; says which directory to give.
      TypeError: no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"expected the path of a checkpoint's directory, found {path!r:.100}.")
    if not os.fspath(path):
        raise FileNotFoundError(f"an empty path. {_EXPECTED}")  # not the current directory
    folder = pathlib.Path(path)
    if not os.path.lexists(folder) and (address := hub.Address.parse(os.fspath(path))):
        return hub.fetch(address)
    if folder.is_dir() or (folder.is_file() and is_gguf(folder)):
        return folder
    if os.path.lexists(folder):
        raise CheckpointError(_of_file(folder))
    # pathlib makes one slash of the two in an address.
    text = re.sub(rf"^({_ADDRESS})(?!/)", r"\1/", os.fspath(path))
    if match := re.match(_PAGE, text):
        raise FileNotFoundError(f"{shown(text)}: a page. For the model give hf://{match[1]}")
    if re.match(_ADDRESS, text):
        raise FileNotFoundError(
            f"{shown(text)}: an address that fdq does not know. Download the checkpoint first"
            f"{_copied(text)} and give its directory."
        )
    if re.fullmatch(_REPOSITORY, text) and not folder.parent.exists():
        raise FileNotFoundError(
            f"{text} does not exist. If it is a model on the Hugging Face hub, give hf://{text}"
        )
    raise FileNotFoundError(
        f"{folder} does not exist. {_EXPECTED} A model on the Hugging Face hub is hf://owner/name."
    )


def local_destination(path: str | os.PathLike[str]) -> None:
    """CheckpointError for an address, also one that epath made a path of: there is no such disk."""
    if isinstance(path, str | os.PathLike) and re.match(_ADDRESS, os.fspath(path)):
        text = re.sub(rf"^({_ADDRESS})(?!/)", r"\1/", os.fspath(path))
        raise CheckpointError(
            f"{shown(text)}: an address, and fdq writes to local directories only. Write to one, "
            f"and upload it{_copied(text, upload=True)}."
        )


def _copied(address: str, *, upload: bool = False) -> str:
    """The command that does it, for the stores that everybody has one for."""
    tools = {"gs": "gcloud storage cp -r", "s3": "aws s3 cp --recursive"}
    tool = tools.get(address.split(":")[0])
    if tool is None:
        return ""
    return (
        f" (`{tool} {'DIR' if upload else shown(address)} {shown(address) if upload else 'DIR'}`)"
    )


def _of_file(path: pathlib.Path) -> str:
    if path.suffix in _PICKLES:
        return (
            f"{path} is a file of pickled weights, which can run code when loaded, so fdq does not "
            "read it. Use a release in safetensors."
        )
    if path.suffix == ".safetensors" or path.name in ("config.json", "fdq.json"):
        return f"{path} is a file of a checkpoint; give the directory that holds it, {path.parent}."
    return f"{path} is a file. {_EXPECTED}"


def is_gguf(path: pathlib.Path) -> bool:
    """By its name, or by its first four bytes."""
    if path.suffix.lower() == ".gguf":
        return True
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def gguf_parts(path: pathlib.Path) -> list[pathlib.Path]:
    """All files of a model in GGUF, of which `path` is one: `<name>-00001-of-00003.gguf`.

    Raises:
      CheckpointError: parts are missing.
    """
    match = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", path.name, re.IGNORECASE)
    if match is None:
        return [path]
    count = int(match[3])
    if not 1 <= int(match[2]) <= count:
        raise CheckpointError(f"{path}: its name says part {int(match[2])} of {count}.")
    names = (f"{match[1]}-{i:05}-of-{match[3]}{match[4]}" for i in range(1, count + 1))
    parts = [path.with_name(name) for name in names]
    if missing := next((part.name for part in parts if not part.is_file()), None):
        raise CheckpointError(
            f"{path}: one of {count} parts, and {missing} is missing beside it. Download "
            "all of them."
        )
    return parts


def model_gguf(path: pathlib.Path) -> pathlib.Path:
    """The GGUF that is meant: a file, or the only model in a directory (in parts its first).

    Raises:
      CheckpointError: there are several.
    """
    if not path.is_dir():
        return gguf_parts(path)[0]
    names = [name for name in sorted(os.listdir(path)) if name.lower().endswith(".gguf")]
    # Encoders of images lie beside the models that they are for.
    names = [name for name in names if not name.lower().startswith("mmproj")] or names
    found = list(dict.fromkeys(gguf_parts(path / name)[0] for name in names))
    if len(found) != 1:
        raise CheckpointError(
            f"{path}: {len(found)} models in GGUF: {', '.join(file.name for file in found)}. Name "
            f"one of them, such as {found[0]}."
        )
    return found[0]


def without_config(folder: pathlib.Path) -> str | None:
    """Where the checkpoint is that somebody means by a directory without config.json, if seen."""
    names = sorted(os.listdir(folder))
    if gguf := [name for name in names if name.lower().endswith(".gguf")]:
        return (
            f"{folder}: safetensors without a config.json, and {gguf[0]}. Name the GGUF if it is "
            "meant."
        )
    if "adapter_config.json" in names:
        return (
            f"{folder}: adapters (PEFT) without their model. Load the model and put them beside "
            "its layers, fdq.load_lora(model, directory), or merge them into it with PEFT."
        )
    snapshots = folder / "snapshots"
    below = snapshots if snapshots.is_dir() else folder
    found = [
        entry
        for entry in sorted(below.iterdir())
        if any((entry / name).is_file() for name in ("config.json", "fdq.json"))
    ]
    if found:
        newest = max(found, key=lambda entry: entry.stat().st_mtime)
        more = f" (or one of {len(found) - 1} more)" if len(found) > 1 else ""
        return f"{folder}: no config.json, but {newest} has one. Give that directory{more}."
    return None


def sentencepiece(folder: pathlib.Path) -> str | None:
    """The name of a directory's SentencePiece model, if it has one."""
    names = ("tokenizer.model", "spiece.model")
    return next((name for name in names if (folder / name).is_file()), None)


def tell_of_sentencepiece(folder: pathlib.Path) -> None:
    """Says how to make a tokenizer.json, where a directory has a SentencePiece model alone."""
    model = sentencepiece(folder)
    if model is not None and not (folder / "tokenizer.json").is_file():
        _LOGGER.warning(
            "%s: a SentencePiece %s and no tokenizer.json, which text needs (token ids do not). "
            "With transformers and sentencepiece, AutoTokenizer.from_pretrained(%r)"
            ".save_pretrained(%r) makes one.",
            folder,
            model,
            str(folder),
            str(folder),
        )


def tell_of_adapters(folder: pathlib.Path) -> None:
    """Says that the model is read without what PEFT would put on it."""
    if (folder / "adapter_model.safetensors").is_file():
        _LOGGER.warning(
            "%s: adapter_model.safetensors is not applied; fdq.load_lora(model, %r) does it.",
            folder,
            str(folder),
        )
