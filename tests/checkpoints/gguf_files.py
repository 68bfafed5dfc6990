"""Writes models as llama.cpp's converter does, with the `gguf` package: names, order of rows."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from tests.checkpoints import builders

ORACLES = builders.MODELS.parent / "gguf"
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "ernie4_5": "ernie4_5",
    "ernie4_5_moe": "ernie4_5-moe",
    "phi3": "phi3",
}
# Where a block has its float16 numbers, which random bytes would make infinite.
HALVES = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "MXFP4": (),
    "IQ4_NL": (0,), "TQ1_0": (52,),
}  # fmt: skip
# Of these numbers, that weights are about 0.1.
SIZES = {
    "Q2_K": 6e-3, "Q3_K": 3e-3, "Q4_K": 3e-4, "Q5_K": 2e-4, "Q6_K": 1e-4,
    "Q4_0": 0.02, "Q4_1": 0.02, "Q5_0": 0.01, "Q5_1": 0.01, "Q8_0": 1e-3,
}  # fmt: skip


def random_blocks(kind: str, shape: tuple[int, ...], rng) -> np.ndarray:
    """Rows of blocks of any codes: uint8 `[..., bytes of a row]`."""
    weights, nbytes = gguf.GGML_QUANT_SIZES[Type[kind]]
    rows = rng.integers(0, 256, (*shape[:-1], shape[-1] // weights, nbytes), np.uint8)
    for at in HALVES[kind]:
        halves = (SIZES.get(kind, 0.01) * rng.normal(size=rows.shape[:-1])).astype(np.float16)
        rows[..., at : at + 2] = halves[..., None].view(np.uint8)
    if kind == "MXFP4":
        rows[..., 0] = rng.integers(118, 124, rows.shape[:-1])
    return rows.reshape(*shape[:-1], -1)


def decoded(rows: np.ndarray, kind: str) -> np.ndarray:
    """By gguf, float32."""
    return gguf.quants.dequantize(rows, Type[kind])


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """What the converter makes of rows of q and k of Llama."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def rope_factors(config: Mapping[str, Any], rope: Mapping[str, Any]) -> np.ndarray:
    """What llama.cpp divides frequencies by for `llama3`."""
    d, old = config["head_dim"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, d, 2, dtype=np.float32) / d)
    smooth = np.clip((old / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def write(
    path: pathlib.Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    kind_of: Callable[[str, tuple[int, ...]], str] = lambda name, shape: "F32",
    *,
    values: Mapping[str, Any] | None = None,
    blocks: Mapping[str, np.ndarray] | None = None,
    add: Callable[[gguf.GGUFWriter], None] | None = None,
    **options: Any,
) -> None:
    """A model of a Hugging Face config and tensors.

    `kind_of` says by GGUF's name and shape which type a matrix gets, encoded by gguf where
    `blocks` does not have it.
    """
    writer = _writer(path, config, values or {}, **options)
    if add is not None:
        add(writer)
    for name, array in renamed(config, tensors).items():
        kind = kind_of(name, array.shape) if array.ndim > 1 else "F32"
        if blocks and name in blocks:
            writer.add_tensor(name, blocks[name], raw_dtype=Type[kind])
        elif kind == "F32":
            writer.add_tensor(name, np.ascontiguousarray(array, np.float32))
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, Type[kind]), raw_dtype=Type[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def renamed(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors by GGUF's names, with experts stacked and rows of Llama's q and k permuted."""
    name = ARCHITECTURES[config["model_type"]]
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    of_llama = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    found: dict[str, np.ndarray] = {}
    stacks: dict[str, list[np.ndarray]] = {}
    for theirs, array in tensors.items():
        stem, _, end = theirs.rpartition(".")
        if "mlp.experts." in theirs:
            room, _, expert = stem.partition(".experts.")
            number, part = expert.split(".")
            stacks.setdefault(f"{room}.experts.{part}", []).insert(int(number), array)
            continue
        if stem.endswith("moe_statics"):
            stem, end, array = f"{stem}.{end}", "bias", array[0]
        # llama.cpp knows no dense layers of Qwen3-MoE, which has them.
        mine = names.get_name(stem) or of_llama.get_name(stem)
        if theirs.endswith("e_score_correction_bias"):
            mine = f"blk.{theirs.split('.')[2]}.exp_probs_b"
        assert mine is not None, theirs
        if name == "llama" and mine.endswith(("attn_q", "attn_k")):
            key = "num_attention_heads" if mine.endswith("q") else "num_key_value_heads"
            array = permuted(array, config[key])
        found[f"{mine}.{end}"] = array
    for stem, arrays in stacks.items():
        found[f"{names.get_name(stem)}.weight"] = np.stack(arrays)
    rope = config.get("rope_parameters", {})
    if rope.get("rope_type") == "longrope":
        for kind in ("long", "short"):
            found[f"rope_factors_{kind}.weight"] = np.asarray(rope[f"{kind}_factor"], np.float32)
    if rope.get("rope_type") == "llama3":
        found["rope_freqs.weight"] = rope_factors(config, rope)
    return found


def _writer(
    path: pathlib.Path, config: Mapping[str, Any], values: Mapping[str, Any], **options: Any
) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config["model_type"]], **options)
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    if f"{writer.arch}.rope.dimension_count" not in values:
        writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    if "pad_token_id" in config:
        writer.add_pad_token_id(config["pad_token_id"])
    if config["model_type"] == "qwen3_moe":
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if config["model_type"] == "ernie4_5_moe":
        writer.add_expert_count(config["moe_num_experts"])
        writer.add_expert_used_count(config["moe_k"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_interleave_moe_layer_step(config["moe_layer_interval"])
        writer.add_leading_dense_block_count(config["moe_layer_start_index"])
        writer.add_expert_shared_count(config["moe_num_shared_experts"])
    for key, value in values.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    return writer


def oracle_model(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The config and the tensors of one of the oracles' models."""
    folder = builders.MODELS / name
    config = json.loads((folder / "config.json").read_text())
    return config, builders.tensors_of(folder / "model.safetensors")


def rewritten(source, path, values, *, drop=(), types=None):
    """A copy with other values of metadata, without some tensors, with others' types."""
    reader = gguf.GGUFReader(source)
    fields = {
        name: field.contents() for name, field in reader.fields.items() if name[:5] != "GGUF."
    }
    fields |= values
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture"))
    for name, value in fields.items():
        writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    for tensor in reader.tensors:
        kind = (types or {}).get(tensor.name, tensor.tensor_type)
        if tensor.name not in drop:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
