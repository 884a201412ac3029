"""Text to ids and back: published vectors, transformers, round trips, streaming."""

import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Thread

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import isobit
import isobit.text.tokenizer as tokenizer_module
from isobit.errors import UsageError
from isobit.gguf.reader import GGUFFile
from isobit.text.tokenizer import StreamDecoder, Tokenizer
from isobit.text.vocabulary import BYTE_OF_CHARACTER, CONTROL, NORMAL, USER_DEFINED
from tests.helpers.expected import needs

DATA = Path(__file__).parents[1] / "data"
SAMPLE = Path(isobit.__file__).parent / "data" / "pycoder-moe-33m-Q4_K_M.gguf"

# A selection of llama.cpp's published vectors (models/ggml-vocab-qwen2.gguf.inp and .out).
PUBLISHED = {
    "ied 4 ½ months": [1122, 220, 19, 220, 26062, 3951],
    "Führer": [37, 50753, 261],
    "   ": [262],
    "\n\n\n": [1406],
    "\t\n": [1572],
    " Hello, world!": [21927, 11, 1879, 0],
    " this is 🦙.cpp": [419, 374, 11162, 99, 247, 13, 10821],
    "нещо на Български": [78762, 14144, 1456, 13073, 63471, 33594, 3038, 133178, 79012],
    "    Hello\n    Hello": [262, 21927, 198, 262, 21927],
    "\n =": [198, 284],
    "' era": [6, 11385],
    "3333": [18, 18, 18, 18],
    "Hello, y'all! How are you 😁 ?我想在apple工作1314151天～": [
        *(9707, 11, 379, 64848, 0, 2585, 525, 498, 26525, 223, 937, 104100, 18493, 22377),
        *(99257, 16, 18, 16, 19, 16, 20, 16, 35727, 21216),
    ],
}

ANY_CHARACTER = st.characters(exclude_categories=["Cs"])
WORDS = st.sampled_from(
    [
        "'s",
        "'RE",
        "'Ll",
        "I'm",
        "  ",
        " \n",
        "\r\n",
        "\t",
        "x1",
        "é",
        "e\u0301",
        "👨‍👩‍👧",
        "한국",
        "==",
    ]
)
TEXTS = st.lists(WORDS | st.text(ANY_CHARACTER, max_size=8), max_size=12).map("".join)
# Function-scoped work is none; loading a vocabulary in the first example takes its time.
FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def load(path):
    with GGUFFile.open(path) as file:
        return Tokenizer.from_metadata(file.metadata, str(path))


@pytest.fixture(scope="module")
def qwen():
    return load(DATA / "qwen2-vocab.gguf")


@pytest.fixture(scope="module")
def sample():
    return load(SAMPLE)


@pytest.fixture(scope="module")
def transformers_qwen(qwen):
    vocabulary = {text: i for i, text in enumerate(qwen.vocabulary.tokens)}
    transformers = needs("transformers", "transformers")
    return transformers.Qwen2Tokenizer(vocab=vocabulary, merges=qwen.vocabulary.merges)


def small(extra=(), merges=(), **metadata):
    """256 bytes, then ``extra`` tokens as (text, type)."""
    tokens = [*((c, NORMAL) for c in sorted(BYTE_OF_CHARACTER, key=BYTE_OF_CHARACTER.get)), *extra]
    return Tokenizer.from_metadata(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "qwen2",
            "tokenizer.ggml.tokens": [text for text, _ in tokens],
            "tokenizer.ggml.token_type": [kind for _, kind in tokens],
            "tokenizer.ggml.merges": list(merges),
            **metadata,
        },
        "small.gguf",
    )


@pytest.mark.parametrize("text", PUBLISHED)
def test_published_vectors(qwen, text):
    assert qwen.encode(text, special=False) == PUBLISHED[text]
    assert qwen.decode(PUBLISHED[text]) == text


@FUZZ
@given(text=TEXTS)
def test_ids_are_those_of_transformers(qwen, transformers_qwen, text):
    # But for two things: transformers brings text to NFC first, and takes U+017F for an "s".
    text = unicodedata.normalize("NFC", text.replace("\u017f", ""))
    assert qwen.encode(text, special=False) == transformers_qwen.encode(text)


