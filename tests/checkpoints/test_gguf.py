"""Models in GGUF: values as gguf decodes them, logits and tokens as transformers computes them."""

import dataclasses
import json
import logging
import pathlib
import shutil
import unicodedata

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

import fdq
from fdq.decoding.chat_template import ChatTemplate
from fdq.decoding.tokenizer import Tokenizer
from fdq_checkpoints import CheckpointError, convert, inspect, load
from fdq_checkpoints.readers.gguf_reader import TYPES, GgufFile
from fdq_checkpoints.sources import ggml_blocks, gguf_tokenizer
from tests.checkpoints import builders, gguf_files
from tests.covering import longest, slow, slow_but


def test_sizes_of_types_are_ggufs():
    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    mine = {number: (kind.name, kind.weights, kind.nbytes) for number, kind in TYPES.items()}
    assert mine == {number: theirs[number] for number in mine}


def blocks(kind, rng, n=6, k=512):
    rows = gguf_files.random_blocks(kind, (n, k), rng)
    return ggml_blocks.BlockWeight(kind, k, rows), gguf_files.decoded(rows, kind)


@pytest.mark.parametrize("kind", ggml_blocks.READERS)
def test_codes_are_kept(kind, rng):
    """Bit for bit, in the narrowest format that holds them and in each wider one."""
    weight, wanted = blocks(kind, rng)
    np.testing.assert_array_equal(weight.floats(), wanted)
    for spec in {ggml_blocks.spec_of([kind, other]) for other in ggml_blocks.READERS}:
        found = fdq.dequantize(weight.as_spec(spec).qtensor())
        np.testing.assert_array_equal(np.asarray(found).T, wanted, err_msg=str(spec))


SPECS = {
    ("Q8_0",): "W8-g32-f16",
    ("Q4_0",): "W4-g32-f16",
    ("Q4_1",): "W4-g32-affine-f16",
    ("Q2_K",): "W2-g16-affine-f32",
    ("Q3_K",): "W3-g16-f32",
    ("Q4_K",): "W4-g32-affine-f32",
    ("Q6_K",): "W8-g16-f32",
    ("MXFP4",): "WMXFP4",
    ("Q4_K", "Q4_K", "Q6_K"): "W8-g16-affine-f32",
    ("Q4_0", "Q8_0"): "W8-g32-f16",
    ("Q4_0", "Q4_1"): "W4-g32-affine-f32",
    ("Q4_0", "MXFP4"): "W8-g32-f32",
}


@pytest.mark.parametrize("kinds", SPECS, ids="+".join)
def test_the_narrowest_format_of_a_joined_layer(kinds):
    assert str(ggml_blocks.spec_of(kinds)) == SPECS[kinds]


@pytest.mark.parametrize("name", [slow("llama_k"), longest("qwen3_blocks")])
def test_models_compute_what_transformers_does(name, caplog):
    with caplog.at_level(logging.WARNING, "fdq"):
        model = load(gguf_files.ORACLES / f"{name}.gguf", dtype="float32")
    assert not caplog.text
    expected = np.load(gguf_files.ORACLES / f"{name}.npz")
    for layer in model.layers:
        for linear in (layer.self_attn.qkv_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj):
            assert isinstance(linear.kernel, fdq.QTensor)
    prompt = expected["input_ids"]
    np.testing.assert_allclose(model(prompt), expected["logits"], atol=1e-4)
    found = fdq.generate(model, jnp.asarray(prompt[:, :6]), expected["greedy"].shape[1])
    np.testing.assert_array_equal(found, expected["greedy"])


# By transformers, of the same weights in safetensors.
@pytest.mark.parametrize(
    "name",
    slow_but(
        {"qwen2"},
        (
            *("llama", "llama_bias", "qwen2", "qwen3", "qwen3_moe"),
            *("ernie4_5", "ernie4_5_bias", "ernie4_5_moe", "ernie4_5_moe_untied"),
        ),
    ),
)
def test_every_architecture_in_floats(name, tmp_path):
    config, tensors = gguf_files.oracle_model(name)
    gguf_files.write(tmp_path / "model.gguf", config, tensors)
    expected = np.load(builders.MODELS / name / "expected.npz")
    model = load(tmp_path / "model.gguf")
    assert model.config.dtype == "float32"
    np.testing.assert_allclose(model(expected["input_ids"]), expected["logits"], atol=1e-4)


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.05, 1.1, 1.2],
    "long_factor": [1.0, 1.3, 1.8, 2.4],
    "factor": 4.0,
}


