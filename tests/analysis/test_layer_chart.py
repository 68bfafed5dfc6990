"""The picture of a checkpoint: its layers, and that bars are as long as figures say."""

import dataclasses
import xml.etree.ElementTree as ElementTree

import pytest

from fdq.analysis import layer_chart


@dataclasses.dataclass
class Tensor:
    path: str
    nbytes: int
    size: int


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("layers.3.self_attn.o_proj.kernel", "layers.3"),
        ("model.decoder.blocks.11.mlp.w", "model.decoder.blocks.11"),
        ("embed_tokens.embedding", "embed_tokens"),
        ("7", "7"),
        ("w2.kernel", "w2"),
    ],
)
def test_layers(path, layer):
    assert layer_chart.layer_of(path) == layer


def test_bars_are_to_scale():
    tensors = [
        Tensor("layers.0.mlp.up.kernel", 1000, 1000),
        Tensor("layers.0.self_attn.q.kernel", 1000, 2000),
        Tensor("layers.1.mlp.up.kernel", 500, 1000),
    ]
    errors = {"layers.0.mlp.up.kernel": (1.0, 50.0), "layers.0.self_attn.q.kernel": (1.0, 150.0)}
    root = ElementTree.fromstring(layer_chart.layer_chart("a < b", tensors, errors))
    bars = [one for one in root.iter("{http://www.w3.org/2000/svg}rect") if len(one)]
    said = {one[0].text: float(one.get("width")) for one in bars}
    assert said == {
        "layers.0, dense mlp: 1,000 bytes": 150.0,
        "layers.0, attention: 1,000 bytes": 150.0,
        "layers.1, dense mlp: 500 bytes": 75.0,
    }
    words = [one.text for one in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "a < b" in words and "10.00%" in words  # sqrt(2 / 200)
    assert words.count("5.33") == words.count("4.00") == 1


def test_nothing_is_not_drawn():
    with pytest.raises(ValueError, match="1 to 1000 layers, this would have 0"):
        layer_chart.layer_chart("empty", [])
