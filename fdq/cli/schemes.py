"""What `--scheme` may be: a name, or a JSON file with FastDeploy's quantization_config."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from fdq.schemes.recipe import Recipe


def read_scheme(text: str) -> Any:
    """The scheme name itself, or the `Recipe` of the JSON file that `text` names.

    The file holds FastDeploy's `quantization_config`, a config.json that has one, or rules.

    Raises:
      ValueError: not JSON, or not a configuration that FastDeploy writes.
      FileNotFoundError: `text` ends in .json and there is no such file.
    """
    if not text.lower().endswith(".json"):
        Recipe.parse(text)  # a wrong name is found before a model is read
        return text
    try:
        value = json.loads(pathlib.Path(text).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{text}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{text}: expected a JSON object, got {type(value).__name__}.")
    return Recipe.parse(value.get("quantization_config", value))
