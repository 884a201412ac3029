"""Words and vocabularies of other models: real excerpts, and the patterns in another engine."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

from isobit.errors import ModelRefused, UsageError
from isobit.text import pretokenizers
from isobit.text import tokenizer as tokenizer_module
from isobit.text.pretokenizers import PRETOKENIZERS, PreTokenizer
from isobit.text.tokenizer import StreamDecoder, Tokenizer
from isobit.text.vocabulary import BYTE_OF_CHARACTER, BYTE_OF_TEXT, CONTROL, NORMAL

EXCERPTS = json.loads(
    Path(__file__).parents[1].joinpath("data/vocabulary-excerpts.json").read_text("utf-8")
)
TEXTS = EXCERPTS["texts"]

# Characters that every table of Unicode here knows; of numbers only digits, since for \b the two
# engines differ in whether a superscript is part of a word.
CHARACTERS = st.one_of(
    st.sampled_from("aBcÀéß1234٣ \t\n\r\u00a0\u2003.,;:!?'\"/\\-=_$+<|>`^~ʼʰǅ"),
    st.sampled_from("工作のカ한국नमस्तेไทย😀\u0301\u200d\u0e49"),
    st.characters(max_codepoint=0x24F, exclude_categories=["Cc", "Cs", "No"]),
)
WORDS = st.sampled_from(["'s", "'RE", "'Ll", "  ", " \n", "\r\n", "HTTPServer", "1234567", "don't"])
MIXED = st.lists(WORDS | st.text(CHARACTERS, max_size=6), max_size=12).map("".join)
FUZZ = settings(deadline=None)


def of_excerpt(name: str) -> tuple[Tokenizer, dict[int, int], list[list[int] | None]]:
    """A tokenizer, its ids to those of the whole vocabulary, and the published ids."""
    part = EXCERPTS["vocabularies"][name]
    tokens = list(part["tokens"])
    metadata = {
        "tokenizer.ggml.model": part["model"],
        "tokenizer.ggml.tokens": [*tokens, "<bos>"],
        "tokenizer.ggml.token_type": [NORMAL] * len(tokens) + [CONTROL],
        "tokenizer.ggml.bos_token_id": len(tokens),
    }
    for key in ("pre", "merges", "scores"):
        if part.get(key) is not None:
            metadata[f"tokenizer.ggml.{key}"] = part[key]
    if "scores" in part:
        metadata["tokenizer.ggml.scores"] = [*part["scores"], 0.0]
    tokenizer = Tokenizer.from_metadata(metadata, name)
    return tokenizer, dict(enumerate(part["tokens"].values())), part["ids"]


@pytest.mark.parametrize("name", EXCERPTS["vocabularies"])
def test_published_ids(name):
    tokenizer, whole, published = of_excerpt(name)
    compared = 0
    for text, ids in zip(TEXTS, published, strict=True):
        if ids is not None:
            made = tokenizer.encode(text, special=False, bos=False)
            assert [whole[i] for i in made] == ids, text
            assert tokenizer.decode(made) == text
            compared += 1
    assert compared >= 46


def pieces(kind: PreTokenizer, text: str) -> list[str]:
    """The words that the library cuts, as text."""
    cutter = kind.build({}, []).pre_tokenizer
    found = [word for word, _ in cutter.pre_tokenize_str(text)]
    return [bytes(BYTE_OF_CHARACTER[c] for c in word).decode() for word in found]


def pieces_of_regex(kind: PreTokenizer, text: str) -> list[str]:
    """The same by another engine."""
    words = [text] if text else []
    for pattern in kind.words:
        compiled = regex.compile(pattern, regex.V1)
        cut = []
        for word in words:
            end = 0
            for match in compiled.finditer(word):
                cut += [word[end : match.start()], match[0]]
                end = match.end()
            cut.append(word[end:])
        words = [word for word in cut if word]
    return words


KINDS = {kind: name for name, kind in reversed(PRETOKENIZERS.items()) if kind.byte_level}


@pytest.mark.parametrize("kind", KINDS, ids=KINDS.values())
@FUZZ
@given(text=MIXED)
def test_words_are_those_of_another_engine(kind, text):
    assert pieces(kind, text) == pieces_of_regex(kind, text)
    assert "".join(pieces(kind, text)) == text


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("gpt-2", ByteLevel(add_prefix_space=False)),
        ("smollm", Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])),
    ],
)
@FUZZ
@given(text=MIXED)
def test_words_are_those_of_the_library(name, made, text):
    """Two of the table are building blocks of the library itself."""
    theirs = [word for word, _ in made.pre_tokenize_str(text)]
    ours = PRETOKENIZERS[name].build({}, []).pre_tokenizer
    assert [word for word, _ in ours.pre_tokenize_str(text)] == theirs


ORIGINALS = {"tiny_aya": r"\d{1,3}(?=(?:\d{3})*\b)", "deepseek-llm": r"\s+$"}
RUNS = st.lists(
    st.sampled_from(["1", "234567", "٣٣٣", "½", "_", "a", "é", "工", ".", "  ", "\n", "\xa0"])
)


@pytest.mark.parametrize(("name", "pattern"), ORIGINALS.items())
@FUZZ
@given(text=RUNS.map("".join))
def test_words_are_those_of_the_original_pattern(name, pattern, text):
    kind = PRETOKENIZERS[name]
    [rewritten] = {pretokenizers._SPACES_AT_END, pretokenizers._THREES_FROM_END} & {*kind.words}
    words = tuple(pattern if word == rewritten else word for word in kind.words)
    assert pieces(kind, text) == pieces(replace(kind, words=words), text)


@pytest.mark.parametrize("kind", KINDS, ids=KINDS.values())
def test_a_long_run_is_cut_in_time_that_grows_with_it(kind):
    """Minutes, if the rest of the run is looked at from each of its places."""
    for run in "1", " ", "\xa0", "a", "\n":
        text = run * 100_000 + "1x"
        assert "".join(pieces(kind, text)) == text


@pytest.mark.parametrize("kind", KINDS, ids=KINDS.values())
@FUZZ
@given(text=MIXED)
def test_no_word_goes_on_over_a_break(kind, text):
    """Long texts are cut there: both sides have the same words alone as together."""
    for found in kind.breaks.finditer(text):
        at = found.start()
        assert pieces(kind, text) == pieces(kind, text[:at]) + pieces(kind, text[at:])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("qwen2", "4½²", ["4", "½", "²"]),
        ("qwen2", "नमस्ते 12", ["नमस", "्त", "े", " ", "1", "2"]),
        ("qwen35", "नमस्ते 12", ["नमस्ते", " ", "1", "2"]),
        ("llama-bpe", "I'LL 1234567", ["I", "'LL", " ", "123", "456", "7"]),
        ("gpt-4o", "HTTPServer don'T/\n\n x", ["HTTPServer", " don'T", "/\n\n", " x"]),
        ("gpt-4o", "fooBar ÀÉÎa", ["foo", "Bar", " ÀÉÎa"]),
        ("tekken", "fooBar don't 123", ["foo", "Bar", " don", "'t", " ", "1", "2", "3"]),
        ("deepseek-v3", "a工作1234.b", ["a", "工作", "123", "4", ".b"]),
        ("smollm", "a 12'S's", ["a", " ", "1", "2", "'", "S", "'s"]),
        ("gpt-2", "a 12'S's  b", ["a", " 12", "'", "S", "'s", " ", " b"]),
        ("kimi-k2", "a工作B 1234/\n", ["a", "工作", "B", " ", "123", "4", "/\n"]),
        ("cohere2moe", "1234567 a", ["1", "234", "567", " a"]),
        ("bailingmoe", "a\n\n\rb ?", ["a", "\n\n\r", "b", " ?"]),
        ("seed-coder", "a !!\n", ["a", " !!", "\n"]),
        ("minicpm5", "a 1234", ["a", " ", "123", "4"]),
        ("laguna", "a \n\n b", ["a", " ", "\n\n", " b"]),
        ("falcon", "a!1234 $b", ["a", "!", "123", "4", " ", "$", "b"]),
        ("deepseek-llm", "aé!\n12 b工作  ", ["a", "é", "!", "\n", "1", "2", " b", "工作", "  "]),
        ("deepseek-coder", "a!\n12 b工作", ["a", "!", "\n", "1", "2", " b", "工作"]),
    ],
)
def test_words_by_hand(name, text, words):
    assert pieces(PRETOKENIZERS[name], text) == words


def small(pre: str, extra: tuple[str, ...] = (), merges: tuple[str, ...] = (), **keys: object):
    tokens = [*sorted(BYTE_OF_CHARACTER, key=BYTE_OF_CHARACTER.get), *extra]  # type: ignore[arg-type]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [NORMAL] * len(tokens),
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": 0,
    }
    return Tokenizer.from_metadata(metadata | keys, "small.gguf")


def test_a_word_that_is_a_token_is_that_token():
    """Where merges are ignored; no merge makes ``abc`` here."""
    for pre, wins in (("llama-bpe", True), ("glm4", True), ("chatglm-bpe", False)):
        tokenizer = small(pre, ("ab", "abc"), ("a b",))
        ids = tokenizer.encode("abc abc", special=False, bos=False)
        assert ids == ([257, 32, 256, 99] if wins else [256, 99, 32, 256, 99])


def test_who_begins_with_bos():
    key = "tokenizer.ggml.add_bos_token"
    assert small("llama-bpe").encode("a", special=False) == [0, 97]
    assert small("llama-bpe", **{key: False}).encode("a", special=False) == [97]
    assert small("qwen35").encode("a", special=False) == [97]
    assert small("qwen35", **{key: True}).encode("a", special=False) == [0, 97]
    gemma, _, _ = of_excerpt("gemma-4")
    assert gemma.vocabulary.add_bos


def test_bytes_without_a_token_are_refused_in_text():
    tokens = sorted(BYTE_OF_CHARACTER, key=BYTE_OF_CHARACTER.get)
    tokens[0x07] = tokens[0xC0] = None
    keys = {
        "tokenizer.ggml.tokens": [t for t in tokens if t],
        "tokenizer.ggml.token_type": [NORMAL] * 254,
    }
    tokenizer = small("starcoder", **keys)
    assert tokenizer.decode(tokenizer.encode("é\x08", special=True)) == "é\x08"
    with pytest.raises(UsageError, match="has tokens for, found 0x07"):
        tokenizer.encode("a\x07", special=False)
    tokens[ord("a")] = None
    keys["tokenizer.ggml.tokens"] = [t for t in tokens if t]
    keys["tokenizer.ggml.token_type"] = [NORMAL] * 253
    with pytest.raises(ModelRefused, match="each byte of printable ASCII"):
        small("starcoder", **keys)


def gemma(**changed: object) -> Tokenizer:
    """Gemma's way of writing text, with few tokens: bytes, some characters, runs."""
    texts = ["a", "b", "▁", "\n", "ab", "▁a", "\n\n", "▁▁"]
    tokens = [*BYTE_OF_TEXT, *texts, "<bos>", "<x>"]
    metadata: dict[str, object] = {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [6] * 256 + [NORMAL] * len(texts) + [CONTROL, 4],
        "tokenizer.ggml.merges": ["▁ ▁", "\n \n", "a b", "▁ a"],
        "tokenizer.ggml.bos_token_id": 264,
    }
    return Tokenizer.from_metadata(metadata | changed, "gemma.gguf")