@pytest.mark.parametrize("name", ["mistral", "phi3", "phi3, longrope"])
def test_families_are_the_same_as_in_safetensors(name, tmp_path):
    config, tensors = gguf_files.oracle_model("llama")
    config |= {"model_type": name.partition(",")[0], "sliding_window": 6}
    config["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": "default"}
    for key in ("attention_bias", "mlp_bias", "pretraining_tp"):
        del config[key]
    arch, values = gguf_files.ARCHITECTURES[config["model_type"]], {}
    values[f"{arch}.attention.sliding_window"] = 6
    if name != "mistral":
        del config["head_dim"]
        joined = {
            "qkv_proj": ("q_proj", "k_proj", "v_proj"),
            "gate_up_proj": ("gate_proj", "up_proj"),
        }
        for key in [key for key in tensors if key.endswith(("q_proj.weight", "gate_proj.weight"))]:
            room, part = key.removesuffix(".weight").rsplit(".", 1)
            whole = next(x for x, parts in joined.items() if part in parts)
            rows = [tensors.pop(f"{room}.{one}.weight") for one in joined[whole]]
            tensors[f"{room}.{whole}.weight"] = np.concatenate(rows)
    if name == "phi3, longrope":
        config["rope_parameters"] |= LONGROPE | {"partial_rotary_factor": 0.5}
        config["original_max_position_embeddings"] = 64
        values |= {
            "phi3.rope.dimension_count": 8,
            "phi3.rope.scaling.original_context_length": 64,
            "phi3.rope.scaling.attn_factor": float(np.sqrt(1 + np.log(4) / np.log(64))),
        }
    gguf_files.write(tmp_path / "model.gguf", config, tensors, values=values)
    builders.model("llama", tmp_path / "model")
    builders.write(tmp_path / "model" / "model.safetensors", tensors)
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    one, other = load(tmp_path / "model.gguf"), load(tmp_path / "model")
    same(one, other)
    scales = [model.config.rotary.scale for model in (one, other)]
    assert scales[0] == pytest.approx(scales[1], rel=1e-6)
    plain = [
        dataclasses.replace(model.config.rotary, attention_factor=None, factor=1.0)
        for model in (one, other)
    ]
    assert one.config.replace(rotary=plain[0]) == other.config.replace(rotary=plain[1])


def leaves(model):
    from fdq_checkpoints import tree_paths

    return {tree_paths.dotted(t.path): t.value for t in tree_paths.flatten(model)}