def test_text_is_not_normalised(qwen):
    decomposed = "e\u0301"
    assert qwen.encode(decomposed, special=False) == [68, 53839]  # llama.cpp's
    assert qwen.encode("\u00e9", special=False) == [963]
    assert qwen.decode([68, 53839]) == decomposed


@FUZZ
@given(text=TEXTS)
def test_round_trip(qwen, sample, text):
    for tokenizer in (qwen, sample):
        ids = tokenizer.encode(text, special=False)
        assert tokenizer.decode(ids) == text
        assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()


CONTROL_PARTS = st.sampled_from(["<|im_start|>", "<|im_end|>", "<|", "im_end", "|>", "<|endoftext"])


@FUZZ
@given(text=st.lists(CONTROL_PARTS | st.text(ANY_CHARACTER, max_size=3)).map("".join))
def test_ordinary_text_makes_no_control_token(qwen, text):
    control = set(qwen.vocabulary.control.values())
    ids = qwen.encode(text, special=False)
    assert control.isdisjoint(ids)
    assert qwen.decode(ids) == text
    parsed = qwen.encode(text, special=True)
    assert qwen.decode(parsed) == text
    markers = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    assert sum(i in control for i in parsed) == sum(map(text.count, markers))


def test_special_tokens(qwen):
    text = "<|im_start|>user\n<|im_end|><|endoftext|>"
    assert qwen.encode(text, special=True) == [151644, 872, 198, 151645, 151643]
    assert qwen.decode([151644, 872, 151645], skip_special=True) == "user"
    assert qwen.token_bytes(151644) == b"<|im_start|>"
    assert qwen.stop_ids == {151643, 151645}
    assert qwen.vocab_size == 151936


def test_user_defined_tokens_are_found_in_any_text():
    tokenizer = small([("<think>", USER_DEFINED), ("思考", USER_DEFINED), ("<s>", CONTROL)])
    for special in (False, True):
        assert tokenizer.encode("a<think>思考", special=special) == [97, 256, 257]
    assert tokenizer.decode([256, 257, 258, 97], skip_special=True) == "<think>思考a"


def test_markers_typed_as_user_defined_are_control():
    others = [(text, USER_DEFINED) for text in ("<|", "<||>", "xyz|>", "<|xyz")]
    tokenizer = small([("<|fim_prefix|>", USER_DEFINED), *others])
    assert tokenizer.vocabulary.control == {"<|fim_prefix|>": 256}
    assert 256 not in tokenizer.encode("<|fim_prefix|>", special=False)
    assert tokenizer.encode("<|fim_prefix|>", special=True) == [256]


def test_no_merge_reaches_a_control_token():
    extra = [("ab", NORMAL), ("abc", CONTROL), ("bc", NORMAL)]
    tokenizer = small(extra, ["a b", "b c"])
    assert tokenizer.encode("abc", special=False) == [256, 99]
    assert tokenizer.encode("abc", special=True) == [257]
    # The last merge towards it is left out, however it is reached.
    tokenizer = small(extra, ["a b", "ab c"])
    assert tokenizer.encode("abc", special=False) == [256, 99]
    assert tokenizer.encode("abc", special=True) == [257]


def test_words_are_those_of_qwen2():
    # Seen in merges that would join what stands in two words; no vocabulary of Qwen's has them.
    extra = [(pair, NORMAL) for pair in ("12", "s!", "e\u0120", "\u00bfa")]
    tokenizer = small(extra, ["1 2", "s !", "e \u0120", "\u00bf a"])
    assert tokenizer.encode("12", special=False) == [*b"12"]
    assert tokenizer.encode("s!e s", special=False) == [*b"s!e s"]
    # U+017F is not the "s" of a contraction, so that it is in one word with what follows.
    assert tokenizer.encode("'\u017fa", special=False) == [39, 0xC5, 259]


def test_contractions_are_words_of_their_own():
    last = "sStTmMdDeElL"
    tokenizer = small([(c + "a", NORMAL) for c in last], [f"{c} a" for c in last])
    words = [*"sStTmMdD", *("re", "rE", "Re", "RE", "ve", "vE", "Ve", "VE", "ll", "lL", "Ll", "LL")]
    for word in words:
        assert tokenizer.encode(f"'{word}a", special=False) == [*f"'{word}a".encode()]


