"""Merging by score: SentencePiece itself, and vocabularies made for the purpose."""

import io
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from isobit.errors import ModelRefused, UsageError
from isobit.text import spm
from isobit.text import tokenizer as tokenizer_module
from isobit.text.tokenizer import StreamDecoder, Tokenizer
from isobit.text.vocabulary import BYTE_OF_TEXT, CONTROL, NORMAL, UNUSED, USER_DEFINED

FUZZ = settings(deadline=None)
LETTERS = st.sampled_from(list("abcde  \n\té工😀▁x"))


@pytest.fixture(scope="module")
def theirs():
    """A model that SentencePiece trains here: 420 pieces, bytes, a dummy prefix."""
    rng = random.Random(3)
    words = ["".join(rng.choices("abcdeé", k=rng.randint(1, 7))) for _ in range(80)]
    lines = ["  ".join(rng.choices(words, k=6)) + " a  b" for _ in range(400)]
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=file,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())


@pytest.fixture(scope="module")
def ours(theirs):
    ids = range(theirs.get_piece_size())
    kinds = [
        6 if theirs.is_byte(i) else 3 if theirs.is_control(i) else 2 if theirs.is_unknown(i) else 1
        for i in ids
    ]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [theirs.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [theirs.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": theirs.bos_id(),
    }
    return Tokenizer.from_metadata(metadata, "trained.gguf")


@settings(deadline=None, max_examples=500)
@given(text=st.text(LETTERS, max_size=60))
def test_ids_and_texts_are_those_of_sentencepiece(ours, theirs, text):
    ids = ours.encode(text, special=False, bos=False)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == text.replace("▁", " ") == theirs.decode(ids)


def test_most_pieces_are_reached(ours):
    """Else the test above would compare little."""
    rng = random.Random(5)
    text = " ".join("".join(rng.choices("abcdeé", k=rng.randint(1, 9))) for _ in range(5000))
    assert len(set(ours.encode(text, special=False))) > 100


SPACED = ("▁", "a", "b", "c", "ab", "bc", "abc", "▁a", "▁ab", "aa", "aaaa")


def small(
    texts: dict[str, float] | None = None,
    types: dict[str, int] | None = None,
    **keys: object,
) -> Tokenizer:
    """Bytes, BOS, then ``texts`` with their scores; ``types`` of those that are not normal."""
    scores = {text: float(-i) for i, text in enumerate(SPACED)} if texts is None else texts
    types = types or {}
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*BYTE_OF_TEXT, "<s>", *scores],
        "tokenizer.ggml.scores": [0.0] * 257 + list(scores.values()),
        "tokenizer.ggml.token_type": [6] * 256 + [3] + [types.get(t, NORMAL) for t in scores],
        "tokenizer.ggml.bos_token_id": 256,
    }
    return Tokenizer.from_metadata(metadata | keys, "small.gguf")


def texts_of(tokenizer: Tokenizer, text: str, *, special: bool = False) -> list[str]:
    ids = tokenizer.encode(text, special=special, bos=False)
    return [tokenizer.vocabulary.tokens[i] for i in ids]


def test_the_best_score_joins_first_and_the_leftmost_of_equals():
    base = {"▁": -9, "a": -9, "b": -9, "c": -9}
    assert texts_of(small({**base, "ab": -1, "bc": -2}), "abc") == ["▁", "ab", "c"]
    assert texts_of(small({**base, "ab": -2, "bc": -1}), "abc") == ["▁", "a", "bc"]
    assert texts_of(small({**base, "ab": -1, "bc": -1}), "abc") == ["▁", "ab", "c"]
    assert texts_of(small({**base, "aa": -1}), "aaaaa") == ["▁", "aa", "aa", "a"]
    assert texts_of(small({**base, "aa": -1, "aaaa": -2}), "aaaaa") == ["▁", "aaaa", "a"]


def test_a_piece_is_made_of_what_is_no_token_itself():
    """``b`` alone is no token, and is bytes where it stays alone."""
    tokenizer = small({"▁": -9, "a": -9, "ab": -1})
    assert texts_of(tokenizer, "abb") == ["▁", "ab", "<0x62>"]
    assert tokenizer.decode(tokenizer.encode("abb", special=False, bos=False)) == "abb"


def test_the_space_before_a_text():
    plain = small()
    assert texts_of(plain, "a") == ["▁a"]
    assert texts_of(plain, "") == []
    assert texts_of(plain, " a") == ["▁", "▁a"]
    without = small(**{"tokenizer.ggml.add_space_prefix": False})
    assert texts_of(without, "a a") == ["a", "▁a"]
    for tokenizer in (plain, without):
        for text in ("a", " a", "  ", "a\n", "é"):
            assert tokenizer.decode(tokenizer.encode(text, special=False, bos=False)) == text


