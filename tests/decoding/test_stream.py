"""Text that arrives in pieces is the text, for every decoder that `tokenizers` has.

The oracle is the library itself, which decodes all tokens at once.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdq.decoding import detokenizer
from fdq.decoding.continuation import Continuation
from fdq.decoding.text_stages import Unknown
from fdq.decoding.tokenizer import Tokenizer

tokenizers = pytest.importorskip("tokenizers")
decoders = tokenizers.decoders

# What any of the decoders does something with, among it halves of characters and of patterns.
STRINGS = [
    "", "the", "a", "aa", "x", "▁", "▁the", "▁cat", " ", "  ", "\n", "##", "##me", "</w>", "o</w>",
    "n</w>t", "<pad>", "|", ".", " .", " ?", " ! ", "'", " '", " ' ", "n't", "'s", "'t", " do",
    " not", " n", "Ġ", "Ġhi", "ĊĠ", "ðŁ", "ĺ", "Ģ", "Ã", "©", "界", "é", "\ufffd", "<0x", "<0x41>",
    "<0xe7>", "<0x95>", "<0x8C>", "<0xFF>", "<0x+f>", "<0xF0>", "41>",
]  # fmt: skip
BOS, EOS, ADDED, UNKNOWN = (len(STRINGS) + i for i in range(4))


def tokenizer(decoder):
    """(ours, the library's) with the tokens above, two special ones and one that was added."""
    vocabulary = {string: index for index, string in enumerate(STRINGS)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens(["<added token>"])
    if decoder is not None:
        backend.decoder = decoder
    return Tokenizer(backend), backend


def decoded(backend, tokens):
    return backend.decode(tokens, skip_special_tokens=True)


def ids(*strings):
    special = {"<s>": BOS, "</s>": EOS, "<added token>": ADDED}
    return [special[s] if s in special else STRINGS.index(s) for s in strings]


def pieces(stream, tokens, sizes):
    """What a stream returns when it is fed so many tokens at a time, around and around."""
    made, rest = [], list(tokens)
    while rest:
        for size in sizes:
            made.append(stream.feed(rest[:size]))
            rest = rest[size:]
    return [*made, stream.finish()]


SCHEMES = st.sampled_from(["always", "never", "first"])
REGEXES = st.sampled_from([r"\s+", "^.", "x*", r"(?<=a)b|h", r"\w$"])
KINDS = {
    "none": st.none(),
    "byte_level": st.builds(decoders.ByteLevel),
    "metaspace": st.builds(decoders.Metaspace, st.just("▁"), SCHEMES),
    # The library cannot strip the right end of a token that is shorter than what is stripped.
    "strip": st.builds(decoders.Strip, st.sampled_from(" ▁a"), st.integers(0, 3), st.just(0)),
    "word_piece": st.builds(decoders.WordPiece, st.sampled_from(["##", "", "a"]), st.booleans()),
    "bpe": st.builds(decoders.BPEDecoder, st.sampled_from(["</w>", "n", "the", ""])),
    "ctc": st.builds(
        decoders.CTC, st.sampled_from(["<pad>", "▁", "a"]), st.sampled_from("| x"), st.booleans()
    ),
    "byte_fallback": st.builds(decoders.ByteFallback),
    "replace": st.builds(
        decoders.Replace,
        st.sampled_from(["▁", "the the", "aa", ".", ""]) | REGEXES.map(tokenizers.Regex),
        st.sampled_from(["", " ", "aa", "#"]),
    ),
    "fuse": st.builds(decoders.Fuse),
}
ONE = st.one_of(*(kind for name, kind in KINDS.items() if name != "none"))
KINDS["sequence"] = st.lists(ONE, min_size=2, max_size=4).map(decoders.Sequence)
KINDS["sequence_of_one_string"] = st.lists(ONE, min_size=1, max_size=3).map(
    lambda parts: decoders.Sequence([decoders.Fuse(), *parts])
)
KINDS["sequence_of_sequences"] = st.builds(
    lambda *parts: decoders.Sequence(list(parts)), KINDS["sequence"], ONE
)
# Few different tokens, so that they meet: runs are what CTC is about, neighbours what Replace is.
TOKENS = st.lists(st.integers(0, UNKNOWN), min_size=1, max_size=4).flatmap(
    lambda pool: st.lists(st.sampled_from(pool), max_size=20)
)
SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_the_decoding_of_all(kind):
    @settings(deadline=None, max_examples=60, derandomize=True)
    @given(KINDS[kind], TOKENS, SIZES)
    def check(decoder, tokens, sizes):
        ours, backend = tokenizer(decoder)
        text = decoded(backend, tokens)
        assert "".join(pieces(ours.stream(), tokens, sizes)) == text
        assert ours.decode(tokens) == text

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_continuation_are_the_decoding_of_both(kind):
    @settings(deadline=None, max_examples=40, derandomize=True)
    @given(KINDS[kind], TOKENS, TOKENS, SIZES)
    def check(decoder, before, after, sizes):
        ours, backend = tokenizer(decoder)
        prompt, both = decoded(backend, before), decoded(backend, before + after)
        text = "".join(pieces(Continuation(ours, prompt, before), after, sizes))
        kept = both[: len(both) - len(text)]
        assert kept + text == both
        assert prompt.startswith(kept)
        # Less than the prompt is kept only where the tokens after it change how it reads.
        assert kept == prompt or not both.startswith(prompt)
        assert kept == prompt or both[len(kept) :][:1] != prompt[len(kept)]

    check()


LLAMA = [
    decoders.Replace("▁", " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
    decoders.Strip(" ", 1, 0),
]
SENTENCE_PIECE = {
    "metaspace": decoders.Metaspace(),
    "strip": decoders.Sequence(LLAMA),
    "strip_before": decoders.Sequence([decoders.Strip("▁", 1, 0), decoders.Metaspace()]),
}


@pytest.mark.parametrize("kind", SENTENCE_PIECE)
def test_a_special_token_in_the_middle_leaves_the_space_after_it(kind):
    ours, backend = tokenizer(SENTENCE_PIECE[kind])
    tokens = ids("<s>", "▁the", "▁cat", "</s>", "▁the", "</s>", "<s>", "▁cat")
    want = decoded(backend, tokens)
    assert "".join(pieces(ours.stream(), tokens, [1])) == want
    if kind != "strip_before":
        assert want == "the cat the cat"


@pytest.mark.parametrize("kind", ["metaspace", "strip"])
def test_the_space_before_a_continuation_is_there(kind):
    ours, _ = tokenizer(SENTENCE_PIECE[kind])
    continuation = Continuation(ours, "the", ids("<s>", "▁the"))
    assert pieces(continuation, ids("▁the", "▁cat"), [1]) == [" the", " cat", ""]


@pytest.mark.parametrize(
    ("decoder", "strings", "text"),
    [
        (decoders.ByteFallback(), ["<0xe7>", "<0x95>", "the"], "��the"),
        # A byte too many spoils what was a character.
        (decoders.ByteFallback(), ["<0xe7>", "<0x95>", "<0x8C>", "<0xFF>"], "����"),
        (decoders.ByteFallback(), ["<0xe7>", "<0x95>", "<0x8C>", "the", "<0xFF>"], "界the�"),
        (decoders.ByteFallback(), ["<0xe7>", "<s>", "<0x95>", "<0x8C>"], "界"),
        (decoders.ByteLevel(), ["ðŁ", "ĺ", "Ģ"], "😀"),
        (decoders.ByteLevel(), ["ðŁ", "ĺ", "the", "Ģ", "Ã"], "�the��"),
        (decoders.ByteLevel(), ["\ufffd", "the"], "�the"),
    ],
)
def test_bytes_that_are_no_text_are_the_same_in_stream_and_result(decoder, strings, text):
    ours, backend = tokenizer(decoder)
    tokens = ids(*strings)
    assert decoded(backend, tokens) == text
    for size in (1, 2, 3):
        assert "".join(pieces(ours.stream(), tokens, [size])) == text


FUSED = [
    (decoders.Replace("the the", "X"), ["the", " ", "the", " ", "the", "x"], "X thex"),
    (decoders.Replace("aa", "a"), ["a", "a", "aa", "a", "x", "a"], "aaaxa"),
    (decoders.Replace(tokenizers.Regex(r"a+x"), "#"), ["x", "a", "aa", "x", "a"], "x#a"),
    (decoders.WordPiece(), ["a", " do", " not", " ", ".", " ", "'", " ", "x"], "a don't.'x"),
    (decoders.CTC("<pad>", "|"), ["a", "a", "|", "<pad>", " ", "."], "aa ."),
    (decoders.BPEDecoder("the"), ["x", "the", "a", "the"], "xa"),
    (decoders.Metaspace(), ["▁", "▁the", "▁cat"], "thecat"),
    (decoders.Strip(" ", 3, 2), ["  ", " ", " ", "a", " ", "x", "  ", " "], " a x "),
    (decoders.ByteLevel(), ["Ġhi", "ðŁ", "ĺ", "Ģ", "Ã"], " hi😀\ufffd"),
    (decoders.ByteLevel(), ["Ġhi", "ðŁ", " ", "ĺ"], "ĠhiðŁ ĺ"),
    (decoders.ByteFallback(), ["<0x", "41>"], "A"),
    (decoders.ByteFallback(), ["<0x", "41>", "a"], "<0x41>a"),
]


@pytest.mark.parametrize(("decoder", "strings", "text"), FUSED)
def test_a_decoder_behind_fuse_sees_one_string(decoder, strings, text):
    ours, backend = tokenizer(decoders.Sequence([decoders.Fuse(), decoder]))
    tokens = ids(*strings)
    assert decoded(backend, tokens) == text
    for size in (1, 2, 3):
        assert "".join(pieces(ours.stream(), tokens, [size])) == text


@pytest.mark.parametrize(
    ("decoder", "prompt", "before", "after", "text"),
    [
        # A prompt that decoding gives back but for a space that the next word brings along.
        (decoders.BPEDecoder(), "o ", ["o</w>"], ["the"], "the"),
        (decoders.WordPiece(), "the ", ["the"], ["a"], "a"),
        # One that it does not give back at all: what follows the decoding of its tokens.
        (decoders.Metaspace(), "THE", ["▁the"], ["▁cat"], " cat"),
        (decoders.Metaspace(), "<s> the", ["<s>", "▁the"], ["▁cat"], " cat"),
        (decoders.WordPiece(), "the ", ["the"], ["##me"], "me"),
        # One that is changed by what follows: after the part that stays as it is.
        (
            decoders.ByteFallback(),
            "a界",
            ["a", "<0xe7>", "<0x95>", "<0x8C>"],
            ["<0xFF>"],
            "����",
        ),
        (decoders.CTC(), "a", ["a"], ["a", "x"], "x"),
        # Nothing was generated.
        (decoders.BPEDecoder(), "o ", ["o</w>"], [], ""),
        (decoders.Metaspace(), "THE cat", ["▁the"], [], ""),
    ],
)
def test_a_prompt_that_is_not_given_back_is_continued_where_its_decoding_ends(
    decoder, prompt, before, after, text
):
    ours, _ = tokenizer(decoder)
    for size in (1, 2):
        continuation = Continuation(ours, prompt, ids(*before))
        assert "".join(pieces(continuation, ids(*after), [size])) == text


def test_the_right_end_is_stripped_also_of_tokens_that_are_too_short_for_the_library():
    for decoder, text in [
        (decoders.Strip(" ", 0, 2), "thea"),
        (decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 2, 2)]), "the a"),
    ]:
        ours, _ = tokenizer(decoder)
        tokens = ids("", "the", " ", "a", " ", " ")
        assert "".join(pieces(ours.stream(), tokens, [1])) == ours.decode(tokens) == text
    ours, _ = tokenizer(decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 2, 2)]))
    assert ours.decode(ids(" ", "  ")) == ""


