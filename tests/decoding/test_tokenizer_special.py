"""Which tokens begin and end a text: what all files of a checkpoint say, once."""

import json

import pytest

from fdq.decoding import special_tokens
from fdq.decoding.tokenizer import Tokenizer

tokenizers = pytest.importorskip("tokenizers")
processors = tokenizers.processors

WORDS = {"<s>": 0, "</s>": 1, "<|end|>": 2, "<|user|>": 3, "<sop>": 4, "a": 5, "b": 6, "<unk>": 7}
PLAIN = [5, 6]  # "a b"


def template(single):
    return processors.TemplateProcessing(
        single=single, special_tokens=[(w, i) for w, i in WORDS.items() if w in single.split()]
    )


@pytest.fixture
def load(tmp_path):
    """Writes the files of a checkpoint, each a dict, and loads its tokenizer."""

    def write(post_processor=None, **files):
        model = tokenizers.models.WordLevel(WORDS, unk_token="<unk>")
        backend = tokenizers.Tokenizer(model)
        backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        backend.add_special_tokens([word for word in WORDS if word.startswith("<")])
        if post_processor is not None:
            backend.post_processor = post_processor
        backend.save(str(tmp_path / "tokenizer.json"))
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return Tokenizer.load(tmp_path)

    return write


BYTE_LEVEL = processors.ByteLevel()
LLAMA = {"bos_token": {"content": "<s>"}, "tokenizer_class": "LlamaTokenizerFast"}


@pytest.mark.parametrize(
    ("post_processor", "config", "first"),
    [
        # Nobody speaks of a BOS but config.json, which only numbers it.
        (None, {"bos_token": None, "add_bos_token": False}, []),
        (None, {"bos_token": None}, []),
        (None, {"add_bos_token": False}, []),
        (None, {}, []),
        # `add_bos_token` decides, whatever the post-processor does, and once.
        (None, {"bos_token": "<s>", "add_bos_token": True}, [0]),
        (None, {"bos_token": "<s>", "add_bos_token": False}, []),
        (template("<s> $A"), {"bos_token": "<s>", "add_bos_token": True}, [0]),
        (template("<s> $A </s>"), {"bos_token": "<s>", "add_bos_token": False}, []),
        (template("<s> $A"), {"bos_token": None, "add_bos_token": False}, []),
        (BYTE_LEVEL, {"bos_token": "<s>", "add_bos_token": True}, [0]),
        (None, {"add_bos_token": True}, [0]),  # the number in config.json is all there is
        # Where it is not there, the post-processor does.
        (template("<s> $A"), {"bos_token": "<s>"}, [0]),
        (template("<s> $A </s>"), {"bos_token": "<s>", "add_bos_token": None}, [0]),
        (template("<s> $A"), {}, [0]),
        (template("<sop> <s> $A"), {"bos_token": "<s>"}, [4, 0]),
        (template("$A"), LLAMA, []),
        (template("$A </s>"), {"bos_token": "<s>"}, []),
        (processors.Sequence([BYTE_LEVEL, template("<s> $A")]), {"bos_token": "<s>"}, [0]),
        (processors.BertProcessing(("</s>", 1), ("<sop>", 4)), {"bos_token": "<s>"}, [4]),
        (processors.RobertaProcessing(("</s>", 1), ("<s>", 0)), {"bos_token": "<s>"}, [0]),
        (BYTE_LEVEL, {"bos_token": "<|user|>", "tokenizer_class": "GPT2Tokenizer"}, []),
        # Where there is none either, it depends on the class.
        (None, LLAMA, [0]),
        (None, {"bos_token": "<s>"}, [0]),
        (None, {"bos_token": "<|user|>", "tokenizer_class": "GPT2Tokenizer"}, []),
        (None, {"bos_token": "<s>", "tokenizer_class": "PreTrainedTokenizerFast"}, []),
    ],
)
def test_a_text_begins_with_what_the_tokenizer_says(load, post_processor, config, first):
    numbered = {"bos_token_id": 0, "eos_token_id": 1}
    tokenizer = load(post_processor, tokenizer_config=config, config=numbered)
    assert tokenizer.encode("a b", bos=True) == first + PLAIN
    assert tokenizer.encode("a b") == PLAIN
    assert tokenizer.encode("", bos=True) == first
    assert tokenizer.bos_token_id == (first[0] if first else None)


