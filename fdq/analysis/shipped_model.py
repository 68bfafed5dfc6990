"""Where the small trained model is that comes with fdq.

In a wheel it is package data (`fdq/tiny_ernie`), in a clone of the repository it is
`examples/tiny_ernie`.
"""

import pathlib

NAME = "tiny_ernie"


def shipped_model_path() -> pathlib.Path:
    """The directory of the shipped model, in Hugging Face format with its tokenizer."""
    package = pathlib.Path(__file__).resolve().parent.parent
    places = (package / NAME, package.parent / "examples" / NAME)
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise FileNotFoundError(
        f"The shipped model is missing: looked for config.json in {places[0]} and {places[1]}. "
        "Install fdq-jax anew, or train it: "
        "python examples/train_tiny_ernie.py --out examples/tiny_ernie"
    )