def test_a_decoder_that_is_unknown_is_asked_once_for_all():
    class Upper:
        def decode_chain(self, tokens):
            return [token.upper() for token in reversed(tokens)]

    ours, _ = tokenizer(decoders.Decoder.custom(Upper()))
    assert pieces(ours.stream(), ids("the", "<s>", "a"), [1]) == ["", "", "", "ATHE"]


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.ByteLevel(),
        decoders.Sequence(LLAMA),
        decoders.Metaspace(),
        decoders.WordPiece(),
        decoders.BPEDecoder(),
        decoders.CTC(),
        decoders.Sequence([decoders.Fuse(), decoders.CTC(), decoders.Strip(" ", 1, 1)]),
        decoders.Sequence([decoders.Fuse(), decoders.ByteLevel(), decoders.ByteFallback()]),
        None,
    ],
)
def test_text_appears_soon_and_is_not_kept(decoder):
    """Else the time for a text would be quadratic in its length, or its end seen only late."""
    ours, _ = tokenizer(decoder)
    stream = ours.stream()
    cycle = ids("▁the", "界", "</w>", "<0xe7>", "<0x95>", "<0x8C>", "x", " do", " not", "\n", " n")
    length, kept = 0, []
    for count in range(1, 21):
        length += len(stream.feed(cycle))
        assert len(ours.decode(cycle * count)) - length <= 10
        values = [value for stage in stream._stages for value in vars(stage).values()]
        kept.append(sum(len(v) for v in values if isinstance(v, str | list | bytearray)))
    assert kept[1:] == [kept[1]] * 19
    assert length + len(stream.finish()) == len(ours.decode(cycle * 20))