@pytest.mark.parametrize("post_processor", [None, template("<s> $A"), template("<sop> <s> $A")])
def test_a_text_that_begins_with_bos_gets_no_second_one(load, post_processor):
    config = {"bos_token": "<s>", "add_bos_token": True}
    tokenizer = load(post_processor, tokenizer_config=config)
    assert tokenizer.encode("<s> a b", bos=True) == [0, *PLAIN]
    assert tokenizer.encode(" <s> <|user|> a b", bos=True) == [0, 3, *PLAIN]
    assert tokenizer.encode("<|user|> <s> a b", bos=True)[-4:] == [3, 0, *PLAIN]
    assert len(tokenizer.encode("<|user|> <s> a b", bos=True)) > 4


def test_the_older_map_of_special_tokens_is_read_where_the_config_says_nothing(load):
    spelled = {"bos_token": {"content": "<s>"}, "eos_token": "<|end|>"}
    tokenizer = load(special_tokens_map=spelled)
    assert (tokenizer.first_token_ids, tokenizer.stop_token_ids) == ((0,), (2,))
    tokenizer = load(tokenizer_config={"bos_token": None, "eos_token": "</s>"})
    assert (tokenizer.first_token_ids, tokenizer.stop_token_ids) == ((), (1,))


FILES = {
    "config": {"eos_token_id": 1},
    "generation_config": {"eos_token_id": [1, 3]},
    "tokenizer_config": {"eos_token": "<|end|>"},
}


def test_a_text_ends_at_the_stop_tokens_of_all_files(load, tmp_path):
    assert load(**FILES).stop_token_ids == (1, 3, 2)
    assert special_tokens.stop_token_ids(tmp_path) == (1, 3, 2)  # without the package


@pytest.mark.parametrize(
    ("change", "stops"),
    [
        ({"config": {"eos_token_id": None}}, (1, 3, 2)),
        ({"config": {"eos_token_id": [6, 5]}}, (6, 5, 1, 3, 2)),
        ({"generation_config": {}}, (1, 2)),
        ({"generation_config": {"eos_token_id": -1}}, (1, 2)),
        ({"tokenizer_config": {}}, (1, 3)),
        ({"tokenizer_config": {"eos_token": {"content": "</s>"}}}, (1, 3)),
        ({"tokenizer_config": {"eos_token": "<unheard of>"}}, (1, 3)),
        ({"tokenizer_config": {"eos_token": "b"}}, (1, 3, 6)),
    ],
)
def test_stop_tokens_are_a_union(load, tmp_path, change, stops):
    assert load(**{**FILES, **change}).stop_token_ids == stops
    assert special_tokens.stop_token_ids(tmp_path) == stops


def test_stop_tokens_are_found_without_a_tokenizer_json(tmp_path):
    assert special_tokens.stop_token_ids(tmp_path) == ()
    added = {"9": {"content": "</s>", "special": True}}
    config = {"eos_token": "</s>", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert special_tokens.stop_token_ids(tmp_path) == (9,)
    pieces = [["<unk>", 0.0], ["</s>", 0.0]]
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": pieces}}))
    assert special_tokens.stop_token_ids(tmp_path) == (1,)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config", {"eos_token_id": "2"}, r"config\.json: eos_token_id: .*list of them, found '2'"),
        ("generation_config", {"eos_token_id": [[2]]}, "eos_token_id: expected a token number"),
        ("generation_config", {"eos_token_id": 2.0}, "found 2.0"),
        ("generation_config", {"eos_token_id": True}, "found True"),
        ("generation_config", {"eos_token_id": [2**40]}, "found .1099511627776"),
        ("generation_config", [], "expected a JSON object, got list"),
        ("tokenizer_config", {"eos_token": 2}, "eos_token: expected a string or an object"),
        ("tokenizer_config", {"eos_token": {"content": ["a"]}}, "expected a string or an object"),
        ("tokenizer_config", {"add_bos_token": "false"}, "expected true or false, found 'false'"),
        ("tokenizer_config", {"add_bos_token": True}, "add_bos_token is true, but the tokenizer"),
        (
            "tokenizer_config",
            {"add_bos_token": True, "bos_token": "<bos>"},
            "no bos_token '<bos>' and config.json no bos_token_id",
        ),
    ],
)
def test_special_tokens_of_another_kind_are_refused(load, name, content, message):
    with pytest.raises(ValueError, match=message):
        load(**{name: content})
