"""Makes `gguf/`: models in GGUF and what transformers computes with them; tokenizers in GGUF.

    python make_gguf.py                # all
    python make_gguf.py --check        # only run transformers on what is there, and compare

Blocks of the weights are random bytes, so that all codes occur. transformers decodes them, with
rows of Llama's q and k put back in order, and makes tokenizers of the metadata.
"""

import argparse
import json
import pathlib
import sys
import tempfile
import warnings

import gguf
import numpy as np
import sentencepiece
import tokenizers
import torch
import transformers

HERE = pathlib.Path(__file__).resolve().parent
FOLDER = HERE / "gguf"
sys.path.insert(0, str(HERE.parent.parent))
from tests.checkpoints import gguf_files  # noqa: E402

warnings.filterwarnings("ignore")
IDS = np.random.default_rng(7).integers(0, 64, (2, 12))
STEPS = 12
COMMON = {
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0},
}
MODELS = {
    # As Q4_K_M mixes them: v and down wider than the others.
    "llama_k": (
        {
            "model_type": "llama",
            "hidden_size": 256,
            "intermediate_size": 256,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 64,
        },
        {
            "attn_q": "Q4_K", "attn_k": "Q4_K", "attn_v": "Q6_K", "attn_output": "Q3_K",
            "ffn_gate": "Q2_K", "ffn_up": "Q2_K", "ffn_down": "Q5_K", "token_embd": "Q4_K",
            "output": "Q6_K",
        },
        False,
    ),
    "qwen3_blocks": (
        {
            "model_type": "qwen3",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 128,
        },
        {
            "attn_q": "Q4_0", "attn_k": "Q4_1", "attn_v": "Q8_0", "attn_output": "Q5_0",
            "ffn_gate": "Q5_1", "ffn_up": "Q5_1", "ffn_down": "Q4_1", "token_embd": "Q8_0",
        },
        True,
    ),
}  # fmt: skip


def make_model(name: str) -> None:
    changes, kinds, tied = MODELS[name]
    config, rng = COMMON | changes, np.random.default_rng(3)
    heads, kv = (
        config[f"num_{key}_heads"] * config["head_dim"] for key in ("attention", "key_value")
    )
    h, width, layers = (
        config["hidden_size"],
        config["intermediate_size"],
        config["num_hidden_layers"],
    )
    shapes = {"model.embed_tokens": (config["vocab_size"], h), "model.norm": (h,)}
    if not tied:
        shapes["lm_head"] = (config["vocab_size"], h)
    for i in range(layers):
        layer = {
            "input_layernorm": (h,), "post_attention_layernorm": (h,),
            "self_attn.q_proj": (heads, h), "self_attn.k_proj": (kv, h),
            "self_attn.v_proj": (kv, h), "self_attn.o_proj": (h, heads),
            "mlp.gate_proj": (width, h), "mlp.up_proj": (width, h), "mlp.down_proj": (h, width),
        }  # fmt: skip
        if config["model_type"] == "qwen3":
            layer |= {f"self_attn.{x}_norm": (config["head_dim"],) for x in "qk"}
        shapes |= {f"model.layers.{i}.{key}": shape for key, shape in layer.items()}
    tensors = {
        f"{key}.weight": (1 + 0.1 * rng.normal(size=shape)).astype(np.float32)
        for key, shape in shapes.items()
    }

    def kind_of(theirs: str, shape: tuple[int, ...]) -> str:
        return kinds[theirs.removesuffix(".weight").split(".")[-1]]

    blocks = {
        theirs: gguf_files.random_blocks(kind_of(theirs, array.shape), array.shape, rng)
        for theirs, array in gguf_files.renamed(config, tensors).items()
        if array.ndim > 1
    }
    gguf_files.write(FOLDER / f"{name}.gguf", config, tensors, kind_of, blocks=blocks)
    np.savez_compressed(FOLDER / f"{name}.npz", **run_model(name))


def run_model(name: str) -> dict[str, np.ndarray]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        FOLDER, gguf_file=f"{name}.gguf", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.tensor(IDS)
    with torch.no_grad():
        logits = model(ids).logits
        greedy, margins = ids[:, :6], []
        for _ in range(STEPS):
            last = model(greedy).logits[:, -1]
            best = last.topk(2).values
            margins.append((best[:, 0] - best[:, 1]).min().item())
            greedy = torch.cat([greedy, last.argmax(-1, keepdim=True)], 1)
    assert min(margins) > 1e-3, min(margins)
    return {
        "input_ids": IDS.astype(np.int32),
        "logits": logits.numpy(),
        "greedy": greedy[:, 6:].numpy().astype(np.int32),
    }


