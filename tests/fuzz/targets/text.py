"""Text: vocabularies with special tokens of any shape; round trips, and transformers' ids."""

import random

from isobit.errors import ModelRefused, UsageError
from isobit.text.tokenizer import StreamDecoder, Tokenizer
from tests.unit.test_text_special import MERGES, metadata, theirs

SHAPES = ["<|im_start|>", "<s>", "</s>", "<pad>", "<a><b>", "b><c", "ab", "abc", "b", "|", "思考"]
SHAPES += ["  ", "\n\n", " <s>", "x\ny", "😀", "Ġb", "", "<think>", "[PAD1]", "'s", "1", "<" * 300]
SPACES = [" ", "\n", "\r\n", "\t", "\u00a0", "\u2028", "\u3000", "\u200b", "\ufeff", "\x1c", "\x85"]
LETTERS = [
    "'s",
    "'LL",
    "'Re",
    "don't",
    "\u2019s",
    "ß",
    "ﬁ",
    "Ǆ",
    "İ",
    "e\u0301",
    "한국",
    "def ",
    "==",
]


def piece(rng: random.Random) -> str:
    match rng.randrange(10):
        case 0:
            return chr(rng.randrange(0x110000))  # a surrogate now and then
        case 1:
            return rng.choice(SPACES) * rng.choice([1, 2, 3, 7, 100])
        case 2:
            return rng.choice(LETTERS)
        case 3 | 4:
            return rng.choice(SHAPES)
        case 5:
            return "".join(chr(rng.choice([0x300, 0x0E33, 0x1100, 0x94D, 0x200D, 0x1F468, 0xFE0F])))
        case 6:
            return chr(rng.randrange(0x4E00, 0x9FFF)) * rng.choice([1, 3, 50])
        case 7:
            return rng.choice("aeĠ0 .\n") * rng.choice(
                [1, 10, 1000, 70_000 if rng.random() < 0.05 else 2]
            )
        case 8:
            return str(rng.randrange(10**12)) + rng.choice(["", "٣", "½", "Ⅷ", "𝟘"])
        case _:
            return "".join(chr(rng.randrange(32, 127)) for _ in range(rng.randrange(8)))


def one(rng: random.Random) -> str:
    special = {
        text: rng.choice([2, 3, 3, 4, 4, 5]) for text in rng.sample(SHAPES, rng.randrange(6))
    }
    plain = {text: kind for text, kind in special.items() if len(text) != 1 or not text.isascii()}
    data = metadata(plain, rng.sample(MERGES, len(MERGES)) if rng.random() < 0.2 else MERGES)
    try:
        ours = Tokenizer.from_metadata(data, "m.gguf")
    except ModelRefused as error:
        return f"vocabulary refused: {str(error).split(':')[1]}"
    text = "".join(piece(rng) for _ in range(rng.choice([0, 1, 2, 5, 10, 40])))
    lone = any(0xD800 <= ord(c) < 0xE000 for c in text)
    try:
        ids = ours.encode(text, special=True)
    except UsageError:
        assert lone, f"refused {text[:100]!r}"
        return "a lone surrogate is refused"
    assert not lone, "took a lone surrogate"
    hidden = set(ours.vocabulary.control.values()) | ours.vocabulary.unused
    without = ours.encode(text, special=False)
    assert hidden.isdisjoint(without), f"ordinary text made a control token: {text[:100]!r}"
    assert ours.decode(without) == text, f"no round trip: {text[:100]!r}"
    assert len(ours.encode(text, special=False, most=len(without))) == len(without)
    stream = StreamDecoder(ours, skip_special=False)
    assert "".join([stream.push(i) for i in ids]) + stream.flush() == ours.decode(ids)
    if "\u017f" in text or any(kind == 5 for kind in special.values()) or "Ġb" in special:
        return "round trip"
    assert ids == theirs(data).encode(text, add_special_tokens=False).ids, (
        f"other ids: {text[:100]!r}"
    )
    return "as transformers"
