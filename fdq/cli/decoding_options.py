"""What `fdq generate` and `fdq chat` share: how tokens are drawn, and a model that is ready."""

import dataclasses
import pathlib
from typing import Annotated, Any

import typer

from fdq.cli import console

MaxNewTokens = Annotated[
    int | None,
    typer.Option(min=1, help="New tokens at most. Default: generation_config.json's, or 128."),
]
Context = Annotated[
    int | None, typer.Option(min=1, help="Tokens in the cache. Default: as many as needed.")
]
Temperature = Annotated[
    float | None,
    typer.Option(min=0.0, help="0 is greedy. Default: generation_config.json's, or 0."),
]
TopK = Annotated[int | None, typer.Option(min=1, help="Only the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Only the likeliest tokens that together have p.")]
MinP = Annotated[
    float | None, typer.Option(help="Only tokens at least p times as likely as the best.")
]
Penalty = Annotated[
    float | None,
    typer.Option("--repetition-penalty", help="Above 1: tokens that are there are less likely."),
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the random choices.")]
System = Annotated[
    str | None, typer.Option(help="What a chat model is told before the conversation.")
]
Template = Annotated[
    pathlib.Path | None,
    typer.Option("--chat-template", help="File with a chat template, in place of the model's."),
]
Lora = Annotated[
    pathlib.Path | None,
    typer.Option("--lora", help="Directory with LoRA adapters, as fdq.save_lora and PEFT write."),
]
DEFAULT_NEW_TOKENS = 128


def chat_template(file: pathlib.Path | None, folder: pathlib.Path) -> Any:
    """The `ChatTemplate` of a file, or of the checkpoint whose tokenizer is in `folder`."""
    from fdq.decoding.chat_template import ChatTemplate

    return ChatTemplate.load(folder) if file is None else ChatTemplate.of_file(file, folder)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How tokens are drawn: what the checkpoint says, and what was asked for in its place.

    Attributes:
      config: the `GenerationConfig` that counts.
      taken: what of it is the checkpoint's, in words; None where there is nothing to say.
    """

    config: Any
    taken: str | None

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of `fdq.generate` and `Conversation`."""
        return {
            "sampling": self.config.sampling,
            "logits_processor": self.config.logits_processor,
        }


def drawing(directory: pathlib.Path, **asked: Any) -> Drawing:
    """Reads generation_config.json; `asked` are the options, None where they were not given."""
    from fdq.decoding.generation_config import GenerationConfig

    penalty = asked.get("repetition_penalty")
    if penalty is not None and penalty <= 0:
        raise ValueError(f"--repetition-penalty {penalty:g}: expected a number above 0.")
    said = GenerationConfig.load(directory)
    config = said.given(**asked)
    counts, own = config.to_dict(), said.given().to_dict()
    parts = [
        f"{name.replace('_', ' ')} {_words(value)}"
        for name, value in own.items()
        if name not in ("do_sample", "left_out") and asked.get(name) is None and name in counts
    ]
    taken = "From generation_config.json: " + ", ".join(parts) if parts else ""
    if config.left_out:
        taken += ("; " if taken else "generation_config.json: ") + "not followed: "
        taken += ", ".join(config.left_out)
    return Drawing(config, f"{taken}." if taken else None)


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else f"{value}"


def text_model(
    directory: pathlib.Path,
    *,
    scheme: Any,
    cache: str | None,
    dtype: str | None,
    mesh: str | None = None,
    lora: pathlib.Path | None = None,
    quiet: bool,
) -> Any:
    """A loaded model that has a tokenizer, with adapters if asked for; ValueError for another."""
    from fdq.schemes.mesh_rules import parse_mesh
    from fdq.storage import load, load_lora

    if lora is not None and mesh is not None:
        raise ValueError(
            "--lora and --mesh do not go together yet: fdq.merge_lora makes one model of the two."
        )
    recipe = console.loading_scheme(scheme)
    devices = None if mesh is None else parse_mesh(mesh)
    with console.progress("Loading", quiet=quiet, in_bytes=True) as update:
        model = load(directory, scheme=recipe, dtype=dtype, mesh=devices, progress=update)
    if model.tokenizer_path is None:
        what = "no tokenizer that fdq reads" if directory.is_file() else "no tokenizer.json"
        raise ValueError(
            f"{directory}: {what}, which a prompt needs. Put that of the original model into the "
            "directory of a model in safetensors or of fdq's."
        )
    check_cache(cache, model)
    return model if lora is None else load_lora(model, lora)


def check_cache(name: str | None, model: Any) -> None:
    """ValueError for a cache format with static scales, of a model that has none."""
    from fdq.cache.kv_cache import parse_format

    spec = None if name is None else parse_format(name)
    if spec is not None and spec.calibrated and model.cache_scales is None:
        what = "means of keys" if spec.dynamic else "static scales"
        raise ValueError(
            f"--cache {name} has {what}, which this checkpoint lacks: convert the original "
            f"to a scheme with that cache, such as W8A16{spec}, with --calibration-text FILE."
        )
