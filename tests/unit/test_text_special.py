"""Special tokens of every shape: ids as transformers gives them, and what ends an answer."""

import json
import random

import pytest
import tokenizers

from isobit.text.tokenizer import StreamDecoder, Tokenizer
from isobit.text.vocabulary import (
    BYTE_OF_CHARACTER,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    stop_ids,
)

BYTES = sorted(BYTE_OF_CHARACTER, key=BYTE_OF_CHARACTER.get)
QWEN2 = (  # as it stands in Qwen's own tokenizer.json
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Merges that also make special tokens.
MERGES = ["< /", "</ s", "</s >", "< u", "<u n", "<un k", "<unk >", "a b", "ab c", "b c", "Ġ a"]


def metadata(special, merges=(), **more):
    """256 bytes, the pieces of the merges, and special tokens as text to type."""
    pieces = dict.fromkeys(merge.replace(" ", "") for merge in merges)
    texts = dict.fromkeys([*BYTES, *pieces], NORMAL) | special
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": list(texts),
        "tokenizer.ggml.token_type": list(texts.values()),
        "tokenizer.ggml.merges": list(merges),
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


def theirs(data):
    """The same vocabulary as transformers loads it from a tokenizer.json."""
    tokens, types = data["tokenizer.ggml.tokens"], data["tokenizer.ggml.token_type"]
    added = [
        {
            "id": i,
            "content": text,
            "special": kind != USER_DEFINED,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        }
        for i, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) and text
    ]
    split = {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    model = {
        "type": "BPE",
        "vocab": {text: i for i, text in enumerate(tokens)},
        "merges": [merge.split(" ") for merge in data["tokenizer.ggml.merges"]],
    }
    return tokenizers.Tokenizer.from_str(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": added,
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [split, {**level, "use_regex": False}],
                },
                "decoder": {**level, "use_regex": False},
                "model": model,
            }
        )
    )


SHAPES = {
    "qwen": {"<|im_start|>": CONTROL, "<|im_end|>": CONTROL, "<think>": USER_DEFINED},
    "llama": {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL},
    "bert": {"<pad>": CONTROL, "<mask>": CONTROL, "[CLS]": CONTROL, "<|end|>": CONTROL},
    "tags": {"<a>": CONTROL, "<a><b>": CONTROL, "b><c": USER_DEFINED, "<c>": USER_DEFINED},
    "letters": {"abc": CONTROL, "ab": USER_DEFINED, "bcd": CONTROL},
    "nested": {"abc": USER_DEFINED, "b": CONTROL, "xa": CONTROL},
    "one sign": {"|": CONTROL, "$": USER_DEFINED, "!": UNKNOWN},
    "spaces": {"  ": USER_DEFINED, "\n\n": USER_DEFINED, " <s>": CONTROL, "a b": CONTROL},
    "wide": {"<｜end▁of▁sentence｜>": CONTROL, "思考": USER_DEFINED, "😀": CONTROL},
    "byte-level": {"Ġb": USER_DEFINED, "Ċ": NORMAL},
    "empty": {"": CONTROL, "<s>": CONTROL},
    "padding": {"[PAD1]": UNUSED, "<s>": CONTROL},
    "long": {"<" + "x" * 5000 + ">": CONTROL},
}


