"""Draws `docs/data_flow.svg`: how weights come into fdq, what becomes of them, and where they go.

python -m docs.draw_data_flow          # writes the picture
python -m docs.draw_data_flow --check  # fails if it is not what is written here
"""

from __future__ import annotations

import pathlib
import sys

from fdq.analysis.svg import Picture

PICTURE = pathlib.Path(__file__).with_name("data_flow.svg")
# Left, top, width, height, tint; names in code's letters; what is said below.
BOXES = (
    (16, 18, 170, 56, 1, False, ("Hugging Face or Paddle",), ("float safetensors",)),
    (16, 108, 170, 56, 3, False, ("your NNX model,", "Linen or any pytree"), ()),
    (16, 198, 170, 56, 1, False, ("fdq checkpoint",), ("Orbax weights, manifest",)),
    (252, 98, 154, 76, 0, True, ("fdq.quantize",), ('"W4A16C8": a pure', "function of arrays")),
    (468, 98, 154, 76, 3, False, ("pytree of QTensor",), (
        "packed codes + scales,", "in Flax modules"
    )),
    (684, 98, 154, 76, 0, True, ("prefill, decode",), (
        "one jax.jit, quantized", "KV cache in place"
    )),
)  # fmt: skip
ARROWS = (
    "M186,46 C262,46 300,58 320,96",
    "M186,136 H250",
    "M406,136 H466",
    "M622,136 H682",
    "M510,174 C484,212 420,216 188,216",
    "M186,240 C430,248 560,256 574,176",
    "M761,174 V226",
)
LABELS = (
    (205, 40, "start", "fdq.load, online: tensor by tensor"),
    (262, 207, "start", "fdq.save, fdq convert"),
    (300, 261, "start", "fdq.load, onto any sharding"),
    (761, 244, "middle", "tokens"),
)


def drawing() -> str:
    """The picture as SVG."""
    picture = Picture(854)
    for path in ARROWS:
        picture.arrow(path)
    for left, top, width, height, tint, code, names, said in BOXES:
        picture.box(left, top, width, height, tint)
        middle, base = left + width / 2, top + height / 2 + 4 - 8 * (len(names) + len(said) - 1)
        for index, text in enumerate((*names, *said)):
            small = index >= len(names)
            size = 11 if small else 13
            at = base + 16 * index
            mono = code and not small
            picture.text(middle, at, text, anchor="middle", size=size, dim=small, mono=mono)
    for x, y, anchor, text in LABELS:
        dim = text != "tokens"
        picture.text(x, y, text, anchor=anchor, size=11 if dim else 13, dim=dim, halo=dim)
    return picture.svg(272, "How data flows through fdq")


def main(arguments: list[str]) -> None:
    """Writes the picture, or with `--check` compares it with the one that is there."""
    if arguments == ["--check"]:
        if not PICTURE.exists() or PICTURE.read_text("utf-8") != drawing():
            sys.exit(f"{PICTURE.name} is stale. Run python -m docs.draw_data_flow.")
    elif arguments:
        sys.exit(__doc__)
    else:
        PICTURE.write_text(drawing(), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
