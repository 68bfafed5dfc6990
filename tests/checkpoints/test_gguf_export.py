"""Models as GGUF: what gguf reads of them, and what fdq reads again."""

import json

import gguf
import numpy as np
import pytest

import fdq
from fdq.decoding.tokenizer import Tokenizer
from fdq_checkpoints import CheckpointError, convert, load
from fdq_checkpoints.readers.gguf_reader import GgufFile
from fdq_checkpoints.sources import gguf_tokenizer
from tests.checkpoints import builders, gguf_files
from tests.checkpoints.test_gguf import same
from tests.covering import slow_but


def model_of(name, scheme):
    return load(builders.MODELS / name, scheme, method=None if scheme is None else "absmax")


TYPES = {
    "W8A16-g32-f16": "Q8_0",
    "W4A16-g32-f16": "Q4_0",
    "W4A16-g32-affine-f16": "Q4_1",
    "WMXFP4A16": "MXFP4",
    "W8A16-g64-f16": "Q8_0",
}


@pytest.mark.parametrize("scheme", slow_but({"W4A16-g32-f16", "W8A16-g64-f16"}, TYPES))
def test_gguf_decodes_what_fdq_does(scheme, tmp_path):
    model = model_of("llama", {"*.down_proj.*": None, "*": scheme})
    done = fdq.export(model, tmp_path / "out", to="gguf")
    assert done.formats[TYPES[scheme]] == 12
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    config = model.config
    for i, layer in enumerate(model.layers):
        q, k, v = np.split(
            np.asarray(fdq.dequantize(layer.self_attn.qkv_proj.kernel.canonical())).T, [64, 96]
        )
        gate, up = np.split(
            np.asarray(fdq.dequantize(layer.mlp.gate_up_proj.kernel.canonical())).T, 2
        )
        wanted = {
            "attn_q": gguf_files.permuted(q, config.num_heads),
            "attn_k": gguf_files.permuted(k, config.num_kv_heads),
            "attn_v": v,
            "ffn_gate": gate,
            "ffn_up": up,
        }
        for name, values in wanted.items():
            tensor = found[f"blk.{i}.{name}.weight"]
            assert tensor.tensor_type.name == TYPES[scheme]
            decoded = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(decoded, values, err_msg=name)
        plain = found[f"blk.{i}.ffn_down.weight"].data
        np.testing.assert_array_equal(plain, np.asarray(layer.mlp.down_proj.kernel[...]).T)
    back = load(tmp_path / "out")
    if "g64" not in scheme:
        same(model, back)
    kernels = (one.layers[1].self_attn.o_proj.kernel.canonical() for one in (model, back))
    np.testing.assert_array_equal(*map(fdq.dequantize, kernels))


@pytest.mark.parametrize(
    "name",
    slow_but(
        {"ernie4_5_moe"},
        ("llama_bias", "qwen2", "qwen3", "qwen3_moe", "ernie4_5_bias", "ernie4_5_moe"),
    ),
)
def test_every_architecture_comes_back(name, tmp_path):
    model = model_of(name, None)
    fdq.export(model, tmp_path / "out", to="gguf")
    back = load(tmp_path / "out" / "model.gguf")
    same(model, back)
    assert back.config == model.config
    # Also as the converter of llama.cpp names things.
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert names == gguf_files.renamed(*gguf_files.oracle_model(name)).keys()


ROTARY = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position": 64},
    "llama3": {"rope_type": "llama3", "factor": 32.0, "original_max_position": 8192},
    "llama3, short": {"rope_type": "llama3", "factor": 8.0, "original_max_position": 32},
}


@pytest.mark.parametrize("kind", ROTARY)
def test_stretched_positions_come_back(kind, tmp_path):
    model = model_of("llama_bias", None)
    rotary = fdq.nn.rotary.RotaryConfig(theta=500000.0, **ROTARY[kind])
    model.config = model.config.replace(rotary=rotary)
    fdq.export(model, tmp_path / "out", to="gguf")
    assert load(tmp_path / "out").config.rotary == rotary


REFUSED = {
    ("llama", "W4A16-g32"): r"down_proj.kernel \(W4-g32\): no type of GGUF holds it exactly; they",
    ("llama", "W8A8-g32-f16"): "GGUF has no word for quantized inputs",
    ("qwen2_window", None): r"GGUF has no word for sliding_windows=\(None, 6, 6\)",
    ("qwen3_moe_nonorm", None): "GGUF has no word for moe=",
}


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_gguf_cannot_hold_is_refused(case, tmp_path):
    with pytest.raises(CheckpointError, match=REFUSED[case]):
        fdq.export(model_of(*case), tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer_qwen2", "tokenizer_llama-bpe", "tokenizer_llama"])
def test_tokenizers_come_back(name, tmp_path):
    path = gguf_files.ORACLES / f"{name}.gguf"
    with GgufFile(path) as file:
        folder = gguf_tokenizer.companions(path, file.metadata, {})[0].parent
        metadata = file.metadata
    size = len(metadata["tokenizer.ggml.tokens"]) + 2
    config, tensors = gguf_files.oracle_model("llama")
    rows = {"model.embed_tokens.weight", "lm_head.weight"}
    tensors |= {key: np.resize(tensors[key], (size, 64)) for key in rows}
    config |= {"vocab_size": size}
    for key in ("bos_token_id", "eos_token_id"):
        config[key] = metadata[f"tokenizer.ggml.{key}"]
    source = tmp_path / "model"
    builders.model("llama", source)
    builders.write(source / "model.safetensors", tensors)
    (source / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (source / file).write_bytes((folder / file).read_bytes())
    done = fdq.export(source, tmp_path / "out", to="gguf")
    assert not done.notes
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    for key, value in metadata.items():
        if not key.startswith("tokenizer.") or key.endswith("scores"):
            continue
        found = fields[key].contents()
        if key.endswith(("tokens", "token_type")):
            padding = found[len(value) :]
            assert padding == (
                [f"[PAD{size - 2}]", f"[PAD{size - 1}]"] if "tokens" in key else [5, 5]
            )
            found = found[: len(value)]
        assert found == (value.tolist() if isinstance(value, np.ndarray) else value), key
    one, other = (Tokenizer.load(load(x).tokenizer_path) for x in (source, tmp_path / "out"))
    for text in json.loads((gguf_files.ORACLES / "tokenizers.json").read_text())[name]["texts"]:
        assert one.encode(text, bos=True) == other.encode(text, bos=True)
    assert one.stop_token_ids == other.stop_token_ids


def test_a_checkpoint_and_a_tokenizer_without_a_name(tmp_path):
    convert(builders.MODELS / "qwen3", tmp_path / "fdq", "W8A16C8-g32-f16")
    done = fdq.export(tmp_path / "fdq", tmp_path / "out", to="gguf")
    assert done.notes == (
        "Without its tokenizer, which llama.cpp needs: there is no tokenizer.json.",
        "The format of the cache is left out: GGUF has no word for it.",
    )
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["general.name"].contents() == "fdq"
    with pytest.raises(gguf_tokenizer.Unusable, match="splits text by a rule"):
        model = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
        gguf_tokenizer.metadata_of({"model": model, "pre_tokenizer": {"type": "Digits"}}, 1, "x")
    with pytest.raises(gguf_tokenizer.Unusable, match="is number 7 of 1 rows"):
        gguf_tokenizer.metadata_of({"model": {**model, "vocab": {"a": 7}}}, 1, "x")