TEXTS = [
    "Hello world! The keys are rotated.",
    "  two spaces, a\ttab\n\nand lines",
    "I'm sure that they've 12345 and 3.14 of them, don't you?",
    "ÄÖÜ ß, 量子化 \U0001f600 e\u0301",
    "<|im_start|>user\nWhat is it?<|im_end|>\n<think>",
    "",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def corpus() -> list[str]:
    root = HERE.parent.parent
    return [(root / name).read_text("utf-8") for name in ("README.md", "docs/checkpoints.md")]


def make_bytes() -> None:
    """BPE over bytes that `tokenizers` trains on our pages, once for each rule that splits."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=384,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(corpus(), trainer)
    content = json.loads(made.to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    types = [gguf.TokenType.NORMAL] * len(tokens)
    tokens += [*SPECIAL, "<think>"]
    types += [gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.USER_DEFINED]
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["merges"]]
    for pre in ("qwen2", "llama-bpe"):
        writer = gguf.GGUFWriter(FOLDER / f"tokenizer_{pre}.gguf", pre.split("-")[0])
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
        writer.add_bos_token_id(tokens.index(SPECIAL[0]))
        writer.add_eos_token_id(tokens.index(SPECIAL[2]))
        writer.add_add_bos_token(pre == "llama-bpe")
        writer.add_chat_template("{{ messages }}")
        finish(writer)


def make_pieces() -> None:
    """BPE that `sentencepiece` trains, in the types and with the scores it gives."""
    with tempfile.TemporaryDirectory() as folder:
        text = pathlib.Path(folder) / "text"
        text.write_text("\n".join(corpus()), "utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=f"{folder}/m", vocab_size=512, model_type="bpe",
            byte_fallback=True, character_coverage=0.99, minloglevel=2,
            normalization_rule_name="identity", remove_extra_whitespaces=False,
            user_defined_symbols=["<think>"], control_symbols=["<|im_start|>", "<|im_end|>"],
        )  # fmt: skip
        pieces = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/m.model")
    writer = gguf.GGUFWriter(FOLDER / "tokenizer_llama.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    every = range(pieces.vocab_size())
    writer.add_token_list([pieces.id_to_piece(i) for i in every])
    writer.add_token_scores([pieces.get_score(i) for i in every])
    kinds = (
        (pieces.is_unknown, gguf.TokenType.UNKNOWN),
        (pieces.is_control, gguf.TokenType.CONTROL),
        (pieces.is_byte, gguf.TokenType.BYTE),
        (lambda i: pieces.id_to_piece(i) == "<think>", gguf.TokenType.USER_DEFINED),
    )
    writer.add_token_types(
        [next((k for test, k in kinds if test(i)), gguf.TokenType.NORMAL) for i in every]
    )
    writer.add_bos_token_id(pieces.bos_id())
    writer.add_eos_token_id(pieces.eos_id())
    writer.add_unk_token_id(pieces.unk_id())
    finish(writer)
    # sentencepiece has no control tokens in text.
    plain = [text for text in TEXTS if "<|" not in text]
    expected = {"texts": plain, "ids": [pieces.encode(text) for text in plain]}
    (FOLDER / "sentencepiece.json").write_text(json.dumps(expected))


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_tokenizers() -> dict:
    found = {}
    for path in sorted(FOLDER.glob("tokenizer_*.gguf")):
        made = transformers.AutoTokenizer.from_pretrained(FOLDER, gguf_file=path.name)
        ids = [made.encode(text, add_special_tokens=False) for text in TEXTS]
        back = [made.decode(one) for one in ids]
        found[path.stem] = {"texts": TEXTS, "ids": ids, "decoded": back}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    FOLDER.mkdir(exist_ok=True)
    if not check:
        make_bytes()
        make_pieces()
        (FOLDER / "tokenizers.json").write_text(json.dumps(run_tokenizers()))
    assert json.loads((FOLDER / "tokenizers.json").read_text()) == run_tokenizers()
    for name in MODELS:
        if not check:
            make_model(name)
        stored = np.load(FOLDER / f"{name}.npz")
        for key, value in run_model(name).items():
            np.testing.assert_allclose(stored[key], value, atol=1e-5)


if __name__ == "__main__":
    main()
