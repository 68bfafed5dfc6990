"""Text through `generate`: where it begins and ends, what is returned and what is streamed."""

import json
import shutil

import pytest

import fdq
import fdq_checkpoints
from fdq.decoding.tokenizer import Tokenizer
from tests.models import oracles

tokenizers = pytest.importorskip("tokenizers")

WORDS = ["<pad>", "<s>", "</s>", *(f"▁w{i}" for i in range(3, 112))]
PROMPT, TOKENS = "w5 w9", [1, 5, 9]
STEPS = 8


def write(folder, decoder, **files):
    """The oracle `llama` with a tokenizer of words, and files beside, each a dict."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(oracles.ORACLES / "llama" / name, folder)
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = decoder
    backend.add_special_tokens(WORDS[:3])
    backend.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    files["config"] = config | files.get("config", {})
    spelled = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    files["tokenizer_config"] = spelled | files.get("tokenizer_config", {})
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("words"), tokenizers.decoders.Metaspace())


@pytest.fixture(scope="module")
def model(folder):
    return fdq.load(folder)


@pytest.fixture(scope="module")
def generated(model):
    """What follows the prompt where nothing ends it."""
    return fdq.generate(model, [TOKENS], STEPS, stop_tokens=())[0]


@pytest.mark.parametrize(
    "decoder",
    [
        tokenizers.decoders.Metaspace(),
        tokenizers.decoders.Sequence(
            [
                tokenizers.decoders.Replace("▁", " "),
                tokenizers.decoders.Fuse(),
                tokenizers.decoders.Strip(" ", 1, 0),
            ]
        ),
        tokenizers.decoders.WordPiece("▁"),  # does not give the prompt back
    ],
)
def test_a_prompt_and_what_is_generated_are_the_decoding_of_both(
    model, generated, tmp_path, decoder
):
    tokenizer = Tokenizer.load(write(tmp_path, decoder))
    assert tokenizer.encode(PROMPT, bos=True) == TOKENS
    both = tokenizer.decode(TOKENS + generated)
    start = tokenizer.decode(TOKENS)
    pieces = []
    (text,) = fdq.generate(
        model,
        PROMPT,
        STEPS,
        stop_tokens=(),
        tokenizer=tokenizer,
        stream=lambda _, piece: pieces.append(piece),
        stream_steps=1,
    )
    assert "".join(pieces) == text
    assert start + text == both
    assert (PROMPT + text == both) == (start == PROMPT)
    assert len(pieces) > STEPS / 2


def test_a_chat_template_that_begins_with_bos_gets_one(model, generated):
    (text,) = fdq.generate(model, f"<s>{PROMPT}", STEPS, stop_tokens=())
    assert text == fdq.generate(model, PROMPT, STEPS, stop_tokens=())[0]
    assert len(text.split()) == len([token for token in generated if token > 2])


def test_text_and_tokens_end_at_the_stop_tokens_of_all_files(generated, tmp_path):
    first = generated[3]
    end = generated.index(first)
    never = [token for token in range(3, 112) if token not in generated][:2]
    write(
        tmp_path,
        tokenizers.decoders.Metaspace(),
        config={"eos_token_id": never[0]},
        generation_config={"eos_token_id": [2, first]},
        tokenizer_config={"eos_token": WORDS[never[1]]},
    )
    model = fdq.load(tmp_path)
    stops = {2, first, *never}
    assert set(model.config.eos_token_ids) == stops
    assert fdq.generate(model, [TOKENS], STEPS) == [generated[:end]]
    text = Tokenizer.load(tmp_path).decode(TOKENS + generated[:end])
    assert fdq.generate(model, PROMPT, STEPS) == [text.removeprefix(PROMPT)]
    # They are saved with the model, and read again where it is loaded.
    fdq.save(model, tmp_path / "saved")
    assert set(fdq.load(tmp_path / "saved").config.eos_token_ids) == stops
    # A tokenizer from elsewhere brings its own.
    tokenizer = Tokenizer.load(tmp_path)
    tokenizer.stop_token_ids = (generated[1],)
    text = tokenizer.decode(TOKENS + generated[:1])
    assert fdq.generate(model, PROMPT, STEPS, tokenizer=tokenizer) == [text.removeprefix(PROMPT)]


@pytest.mark.parametrize("name", ["config", "generation_config", "tokenizer_config"])
def test_every_file_alone_ends_a_text_of_tokens(tmp_path, name):
    said = {"eos_token": WORDS[7]} if name == "tokenizer_config" else {"eos_token_id": [7]}
    silent = {"config": {"eos_token_id": None}, "tokenizer_config": {"eos_token": None}}
    write(tmp_path, tokenizers.decoders.Metaspace(), **(silent | {name: said}))
    assert fdq.load(tmp_path).config.eos_token_ids == (7,)
    (tmp_path / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    tokens = () if name == "tokenizer_config" else (7,)  # which spells it for a tokenizer
    assert fdq.load(tmp_path).config.eos_token_ids == tokens


@pytest.mark.parametrize("name", ["generation_config", "tokenizer_config"])
def test_a_stop_token_of_another_kind_is_refused_when_a_model_is_loaded(tmp_path, name):
    said = {"eos_token": 7, "eos_token_id": "7"}
    write(tmp_path, tokenizers.decoders.Metaspace(), **{name: said})
    with pytest.raises(fdq_checkpoints.CheckpointError, match=rf"{name}\.json: eos_token"):
        fdq.load(tmp_path)