def test_the_first_of_two_equal_merges_counts():
    extra = [("ab", NORMAL), ("bc", NORMAL)]
    assert small(extra, ["b c", "a b", "b c"]).encode("abc", special=False) == [97, 257]


def test_beginning_of_sequence():
    extra = [("<s>", CONTROL)]
    keys = {"tokenizer.ggml.bos_token_id": 256, "tokenizer.ggml.add_bos_token": True}
    tokenizer = small(extra, **keys)
    assert tokenizer.encode("a", special=False) == [256, 97]
    assert tokenizer.encode("a", special=False, bos=False) == [97]
    assert small(extra, **{**keys, "tokenizer.ggml.add_bos_token": False}).encode(
        "a", special=False
    ) == [97]


@pytest.mark.parametrize("wrong", [-1, 151936, 2**31, 10**5000, "5", 1.0, None], ids=lambda _: "")
def test_ids_out_of_range_are_a_usage_error(qwen, wrong):
    for call in (qwen.token_bytes, lambda i: qwen.decode([i]), StreamDecoder(qwen).push):
        with pytest.raises(UsageError, match="token id: expected") as caught:
            call(wrong)
        assert len(str(caught.value)) < 100


@pytest.mark.parametrize("wrong", ["\ud800", "a\udfff", b"a", 5, None])
def test_what_is_not_text_is_a_usage_error(qwen, wrong):
    for special in (False, True):
        with pytest.raises(UsageError, match="text: expected"):
            qwen.encode(wrong, special=special)


TEXT = "a😁é"


@pytest.mark.parametrize("cuts", range(2 ** (len(TEXT.encode()) - 1)))
def test_streaming_gives_whole_characters_however_tokens_split_them(cuts):
    data = TEXT.encode()
    pieces, start = [], 0
    for end in range(1, len(data) + 1):
        if end == len(data) or cuts >> (end - 1) & 1:
            pieces.append(data[start:end])
            start = end
    character = {byte: c for c, byte in BYTE_OF_CHARACTER.items()}
    longer = [p for p in dict.fromkeys(pieces) if len(p) > 1]
    tokenizer = small([("".join(character[b] for b in p), NORMAL) for p in longer])
    ids = [256 + longer.index(p) if len(p) > 1 else p[0] for p in pieces]

    decoder, shown = StreamDecoder(tokenizer), ""
    for n, i in enumerate(ids, start=1):
        shown += decoder.push(i)
        so_far = b"".join(pieces[:n])
        assert shown == so_far.decode("utf-8", "ignore")  # all that is complete, nothing else
        cut_off = StreamDecoder(tokenizer)
        text = "".join([cut_off.push(i) for i in ids[:n]]) + cut_off.flush()
        assert text == tokenizer.decode(ids[:n]) == so_far.decode("utf-8", "replace")
    assert shown == TEXT
    assert decoder.flush() == ""


@FUZZ
@given(data=st.data())
def test_streaming_any_ids_gives_the_text_of_decode(sample, data):
    ids = data.draw(st.lists(st.integers(0, sample.vocab_size - 1) | st.integers(3, 260)))
    for skip in (False, True):
        decoder = StreamDecoder(sample, skip_special=skip)
        text = "".join([decoder.push(i) for i in ids]) + decoder.flush()
        assert text == sample.decode(ids, skip_special=skip)
        control = sample.vocabulary.control.values() if skip else ()
        whole = b"".join(sample.token_bytes(i) for i in ids if i not in control)
        assert text == whole.decode("utf-8", "replace")


def test_streaming_leaves_control_tokens_out_by_default(sample):
    decoder = StreamDecoder(sample)
    end = sample.vocabulary.control["<|im_end|>"]
    assert [decoder.push(i) for i in [*sample.encode("x", special=False), end]] == ["x", ""]