def test_decoding_a_long_text_looks_every_token_up_once():
    ours, _ = tokenizer(decoders.Sequence(LLAMA))
    seen = []
    strings = ours._strings
    stream = ours.stream()
    stream._strings = lambda tokens: seen.extend(tokens) or strings(tokens)
    tokens = ids("▁the", "▁cat", "<s>") * 100
    assert "".join(pieces(stream, tokens, [7])) == ours.decode(tokens)
    assert seen == tokens


def test_a_finished_stream_takes_no_more():
    stream = tokenizer(None)[0].stream()
    stream.finish()
    with pytest.raises(ValueError, match=r"finished; Tokenizer\.stream\(\) makes another"):
        stream.feed([0])


def test_a_token_that_is_no_integer_is_refused():
    with pytest.raises(TypeError, match="integer"):
        tokenizer(None)[0].decode([1.5])


ARGUMENTS = {"Replace": ("a", "b"), "Sequence": ([],)}


@pytest.mark.parametrize("name", [n for n in dir(decoders) if n[0].isupper()])
def test_every_decoder_of_the_library_has_stages(name):
    """One that the library gets, or a new setting of one, is to be written as stages too."""
    if name not in ("Decoder", "DecodeStream"):
        stages = detokenizer.stages(getattr(decoders, name)(*ARGUMENTS.get(name, ())))
        assert not any(isinstance(stage, Unknown) for stage in stages)