def same(one, other):
    one, other = leaves(one), leaves(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        arrays = value.arrays() if isinstance(value, fdq.QTensor) else {"": value}
        theirs = other[name].arrays() if isinstance(value, fdq.QTensor) else {"": other[name]}
        for key, array in arrays.items():
            a, b = np.asarray(array), np.asarray(theirs[key])
            np.testing.assert_array_equal(a, b, err_msg=f"{name} {key}")


def experts_model(path, rng, kind="Q4_1", **options):
    config, tensors = gguf_files.oracle_model("qwen3_moe")
    config |= {"moe_intermediate_size": 32}
    shapes = {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}
    for name in tensors:
        part = name.split(".")[-2]
        if "mlp.experts" in name:
            tensors[name] = rng.normal(size=shapes[part]).astype(np.float32) / 8

    def kind_of(name, shape):
        return kind if "_exps" in name or "attn_q.weight" in name else "F32"

    gguf_files.write(path, config, tensors, kind_of, **options)
    return config, gguf_files.renamed(config, tensors)


def test_experts_are_stacked_and_parts_that_have_nothing_in_common_decoded(tmp_path, rng, caplog):
    _, tensors = experts_model(tmp_path / "model.gguf", rng)
    with caplog.at_level(logging.WARNING, "fdq"):
        model = load(tmp_path / "model.gguf", dtype="float32")
    # q in codes, k and v in floats.
    assert caplog.text.count("is stored in different ways") == 3
    q = gguf.quants.quantize(tensors["blk.0.attn_q.weight"], Type.Q4_1)
    found = np.asarray(model.layers[0].self_attn.qkv_proj.kernel[...])[:, : len(q)]
    np.testing.assert_array_equal(found.T, gguf_files.decoded(q, "Q4_1"))
    experts = model.layers[0].mlp.experts
    for layer, parts in (("gate_up_proj", ["gate", "up"]), ("down_proj", ["down"])):
        kernel = getattr(experts, layer).kernel
        assert str(kernel.spec) == "W4-g32-affine-f16"
        rows = [tensors[f"blk.0.ffn_{part}_exps.weight"] for part in parts]
        rows = [gguf_files.decoded(gguf.quants.quantize(x, Type.Q4_1), "Q4_1") for x in rows]
        wanted = np.concatenate(rows, axis=1).swapaxes(1, 2)
        np.testing.assert_array_equal(fdq.dequantize(kernel.canonical()), wanted)


def test_files_directories_conversion_and_another_scheme(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    path = pathlib.Path(shutil.copy(gguf_files.ORACLES / "qwen3_blocks.gguf", folder))
    shutil.copy(gguf_files.ORACLES / "tokenizer_qwen2.gguf", folder / "mmproj-model.gguf")
    model = load(folder)
    assert model.config.dtype == "bfloat16"
    same(model, load(path))
    found = convert(path, tmp_path / "out", None)
    assert found.kind == "model"
    same(model, load(tmp_path / "out"))
    text = str(inspect(path))
    assert "model in GGUF, " in text and "Q5_1 (4)" in text and "Q8_0 (3)" in text
    assert "W8-g32-affine" in text and f"({path.stat().st_size:,} on disk)" in text
    remade = load(path, "W8A16")
    assert str(remade.layers[0].mlp.down_proj.kernel.spec) == "W8"
    shutil.copy(path, folder / "other.gguf")
    for use in (load, inspect, lambda x: convert(x, tmp_path / "no", "W8A16")):
        with pytest.raises(CheckpointError, match=r"2 models in GGUF: other.gguf, qwen3.*Name one"):
            use(folder)


def test_text_goes_in_and_out_and_with_a_conversion(tmp_path):
    config, tensors = gguf_files.oracle_model("qwen2")
    tokens = GgufFile(gguf_files.ORACLES / "tokenizer_qwen2.gguf").metadata["tokenizer.ggml.tokens"]
    rows = np.resize(tensors["model.embed_tokens.weight"], (len(tokens), config["hidden_size"]))
    tensors |= {"model.embed_tokens.weight": rows}
    values = {
        key: field.contents()
        for key, field in gguf.GGUFReader(
            gguf_files.ORACLES / "tokenizer_qwen2.gguf"
        ).fields.items()
        if key.startswith("tokenizer.") and "_token_id" not in key
    }
    config |= {"vocab_size": len(rows), "eos_token_id": tokens.index("<|im_end|>")}
    values["tokenizer.chat_template.tool_use"] = "{{ tools }}"
    gguf_files.write(tmp_path / "model.gguf", config, tensors, values=values)
    model = load(tmp_path / "model.gguf")
    assert model.config.eos_token_ids == (tokens.index("<|im_end|>"),)
    found = convert(tmp_path / "model.gguf", tmp_path / "out", "W8A16")
    files = ["config.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.json")) == sorted(
        [*files, "fdq.json"]
    )
    said = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert said["eos_token"] == "<|im_end|>"
    templates = ChatTemplate.load(tmp_path / "out").templates
    assert templates == {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    assert found.scheme == "W8A16C16"
    prompt = "Hello<|im_end|> there"
    texts = fdq.generate(model, [prompt], 4)
    ids = Tokenizer.load(model.tokenizer_path).encode(prompt, bos=True)
    tokens = fdq.generate(model, jnp.asarray([ids]), 4)
    assert texts == [Tokenizer.load(tmp_path / "out").decode(np.asarray(tokens)[0].tolist())]


def test_a_tokenizer_that_fdq_does_not_know_is_told(tmp_path, caplog):
    for key, value, message in (
        ("pre", "mpt", "pre-tokenizer 'mpt'; known are gpt-2"),
        ("model", "bert", "model 'bert'; gpt2 and llama are known"),
        ("merges", ["a  b"], "merge 'a  b' is not one of tokens"),
        ("bos_token_id", 9999, "bos_token_id = 9999 of 388 tokens"),
    ):
        path = tmp_path / f"{key}.gguf"
        gguf_files.rewritten(
            gguf_files.ORACLES / "tokenizer_qwen2.gguf", path, {f"tokenizer.ggml.{key}": value}
        )
        with GgufFile(path) as file, caplog.at_level(logging.WARNING, "fdq"):
            files = gguf_tokenizer.companions(path, file.metadata, {})
        assert [one.name for one in files] == ["config.json"]
        assert f"its tokenizer is not read, so text is not either (token ids are): {message}" in (
            caplog.text
        )


def test_a_model_in_parts(tmp_path, rng):
    experts_model(tmp_path / "model.gguf", rng)
    experts_model(tmp_path / "part.gguf", rng, split_max_tensors=9)
    parts = sorted(tmp_path.glob("part-*.gguf"))
    assert len(parts) > 2
    whole = load(tmp_path / "model.gguf").config
    assert load(parts[1]).config == whole
    (tmp_path / "model.gguf").unlink()
    assert load(tmp_path).config == whole
    parts[1].rename(tmp_path / "moved")
    for path in (parts[0], tmp_path):
        with pytest.raises(CheckpointError, match=rf"{parts[1].name} is missing beside it"):
            load(path)
    shutil.copy(parts[0], parts[1])
    with pytest.raises(CheckpointError, match=r"part 0 \(from 0\) of .*, found as 1 of"):
        load(parts[0])


def test_rope_factors_of_llama3_are_named(tmp_path):
    config, tensors = gguf_files.oracle_model("llama")
    config["rope_parameters"]["original_max_position_embeddings"] = 8192
    gguf_files.write(tmp_path / "model.gguf", config, tensors)
    rotary = load(tmp_path / "model.gguf").config.rotary
    assert (rotary.rope_type, rotary.factor, rotary.original_max_position) == ("llama3", 8.0, 8192)


@pytest.mark.parametrize("name", ["tokenizer_qwen2", "tokenizer_llama-bpe", "tokenizer_llama"])
def test_tokenizers_are_those_of_transformers(name):
    expected = json.loads((gguf_files.ORACLES / "tokenizers.json").read_text())[name]
    path = gguf_files.ORACLES / f"{name}.gguf"
    with GgufFile(path) as file:
        folder = gguf_tokenizer.companions(path, file.metadata, {})[0].parent
    tokenizer = Tokenizer.load(folder)
    pieces, composes = name == "tokenizer_llama", name == "tokenizer_qwen2"
    assert len(tokenizer.first_token_ids) == (not composes)
    for text, ids in zip(expected["texts"], expected["ids"], strict=True):
        found = tokenizer.encode(text)
        if "<|" not in text:
            assert tokenizer.decode(found) == (
                unicodedata.normalize("NFC", text) if composes else text
            )
        if pieces and (text.startswith(" ") or "<|" in text):
            continue  # transformers puts no space before spaces, nor after a special token
        if composes and not unicodedata.is_normalized("NFC", text):
            continue  # nor does it what Qwen's own tokenizer.json does
        assert found == ids, text
    if pieces:
        owner = json.loads((gguf_files.ORACLES / "sentencepiece.json").read_text())
        for text, ids in zip(owner["texts"], owner["ids"], strict=True):
            assert tokenizer.encode(text) == ids, text
