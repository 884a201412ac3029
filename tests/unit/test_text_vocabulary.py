"""Damaged and hostile tokenizer metadata is refused in one line, or handled."""

import tracemalloc

import numpy as np
import pytest

from isobit.errors import ModelRefused
from isobit.text.tokenizer import Tokenizer
from isobit.text.vocabulary import BYTE_OF_CHARACTER, BYTE_OF_TEXT, NORMAL, stop_ids

BYTES = sorted(BYTE_OF_CHARACTER, key=BYTE_OF_CHARACTER.get)
SIZE = 259


def metadata():
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*BYTES, "ab", "<|im_end|>", "<think>"],
        "tokenizer.ggml.token_type": [*[NORMAL] * 257, 3, 4],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 257,
    }


def with_token(i, text):
    tokens = metadata()["tokenizer.ggml.tokens"]
    return {"tokenizer.ggml.tokens": [*tokens[:i], text, *tokens[i + 1 :]]}


def with_types(*changed):
    types = metadata()["tokenizer.ggml.token_type"]
    for i, kind in changed:
        types[i] = kind
    return {"tokenizer.ggml.token_type": types}


def test_the_undamaged_one_is_read():
    tokenizer = Tokenizer.from_metadata(metadata(), "m.gguf")
    assert tokenizer.encode("ab<think>", special=False) == [256, 258]


HUGE = "x" * 1_000_000