@pytest.mark.parametrize("merges", [MERGES, MERGES[:2], []], ids=["all", "some", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_ids_are_those_of_transformers(shape, merges):
    special = {text: kind for text, kind in SHAPES[shape].items() if text not in BYTES}
    data = metadata(special, merges)
    for text, kind in SHAPES[shape].items():  # those that are bytes keep their place
        data["tokenizer.ggml.token_type"][data["tokenizer.ggml.tokens"].index(text)] = kind
    ours, reference = Tokenizer.from_metadata(data, "m.gguf"), theirs(data)
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    parts = [*SHAPES[shape], "<", "<s", "</s", ">", "<un", "k>", " ", "a", "b", "c", "d", "\n", "|"]
    hidden = set(ours.vocabulary.control.values()) | ours.vocabulary.unused
    for _ in range(200):
        text = "".join(rng.choice(parts) for _ in range(rng.randrange(12)))
        if shape == "byte-level":
            text = text.replace("Ġ", "")  # transformers decodes a token " b" of what is "Ġb"
        ids = ours.encode(text, special=True)
        assert ids == reference.encode(text, add_special_tokens=False).ids, text
        plain = ours.encode(text, special=False)
        assert hidden.isdisjoint(plain), text
        assert ours.decode(plain) == ours.decode(ids) == text


def test_characters_whose_bytes_utf_8_never_has_can_be_user_defined():
    """deepseek-coder's tokens 32000 to 32012: the characters, not the bytes that they stand for."""
    characters = "õ÷ÁýÀÿøúþüùöû"
    for kind in (USER_DEFINED, CONTROL, UNUSED):
        data = metadata(dict.fromkeys(characters, kind) | {"<pad>": CONTROL}, MERGES)
        tokenizer = Tokenizer.from_metadata(data, "m.gguf")
        tokens = data["tokenizer.ggml.tokens"]
        assert tokenizer.vocabulary.missing == frozenset()
        for text in (*characters, "für øre", "a÷b õõ", "über ü", f"x{characters} é ñ 中"):
            assert tokenizer.decode(tokenizer.encode(text, special=False)) == text
            if kind == USER_DEFINED:
                ids = tokenizer.encode(text, special=True)
                assert ids == theirs(data).encode(text, add_special_tokens=False).ids, text
                assert all(tokens.index(c) in ids for c in characters if c in text)
    needed = metadata({"é": USER_DEFINED})  # its byte begins 中 and others
    assert Tokenizer.from_metadata(needed, "m.gguf").vocabulary.user_defined == {}


def test_a_control_token_that_merges_make_is_left_in_its_halves():
    special = {"abc": CONTROL}
    tokenizer = Tokenizer.from_metadata(metadata(special, ["a b", "ab c"]), "m.gguf")
    tokens = tokenizer.vocabulary.tokens
    ids = tokenizer.encode("xabcabc", special=False)
    assert [tokens[i] for i in ids] == ["x", "ab", "c", "ab", "c"]


def test_a_control_token_that_two_merges_make_is_left_in_the_halves_of_the_first():
    merges = ["a b", "b c", "ab c", "a bc"]
    tokenizer = Tokenizer.from_metadata(metadata({"abc": CONTROL}, merges), "m.gguf")
    tokens = tokenizer.vocabulary.tokens
    assert [tokens[i] for i in tokenizer.encode("abc", special=False)] == ["ab", "c"]


def test_a_merge_of_a_control_token_that_no_merge_makes_joins_nothing():
    data = metadata({"<x>": CONTROL, "<x>a": NORMAL})
    data["tokenizer.ggml.merges"] = ["<x> a"]
    tokenizer = Tokenizer.from_metadata(data, "m.gguf")
    assert tokenizer.encode("<x>a", special=False) == [*b"<x>a"]
    assert tokenizer.encode("<x>a", special=True) == [256, ord("a")]


def test_halves_that_are_control_tokens_too_are_parted_again():
    special = dict.fromkeys(["ab", "abc"], CONTROL)
    tokenizer = Tokenizer.from_metadata(metadata(special, ["a b", "ab c"]), "m.gguf")
    assert tokenizer.encode("abc", special=False) == [*b"abc"]
    assert len(tokenizer.encode("abc", special=True)) == 1


def test_padding_prints_nothing():
    data = metadata(
        {"[PAD1]": UNUSED, "<s>": CONTROL}, ["[ P", "[P A", "[PA D", "[PAD 1", "[PAD1 ]"]
    )
    tokenizer = Tokenizer.from_metadata(data, "m.gguf")
    [pad] = tokenizer.vocabulary.unused
    assert tokenizer.decode([97, pad, 98]) == "ab"
    assert tokenizer.token_bytes(pad) == b""
    assert StreamDecoder(tokenizer).push(pad) == ""
    for special in (False, True):  # not even where merges would make it
        ids = tokenizer.encode("[PAD1]", special=special)
        assert pad not in ids
        assert tokenizer.decode(ids) == "[PAD1]"


def ends(special, **keys):
    """The texts of what ends a generation."""
    tokenizer = Tokenizer.from_metadata(metadata(special, **keys), "m.gguf")
    return {tokenizer.vocabulary.tokens[i] for i in tokenizer.stop_ids}


def controls(*texts):
    return dict.fromkeys(texts, CONTROL)


STOPS = {  # what the file holds, and which of it ends an answer
    "qwen": (controls("<|im_start|>", "<|im_end|>", "<|endoftext|>"), "<|im_end|> <|endoftext|>"),
    "llama 3": (
        controls("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|python_tag|>"),
        "<|eot_id|> <|eom_id|> <|end_of_text|>",
    ),
    "gemma 3": (controls("<start_of_turn>", "<end_of_turn>", "<eos>"), "<end_of_turn> <eos>"),
    "gemma 4": (
        controls("<|turn>", "<turn|>", "<|tool_response>", "<eos>", "</s>"),
        "<turn|> <|tool_response> <eos>",
    ),
    "gpt-oss": (
        controls("<|start|>", "<|end|>", "<|return|>", "<|call|>", "<|message|>"),
        "<|return|> <|call|>",
    ),
    "solar": (controls("<|end|>", "<|calls|>", "<|flush|>"), "<|calls|> <|flush|>"),
    "phi": (controls("<|end|>", "<|user|>"), "<|end|>"),
    "kimi": (controls("[EOS]", "[EOT]", "[PAD]", "[BOS]"), "[EOS] [EOT] [PAD]"),
    "mistral": (controls("<s>", "</s>", "[INST]"), "</s>"),
    "code": (
        controls("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|fim_prefix|>"),
        "<|fim_pad|> <|repo_name|> <|file_sep|>",
    ),
    "typed as user-defined": ({"<|im_end|>": USER_DEFINED}, "<|im_end|>"),
}


@pytest.mark.parametrize("name", STOPS)
def test_texts_that_end_an_answer(name):
    special, expected = STOPS[name]
    assert ends(special) == set(expected.split())


def test_an_ordinary_token_of_such_a_text_ends_nothing():
    assert ends({"</s>": NORMAL, "<eos>": NORMAL}) == set()


def test_keys_that_end_an_answer():
    names = [f"<{n}>" for n in range(7)]
    keys = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
    given = {f"{key}_token_id": 256 + n for n, key in enumerate(keys)}
    assert ends(controls(*names), **given) == set(names[:6])
    assert ends(controls(*names), eos_token_ids=[256, 262]) == {"<0>", "<6>"}
    # A key names its token, and then no text does.
    assert ends(controls("<|fim_pad|>", "<0>"), fim_pad_token_id=257) == {"<0>"}


def test_what_is_no_end_is_none_by_key_either():
    gemma, gpt = controls("<|tool_response>", "</s>"), controls("<|end|>", "<|return|>", "<|call|>")
    assert ends(gemma, eos_token_id=257) == {"<|tool_response>"}
    assert ends(gpt, eot_token_id=256) == {"<|return|>", "<|call|>"}


def test_ends_of_a_file_without_tokenizer():
    keys = {"tokenizer.ggml.eos_token_id": 5, "tokenizer.ggml.eos_token_ids": [6, 7]}
    assert stop_ids(keys, 8, "m.gguf") == {5, 6, 7}
    assert stop_ids({}, 8, "m.gguf") == frozenset()