def test_threads_share_a_tokenizer(qwen):
    texts = [f"line {n} of <|im_end|> {chr(0x4E00 + n)}" * 20 for n in range(64)]
    alone = [qwen.encode(text, special=True) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda text: qwen.encode(text, special=True), texts)) == alone


@FUZZ
@given(text=TEXTS, data=st.data())
def test_parts_give_the_ids_of_the_whole(qwen, text, data):
    text += data.draw(TEXTS)
    whole = qwen.encode(text, special=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "PART", data.draw(st.integers(1, 8)))
        assert qwen.encode(text, special=False) == whole
        assert qwen.encode(text, special=True) == whole


@FUZZ
@given(text=st.lists(WORDS | CONTROL_PARTS | st.text(ANY_CHARACTER, max_size=9)).map("".join))
def test_a_long_text_gives_the_ids_of_a_short_one(qwen, text):
    ids = qwen.encode(text, special=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "ALONE", 0)
        assert qwen.encode(text, special=True) == ids


def test_other_threads_run_beside_a_long_text(sample):
    text, begun, ran, interval = "x" * 2**16, Event(), [], sys.getswitchinterval()
    thread = Thread(target=lambda: begun.wait(60) and ran.append(1))
    thread.start()
    try:
        sys.setswitchinterval(1e6)  # from here on only who lets go of the lock loses it
        begun.set()
        for _ in range(100):
            if not ran:
                sample.encode(text, special=False)
    finally:
        sys.setswitchinterval(interval)
    assert ran
    thread.join()


def test_special_tokens_are_not_cut(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "PART", 1)
    for token in ("a b", "x\ny", "<long token>", "\nab", "\n\nab", " a"):
        tokenizer = small([(token, USER_DEFINED)])
        for text in (f"q {token} {token}", f"q{token}{token}"):
            assert tokenizer.encode(text, special=False).count(256) == 2


def test_a_long_text_is_refused_once_it_is_too_long(qwen, monkeypatch):
    parts = []
    original = qwen._merge
    monkeypatch.setattr(qwen, "_merge", lambda part: parts.append(part) or original(part))
    text = "a word\n" * 1_000_000
    assert len(qwen.encode("a word\n" * 10, special=True, most=30)) == 30
    for most in (29, 100_000):
        with pytest.raises(UsageError, match=f"at most {most} tokens"):
            qwen.encode("a word\n" * 10 if most == 29 else text, special=True, most=most)
    assert sum(map(len, parts)) < len(text) / 5
    parts.clear()
    with pytest.raises(UsageError, match=r"at most 10 tokens .*, got at least 11$"):
        qwen.encode("x" * (10 * qwen._longest + 1), special=True, most=10)
    assert parts == []  # no token is that long


@pytest.mark.parametrize("text", [" " * 11_000_000, "\U0001f600" * 600_000, "x" * 3_000_000])
def test_a_text_that_cannot_be_cut_is_refused_before_work(qwen, text):
    with pytest.raises(UsageError, match="expected a space or a line break at least every 2097152"):
        qwen.encode(text, special=True)


def test_a_panic_of_the_library_is_a_usage_error(monkeypatch):
    # Eleven million spaces exhaust the steps that its regular expressions may take.
    monkeypatch.setattr(tokenizer_module, "MAX_UNBROKEN", 2**40)
    with pytest.raises(UsageError, match="the library gives up") as caught:
        small().encode(" " * 11_000_000, special=False)
    assert len(str(caught.value)) < 200
    assert str(caught.value).isprintable()


def test_long_runs_are_encoded(sample):
    for text in (" " * 50_000 + "x", "a" * 50_000, "\n \n" * 20_000, "!" * 50_000):
        assert sample.decode(sample.encode(text, special=True)) == text


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="tells no resident memory")
def test_texts_that_were_encoded_leave_no_memory(sample):
    """In several threads, as a server does: what a library keeps of each text adds up."""

    def encode(first):
        for i in range(first, first + 3000):
            sample.encode(f"def f{i}(self, {'argument, ' * 8}):", special=True)

    def resident():
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(encode, range(0, 12_000, 3000)))
        before = resident()
        list(pool.map(encode, range(12_000, 24_000, 3000)))
        assert resident() - before < 8 << 10  # KiB; every text was 5 KiB