def test_special_tokens_stand_apart():
    types = {"[X]": CONTROL, "<u>": USER_DEFINED}
    scores = {text: float(-i) for i, text in enumerate((*SPACED, "[X]", "<u>", "[", "[X"))}
    tokenizer = small(scores, types)
    assert texts_of(tokenizer, "a[X]b<u>c", special=True) == [
        *("▁a", "[X]", "▁", "b", "<u>", "▁", "c")
    ]
    assert tokenizer.decode(tokenizer.encode("a[X]b<u> c", special=True)) == "<s>a[X]b<u> c"
    # Merges could join [X and ], were [X] not a control token.
    assert texts_of(tokenizer, "[X]") == ["▁", "[X", "<0x5D>"]
    assert texts_of(tokenizer, "<0x41>") == ["▁", *(f"<0x{b:02X}>" for b in b"<0x41>")]


def test_the_name_of_a_byte_is_no_piece():
    scores = dict.fromkeys(["▁", *"<0x41>", "<0", "<0x", "<0x4", "<0x41"], -1.0)
    assert texts_of(small(scores), "<0x41>") == ["▁", "<0x41", ">"]


def test_unused_pieces_are_taken_apart_again():
    scores = {"▁": -9.0, "a": -9.0, "b": -9.0, "c": -9.0, "ab": -1.0, "abc": -2.0}
    assert texts_of(small(scores), "abc") == ["▁", "abc"]
    assert texts_of(small(scores, {"abc": UNUSED}), "abc") == ["▁", "ab", "c"]
    both = small(scores, {"abc": UNUSED, "ab": UNUSED, "c": UNUSED})
    assert texts_of(both, "abc") == ["▁", "a", "b", "<0x63>"]


def test_a_stream_goes_on_from_a_prompt():
    """The first token of an answer keeps its space; that of a text from its beginning does not."""
    tokenizer = small()
    ids = tokenizer.encode("a a", special=False, bos=False)
    decoder = StreamDecoder(tokenizer)
    assert "".join(map(decoder.push, ids)) + decoder.flush() == " a a"
    assert tokenizer.decode(ids) == "a a"
    assert tokenizer.decode(ids[1:]) == "a"


def test_threads_share_what_is_remembered(ours):
    texts = [f"ab{n % 7} cde{n % 11} é" * 5 for n in range(200)]
    alone = [ours.encode(text, special=True) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda text: ours.encode(text, special=True), texts)) == alone


def test_long_stretches_are_joined_or_refused(monkeypatch):
    tokenizer = small()
    text = "a" * 50_000
    assert tokenizer.decode(tokenizer.encode(text, special=False, bos=False)) == text
    monkeypatch.setattr(spm, "LONGEST_WORD", 49_999)
    with pytest.raises(UsageError, match="words of at most 49999 characters, got 50001"):
        tokenizer.encode(text, special=False)
    monkeypatch.setattr(tokenizer_module, "MAX_UNBROKEN", 100)  # of vocabularies with merges
    assert len(tokenizer.encode("b c " * 20_000, special=False)) > 50_000  # cut at the spaces


def test_a_long_text_is_refused_once_it_is_too_long(monkeypatch):
    tokenizer, made = small(), []
    original = tokenizer._merge

    def counted(text):
        for ids in original(text):
            made.extend(ids)
            yield ids

    monkeypatch.setattr(tokenizer, "_merge", counted)
    text = "b c " * 14_000  # 28,000 words of two tokens each
    assert len(tokenizer.encode(text, special=True)) > 42_000
    for special in (False, True):
        made.clear()
        with pytest.raises(UsageError, match=r"at most 10000 tokens .*, got at least 4000"):
            tokenizer.encode(text, special=special, most=10_000)
        assert len(made) < 40_010


def test_many_unused_pieces_one_inside_the_other():
    scores = {"a" * n: float(-n) for n in range(1, 3001)}
    tokenizer = small(scores | {"▁": -1e9}, dict.fromkeys(list(scores)[1:], UNUSED))
    assert texts_of(tokenizer, "a" * 3000) == ["▁", *["a"] * 3000]


@pytest.mark.parametrize(
    "value",
    [None, "x", 5, [1.0], [[0.0]] * 268, ["0"] * 268, [float("nan")] * 268, [float("inf")] * 268],
    ids=lambda _: "",
)
def test_damaged_scores_are_refused_in_one_line(value):
    with pytest.raises(ModelRefused) as caught:
        small(**{"tokenizer.ggml.scores": value})
    message = str(caught.value)
    assert message.startswith("small.gguf: tokenizer.ggml.scores: expected ")
    assert message.isprintable()
    assert len(message) < 250


def test_whole_numbers_and_arrays_are_scores():
    scores = np.arange(268, dtype=np.int32)[::-1]
    assert texts_of(small(**{"tokenizer.ggml.scores": scores}), "abc") == ["▁", "abc"]


def test_a_byte_without_a_token_is_refused():
    tokens = [*BYTE_OF_TEXT, "<s>", *SPACED]
    tokens[5] = "x"
    with pytest.raises(ModelRefused, match="a token for each byte, found none for 1 bytes"):
        small(**{"tokenizer.ggml.tokens": tokens})


@FUZZ
@given(text=st.text(max_size=30))
def test_any_text_comes_back(text):
    tokenizer = small()
    ids = tokenizer.encode(text, special=True, bos=False)
    assert tokenizer.decode(ids) == text.replace("▁", " ")
