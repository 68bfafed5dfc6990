"""A chat: its cache between turns, its stop tokens, and what ends an answer."""

import pathlib

import jax
import pytest
from flax import nnx

import fdq
from fdq.decoding import conversation, loop
from fdq.decoding.chat_template import ChatTemplate, TemplateError
from fdq.decoding.conversation import Conversation
from fdq.decoding.tokenizer import Tokenizer
from fdq.models import CONFIGS, Decoder
from tests.covering import slow

ORACLES = pathlib.Path(__file__).parent.parent / "oracles" / "chat"


@pytest.fixture(scope="module")
def model():
    config = CONFIGS["ernie-4.5-0.3b"].replace(
        vocab_size=264, hidden_size=64, intermediate_size=64, num_layers=1, num_heads=2,
        num_kv_heads=1, head_dim=32, dtype="float32", eos_token_ids=(), max_position=512,
    )  # fmt: skip
    return Decoder(config, rngs=nnx.Rngs(params=3))


@pytest.fixture
def fed(monkeypatch):
    """How many tokens each prefill was handed."""
    counts, original = [], conversation.prefill

    def counted(model, tokens, *args, **kwargs):
        counts.append(len(tokens[0]))
        return original(model, tokens, *args, **kwargs)

    monkeypatch.setattr(conversation, "prefill", counted)
    return counts


def chat(model, style="chatml", **options):
    """Greedy, in a style of those made by transformers."""
    folder = ORACLES / style
    options = {"max_length": 384, "cache": "C16", "enable_thinking": False} | options
    return Conversation(
        model, tokenizer=Tokenizer.load(folder), template=ChatTemplate.load(folder), **options
    )


def check(model, talk, answer, count):
    """Compares the last answer with that to the whole conversation, read anew."""
    tokens = talk._known[: answer.kept + answer.read]
    text = talk._template.render(talk.messages[:-1], **talk._variables)
    decode = talk._tokenizer.decode
    # The model's own tokens may be others than the tokenizer makes of its text.
    assert decode(tokens) == decode(talk._tokenizer.encode(text))
    alone = fdq.generate(
        model, [tokens], count, stop_tokens=talk.stop_tokens, cache="C16", max_length=384
    )[0]
    assert answer.tokens == alone


def test_the_second_turn_reads_only_what_is_new(model, fed):
    talk = chat(model)
    first = talk.ask("Hello", 12)
    assert (first.kept, first.read, fed) == (0, fed[0], [first.read])
    before = talk.length
    assert before == first.read + len(first.tokens) + (first.ended == "stop token")
    pieces = []
    second = talk.ask("And now?", 12, stream=pieces.append)
    # Up to the empty thoughts, which the template leaves out of earlier turns.
    prompt = talk._template.render(talk.messages[:1], **talk._variables)
    assert second.kept == len(
        talk._tokenizer.encode(prompt.removesuffix("<think>\n\n</think>\n\n"))
    )
    assert fed[1] == second.read
    assert "".join(pieces) == second.text == talk.messages[-1]["content"]
    third = talk.ask("More", 4)
    assert third.kept > second.kept
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 3


def test_nothing_but_the_turn_is_read_where_the_template_repeats_what_was_said(model, fed):
    talk = chat(model, "ernie")
    first = talk.ask("Hello", 12)
    known = talk.length
    second = talk.ask("And now?", 12)
    turn = talk._tokenizer.encode("</s>User: And now?\nAssistant: ")
    assert second.kept == known
    assert second.read == fed[1] == len(turn) - (first.ended == "stop token")


@pytest.mark.parametrize("style", [slow("chatml"), "ernie", slow("deepseek")])
def test_an_answer_is_that_to_the_whole_conversation(model, style):
    talk = chat(model, style)
    for turn in ("Hello", "What is 6 * 7?", "Why?"):
        check(model, talk, talk.ask(turn, 9), 9)


def test_it_stops_at_every_stop_token(model):
    free = chat(model, "ernie", stop_tokens=()).ask("Hello", 12)
    assert free.ended == "max_new_tokens"
    assert len(free.tokens) == 12
    distinct = list(dict.fromkeys(free.tokens))
    for stop in distinct[:3]:
        ended = chat(model, "ernie", stop_tokens=(260, stop)).ask("Hello", 12)
        assert ended.ended == "stop token"
        assert ended.tokens == free.tokens[: free.tokens.index(stop)]


def test_stop_tokens_are_those_of_all_files_and_the_template_s_own(model, tmp_path):
    talk = chat(model, "gemma")
    tokenizer = talk._tokenizer
    numbers = tokenizer.vocabulary()
    # The file names <eos> alone, and the template ends a turn with another token.
    assert talk.stop_tokens == (numbers["<eos>"], numbers["<end_of_turn>"])
    named = {"eos_token_ids": (7, 9)}
    other = nnx.clone(model)
    other.config = model.config.replace(**named)
    assert chat(other, "gemma").stop_tokens[:2] == (7, 9)


def test_an_interrupt_ends_the_answer_and_not_the_conversation(model, fed):
    talk = chat(model, "ernie", stop_tokens=())
    seen = []
    whole = chat(model, "ernie", stop_tokens=()).ask("Hello", 24)
    cut = talk.ask("Hello", 24, stream=seen.append, interrupted=lambda: len(seen) >= 1)
    assert cut.ended == "interrupted"
    assert 0 < len(cut.tokens) < 24
    assert cut.tokens == whole.tokens[: len(cut.tokens)]
    after = talk.ask("And?", 4)
    assert after.kept > cut.read
    assert talk.messages[1]["content"] == cut.text


def test_whatever_raises_leaves_the_conversation_as_it_was(model, fed, monkeypatch):
    talk = chat(model)
    talk.ask("Hello", 4)
    before, original = list(talk.messages), loop.run

    def broken(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation, "run", broken)
    with pytest.raises(KeyboardInterrupt):
        talk.ask("And?", 4)
    monkeypatch.setattr(conversation, "run", original)
    assert talk.messages == before
    again = talk.ask("And?", 4)  # the cache is lost, and made again
    assert again.kept == 0
    check(model, talk, again, 4)


@pytest.mark.slow
def test_a_full_cache_is_said_before_anything_runs(model):
    talk = chat(model, max_length=96)
    first = talk.ask("a" * 8)
    assert first.ended in ("context", "stop token")
    before = list(talk.messages)
    with pytest.raises(ValueError, match=r"the conversation has \d+ tokens and its cache 96 slots"):
        talk.ask("b" * 90)
    assert talk.messages == before
    talk.reset("Be brief.")
    assert talk.messages == [{"role": "system", "content": "Be brief."}]
    assert talk.length == 0


def test_what_a_template_refuses_is_no_turn(model):
    talk = chat(model, "gemma", system="Be brief.")
    with pytest.raises(TemplateError, match="System role not supported"):
        talk.ask("Hello")
    assert len(talk.messages) == 1


@pytest.mark.slow
def test_draws_depend_on_the_key(model):
    def said(seed):
        sampling = fdq.Sampling(temperature=1.0)
        return chat(model, sampling=sampling, key=jax.random.key(seed)).ask("Hello", 8).tokens

    assert said(0) == said(0) != said(1)


def test_a_model_without_text_says_what_is_missing(model):
    with pytest.raises(ValueError, match="a model without a tokenizer"):
        Conversation(model)
