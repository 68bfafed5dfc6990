"""Text to tokens and back, and text that arrives token by token."""

import json
import sys

import pytest

from fdq.analysis.shipped_model import shipped_model_path
from fdq.decoding.tokenizer import Tokenizer
from tests.byte_tokenizer import save_byte_tokenizer

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level BPE of bytes and a few merges, with tokens that begin and end a text."""
    path = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(path / "tokenizer.json", ["def main(argv):\n    return argv\n"] * 3, 300)
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


TEXTS = ["def main(argv):\n", "naïve Ω 漢字 🙂🙂 end", " leading space", "a"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_and_streams(folder, text):
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    for size in (1, 2, 5):
        stream = tokenizer.stream()
        pieces = [stream.feed(ids[i : i + size]) for i in range(0, len(ids), size)]
        assert "\ufffd" not in "".join(pieces)  # characters appear when they are whole
        assert "".join([*pieces, stream.finish()]) == text


def test_stream_gives_up_an_incomplete_character_at_the_end_only(folder):
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode("ok 🙂")[:-1]
    stream = tokenizer.stream()
    assert "".join(stream.feed([i]) for i in ids) == "ok "
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_special_tokens_come_from_the_files_beside(folder):
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    assert (tokenizer.bos_token_id, tokenizer.stop_token_ids) == (0, (1,))
    assert tokenizer.encode("a", bos=True)[0] == 0
    assert tokenizer.encode("a", bos=False)[0] != 0
    assert tokenizer.decode([0, *tokenizer.encode("a"), 1]) == "a"


def test_a_text_is_neither_cut_nor_filled_up(folder, tmp_path):
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(max_length=3)
    backend.enable_padding(length=64, pad_id=0)
    backend.save(str(tmp_path / "tokenizer.json"))
    for text in ("a", TEXTS[1]):
        assert Tokenizer.load(tmp_path).encode(text) == Tokenizer.load(folder).encode(text)


def test_the_shipped_model_begins_a_text_with_its_bos():
    tokenizer = Tokenizer.load(shipped_model_path())
    assert (tokenizer.first_token_ids, tokenizer.stop_token_ids) == ((1,), (2,))


def test_what_cannot_be_read_is_named(folder, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a directory"):
        Tokenizer.load(tmp_path / "absent")
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="SentencePiece"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot read"):
        Tokenizer.load(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match="pip install tokenizers"):
        Tokenizer.load(folder)


def test_what_is_no_text_and_no_token_is_refused(folder):
    tokenizer = Tokenizer.load(folder)
    for wrong in (5, b"abc", ["a"], "\ud800"):
        with pytest.raises(TypeError, match="expected text, found"):
            tokenizer.encode(wrong)
    for wrong in ([1.5], "ab", [[1]], [True]):
        with pytest.raises(TypeError, match="token: expected an integer, found"):
            tokenizer.decode(wrong)
    for wrong in (-1, 2**40):
        with pytest.raises(ValueError, match=f"token: expected 0 to 2147483647, found {wrong}"):
            tokenizer.stream().feed([wrong])