DAMAGED = {
    "model": [{"tokenizer.ggml.model": v} for v in (None, "bert", "GPT2", 1, ["gpt2"], HUGE)],
    "pre": [
        {"tokenizer.ggml.pre": v}
        for v in (None, "", "qwen", "Qwen2", "default", HUGE, 7, ["qwen2"])
    ],
    "tokens": [
        *(
            {"tokenizer.ggml.tokens": v}
            for v in (None, [], "abc", 5, b"ab", {"a": 0}, [1, 2], [None])
        ),
        with_token(256, "a"),  # twice
        with_token(256, b"ab"),
        with_token(256, 5),
        with_token(256, ["ab"]),
        with_token(256, "\ud800"),
        with_token(97, "aa"),  # a byte has no token
    ],
    "token_type": [
        *({"tokenizer.ggml.token_type": v} for v in (None, [], [1] * (SIZE - 1), [1] * (SIZE + 1))),
        *({"tokenizer.ggml.token_type": v} for v in ("1" * SIZE, 1, [1.0] * SIZE, [[1]] * SIZE)),
        {"tokenizer.ggml.token_type": [*[1] * (SIZE - 1), "1"]},
        {"tokenizer.ggml.token_type": [*[1] * (SIZE - 1), [1, 2]]},
        *(with_types((5, kind)) for kind in (0, 7, -1, 2**40, 2**63, 2**80, True)),
    ],
    "merges": [
        *({"tokenizer.ggml.merges": v} for v in (None, "a b", 5, [1], [("a", "b")], [None])),
        *({"tokenizer.ggml.merges": [v]} for v in ("", "ab", "a  b", " a b", "a b c", "a\tb")),
        *({"tokenizer.ggml.merges": ["a b", v]} for v in ("b c", "zz a", "a zz", "\ud800 a")),
        {"tokenizer.ggml.merges": ["a b", f"{HUGE} a"]},
        {"tokenizer.ggml.merges": ["a b", " " * 60_000_000]},  # no list of so many pieces
        {"tokenizer.ggml.merges": ["a b", "< |im_end|>"]},
        {"tokenizer.ggml.merges": ["a b", "<|im_end|> a"]},
    ],
    "token_id": [
        {f"tokenizer.ggml.{name}_token_id": v}
        for name in ("bos", "eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
        for v in (-1, SIZE, 2**63, 10**5000, "1", 1.0, True, [1])
    ],
    "token_ids": [
        {"tokenizer.ggml.eos_token_ids": v} for v in (5, "1", [SIZE], [-1], ["1"], [True], [[1]])
    ],
    "bos": [
        {"tokenizer.ggml.add_bos_token": True},
        *({"tokenizer.ggml.add_bos_token": v} for v in (1, "true", [True])),
    ],
    "chat_template": [{"tokenizer.chat_template": v} for v in (5, ["x"], b"x")],
}


@pytest.mark.parametrize(
    ("part", "change"),
    [(part, change) for part, changes in DAMAGED.items() for change in changes],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_metadata_is_refused_in_one_line(part, change):
    damaged = {key: v for key, v in (metadata() | change).items() if v is not None}
    with pytest.raises(ModelRefused) as caught:
        Tokenizer.from_metadata(damaged, "m.gguf")
    message = str(caught.value)
    assert message.startswith("m.gguf: tokenizer.")
    assert part in message
    assert "expected" in message
    assert "found" in message
    assert message.isprintable()  # one line
    assert len(message) < 250


@pytest.mark.parametrize("key", ["token_type", "scores"])
def test_texts_for_numbers_cost_no_memory(key):
    """As an array of NumPy's, each of them would be as long as the longest: 1 GB here."""
    texts = {f"tokenizer.ggml.{key}": [HUGE, *["x"] * (SIZE - 1)]}
    pieces = [*BYTE_OF_TEXT, "a", "b", "c"]
    llama = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": pieces}
    damaged = metadata() | llama | {"tokenizer.ggml.bos_token_id": 258} | texts
    tracemalloc.start()
    try:
        with pytest.raises(ModelRefused, match=f"{key}: expected an array of .*, found something"):
            Tokenizer.from_metadata(damaged, "m.gguf")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_special_tokens_are_bounded_before_work():
    many = [f"{i:09}" * 6 for i in range(10_000)]  # 540 kB
    changed = metadata()
    changed["tokenizer.ggml.tokens"] += many
    changed["tokenizer.ggml.token_type"] += [4] * len(many)
    with pytest.raises(ModelRefused, match="at most 524288 bytes in all, found 540"):
        Tokenizer.from_metadata(changed, "m.gguf")


def test_a_file_without_tokenizer_says_what_to_do():
    with pytest.raises(ModelRefused, match="use token ids"):
        Tokenizer.from_metadata({"general.architecture": "qwen3moe"}, "m.gguf")


def test_a_path_with_line_ends_stays_on_one_line():
    for change in ({"tokenizer.ggml.tokens": []}, {"tokenizer.ggml.merges": ["a zz"]}):
        with pytest.raises(ModelRefused, match=r"^a\\nb\\x1b.gguf: tokenizer"):
            Tokenizer.from_metadata(metadata() | change, "a\nb\x1b.gguf")
    with pytest.raises(ModelRefused, match=r"^a\\nb: tokenizer"):
        stop_ids({"tokenizer.ggml.eos_token_id": 5}, 5, "a\nb")


def test_numpy_arrays_and_tuples_are_read():
    arrays = metadata() | {
        "tokenizer.ggml.tokens": tuple(metadata()["tokenizer.ggml.tokens"]),
        "tokenizer.ggml.token_type": np.array(metadata()["tokenizer.ggml.token_type"], np.int32),
        "tokenizer.ggml.eos_token_id": np.uint32(257),
    }
    tokenizer = Tokenizer.from_metadata(arrays, "m.gguf")
    assert tokenizer.vocabulary == Tokenizer.from_metadata(metadata(), "m.gguf").vocabulary
    assert type(tokenizer.vocabulary.eos_id) is int


def test_odd_but_harmless_vocabularies_are_handled():
    # Pieces that no byte-level text can contain, an empty one, one of a megabyte.
    odd = ["한", "a b", "", HUGE]
    changed = metadata()
    changed["tokenizer.ggml.tokens"] += odd
    changed["tokenizer.ggml.token_type"] += [NORMAL] * len(odd)
    tokenizer = Tokenizer.from_metadata(changed, "m.gguf")
    assert [tokenizer.token_bytes(SIZE + i) for i in range(4)] == [t.encode() for t in odd]
    assert tokenizer.decode([SIZE, SIZE + 2, 256]) == "한ab"
    assert tokenizer.decode(tokenizer.encode("한 a b", special=True)) == "한 a b"


def test_many_control_tokens():
    changed = metadata()
    many = [f"<|reserved_{i}|>" for i in range(20_000)]
    changed["tokenizer.ggml.tokens"] += many
    changed["tokenizer.ggml.token_type"] += [3] * len(many)
    tokenizer = Tokenizer.from_metadata(changed, "m.gguf")
    text = "".join(f"a{token}" for token in many[::100])
    ids = tokenizer.encode(text, special=True)
    assert ids[1::2] == list(range(SIZE, SIZE + 20_000, 100))
    assert ids[::2] == [97] * 200
