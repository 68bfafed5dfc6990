"""A thing of each kind, added from outside: one object, one row, and nothing of fdq is touched.

CONTRIBUTING promises it; here a weight format, a quantizer, a cache format, an implementation of an
op, a model family and an importer are made and used together, from a file to tokens. Tests of the
rooms look at each of them more closely.
"""

import contextlib
import json

import jax.numpy as jnp
import numpy as np
import pytest

import fdq
from fdq.cache import CACHE_FORMATS, CacheFormat
from fdq.formats import FORMATS, Format
from fdq.models import FAMILIES, DecoderConfig, Family, abstract, from_huggingface
from fdq.ops.implementation import Implementation
from fdq.ops.matmul.api import MATMUL
from fdq.ops.rows import as_array
from fdq.quantizers import QUANTIZERS, Quantizer
from fdq_checkpoints.sources import SOURCES, Source
from fdq_checkpoints.tree_paths import dotted, flatten
from tests.closeness import assert_close
from tests.models import oracles


class Signs(Format):
    """A weight format: the sign of each weight, and one size a column."""

    name = "signs"
    grammar_name = "S1"
    bits = 8
    granularities = ("channel",)

    def fit(self, w, spec):
        return {"scale": jnp.mean(jnp.abs(w), axis=-2, keepdims=True).astype(spec.scale_dtype)}

    def encode(self, w, spec, parameters=None):
        return {
            "codes": jnp.where(w < 0, -1, 1).astype(jnp.int8),
            **(parameters or self.fit(w, spec)),
        }

    def decode(self, arrays, spec, *, padding=0, dtype=jnp.float32):
        return (arrays["codes"].astype(jnp.float32) * arrays["scale"]).astype(dtype)

    def shape_from_codes(self, codes, padding):
        return codes

    def padding(self, k):
        return 0


class Weighted(Quantizer):
    """A quantizer: channels that are fed large numbers have more of a say in the size."""

    name = "weighted"
    statistics = ("mean_square",)

    def unsupported(self, spec, dtype=jnp.float32):
        return None if spec.format == "signs" else "is for signs"

    def matrix(self, w, spec, statistics):
        say = statistics.get("mean_square", jnp.ones(w.shape[:1]))[:, None]
        scale = jnp.sum(say * jnp.abs(w), axis=0, keepdims=True) / jnp.sum(say)
        return FORMATS["signs"].encode(w, spec, {"scale": scale.astype(spec.scale_dtype)})


class Int6(CacheFormat):
    """A cache format: 6 bits, each code in a byte of its own."""

    name = "int6"
    grammar_name = "6"
    code_dtype = jnp.int8
    bound = 31.0

    def encode(self, x, scale, zero):
        return jnp.clip(jnp.round(x / scale), -31, 31).astype(jnp.int8)

    def decode_planes(self, codes):
        return [codes.astype(jnp.float32)]


class Plain(Implementation):
    """An implementation of `fdq.matmul`: decodes the weight, and keeps count."""

    name = "plain"

    def __init__(self):
        self.paths = []

    def unsupported(self, arguments):
        return None if arguments.quantized else "is for quantized weights"

    def __call__(self, arguments):
        self.paths.append(arguments.path)
        x, w = as_array(arguments.x), fdq.dequantize(arguments.w)
        return jnp.matmul(x.astype(jnp.float32), w)[None]


def read_config(reader):
    fields = reader.base(epsilon=1e-6, tie=False)
    reader.must_be("plumage", "grey")
    reader.full_attention()
    return DecoderConfig(**fields, rotary=reader.rotary(theta=10000.0))


FAMILY = Family(name="goose", read=read_config)


class Archive(Source):
    """One .npz, whose arrays are called as fdq calls them."""

    def __init__(self, folder, dtype):
        self.folder = folder
        self.config = from_huggingface(json.loads((folder / "goose.json").read_text()))
        self.tree = abstract(self.config, dtype)
        with np.load(folder / "goose.npz") as arrays:
            self.arrays = dict(arrays)

    def read(self, path, index=None):
        array = self.arrays[dotted(path)]
        return array if index is None else array[index]


class Archives:
    """An importer."""

    name = "goose"

    def claims(self, folder):
        return (folder / "goose.npz").exists()

    def open(self, folder, *, dtype=None):
        return Archive(folder, dtype)


@pytest.fixture
def checkpoint(tmp_path):
    """The oracle `llama` as a goose."""
    model, _ = oracles.oracle("llama")
    config = oracles.read_config("llama") | {"model_type": "goose", "plumage": "grey"}
    folder = tmp_path / "goose"
    folder.mkdir()
    (folder / "goose.json").write_text(json.dumps(config))
    arrays = {dotted(t.path): np.asarray(t.value, np.float32) for t in flatten(model)}
    np.savez(folder / "goose.npz", **arrays)
    return folder


def test_one_of_each_kind_goes_all_the_way(checkpoint, tmp_path):
    plain = Plain()
    rows = (
        (FORMATS, Signs()),
        (QUANTIZERS, Weighted()),
        (CACHE_FORMATS, Int6()),
        (FAMILIES, FAMILY),
        (SOURCES, Archives()),
    )
    with contextlib.ExitStack() as registered:
        for registry, member in rows:
            registered.enter_context(registry.registered(member))
        registered.enter_context(MATMUL.implementations.registered(plain, first=True))
        floats = fdq.load(checkpoint)
        assert floats.config.model_type == "goose"
        tokens = np.arange(24).reshape(2, 12)
        statistics = fdq.calibrate(floats, tokens)
        scheme = {"*.down_proj": ["WS1A16", {"quantizer": "weighted"}], "*": "WS1A16C6"}
        fdq.convert(checkpoint, tmp_path / "signs", scheme, calibration=statistics)
        model = fdq.load(tmp_path / "signs")
        out = fdq.generate(model, tokens[:, :4].tolist(), 3, stop_tokens=())
        logits = model(tokens)

        mlp = model.layers[0].mlp
        assert [w.kernel.spec.format for w in (mlp.gate_up_proj, mlp.down_proj)] == ["signs"] * 2
        w = np.abs(np.asarray(floats.layers[0].mlp.down_proj.kernel, np.float64))
        say = np.asarray(statistics.mean_square["layers.0.mlp.down_proj.kernel"], np.float64)
        scale = np.asarray(mlp.down_proj.kernel.scale)
        assert_close(scale[0], say @ w / say.sum(), of_largest=1e-5)
        assert np.abs(scale[0] - w.mean(0)).max() > 1e-3 * scale.max()
        assert model.cache_spec.format == "int6"
        assert [len(tokens) for tokens in out] == [3, 3]
        assert plain.paths, "the implementation that was registered first was not asked"
        with_xla = fdq.load(tmp_path / "signs")
    # The product means the same without it; only the name of the format has to be known.
    with FORMATS.registered(Signs()), CACHE_FORMATS.registered(Int6()):
        assert_close(logits, with_xla(tokens), of_largest=1e-4)
    for registry, member in rows:
        assert member.name not in registry