def test_gemma_merges_over_spaces_and_writes_the_rest_as_bytes():
    tokenizer = gemma()
    texts = list(tokenizer.vocabulary.tokens)
    ids = tokenizer.encode("ab  a\n\n\né<x>a <bos>", special=True)
    assert [texts[i] for i in ids] == [
        *("<bos>", "ab", "▁▁", "a", "\n\n", "\n", "<0xC3>", "<0xA9>", "<x>", "a", "▁", "<bos>")
    ]
    assert tokenizer.decode(ids) == "<bos>ab  a\n\n\né<x>a <bos>"
    assert tokenizer.token_bytes(0xC3) == b"\xc3"
    assert gemma(**{"tokenizer.ggml.add_bos_token": False}).encode("a", special=False)[0] == 264


def test_gemma_needs_a_token_for_every_byte():
    tokens = gemma().vocabulary.tokens
    broken = ["x" if t == "<0xFF>" else t for t in tokens]
    with pytest.raises(ModelRefused, match="a token for each byte, found none for 1 bytes"):
        gemma(**{"tokenizer.ggml.tokens": broken})


@FUZZ
@given(text=st.lists(st.sampled_from(["a", "b", " ", "\n", "é", "<x>"]), max_size=40).map("".join))
def test_long_texts_of_gemma_are_cut_at_lines(text):
    tokenizer = gemma()
    whole = tokenizer.encode(text, special=True)
    before = tokenizer_module.PART
    tokenizer_module.PART = 3
    try:
        assert tokenizer.encode(text, special=True) == whole
        assert tokenizer.decode(whole) == "<bos>" + text
    finally:
        tokenizer_module.PART = before
    decoder = StreamDecoder(tokenizer)
    assert "".join(map(decoder.push, whole)) + decoder.flush() == text
