"""What the files of a model are called, whoever published it: weights, tokenizer, templates."""

import os
import pathlib
import re
from collections.abc import Iterable

MAX_INDEX_BYTES = 2**25
INDEX_NAME = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pdparams", ".pdiparams")
# What is copied beside a converted model, so that it can be used without the original; the
# tokenizer takes the special tokens' numbers from config.json.
COMPANION_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
# A folder of more of them: templates for tools, say.
TEMPLATES = "additional_chat_templates"
_MOST_TEMPLATES = 64


def companion_names(folder: pathlib.Path) -> list[str]:
    """Which files are copied beside a converted model, of those in its folder."""
    names = [name for name in COMPANION_FILES if os.path.lexists(folder / name)]
    if (folder / TEMPLATES).is_dir():
        more = [f"{TEMPLATES}/{name}" for name in sorted(os.listdir(folder / TEMPLATES))]
        names += templates(more)
    return names


def templates(names: Iterable[str]) -> list[str]:
    """Of `names` those of additional templates, a bounded number of them."""
    return [name for name in sorted(names) if is_template(name)][:_MOST_TEMPLATES]


def is_template(name: str) -> bool:
    """Whether it is the name of a file below that of additional templates."""
    return re.fullmatch(rf"{TEMPLATES}/\w[\w.-]{{0,99}}\.jinja", name) is not None


def companion_name(path: pathlib.Path) -> str:
    """The name of such a file in the folder of its model."""
    return f"{TEMPLATES}/{path.name}" if path.parent.name == TEMPLATES else path.name


def text_folder(companions: list[pathlib.Path], folder: pathlib.Path) -> pathlib.Path:
    """Where the tokenizer is that lies beside a model; `folder` where nothing does."""
    found = (path.parent for path in companions if path.parent.name != TEMPLATES)
    return next(found, folder)
