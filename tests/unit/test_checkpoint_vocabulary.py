"""tokenizer.json read as GGUF's tokenizer: its ids are those of the ``tokenizers`` package."""

import io
import json
import random
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from isobit.errors import ModelRefused
from isobit.model.checkpoint.vocabulary import _LLAMA3, _QWEN2, _QWEN35, vocabulary
from isobit.text.tokenizer import Tokenizer as Ours

TEXT = "def read_lines(path):\n    return [l for l in open(path)]\n\nnaïve café 123 don't\n"


@pytest.mark.parametrize("pattern", [_QWEN2, _QWEN35, _LLAMA3])
def test_ids_are_those_of_tokenizers(tmp_path: Path, pattern: str) -> None:
    theirs = Tokenizer(models.BPE(ignore_merges=pattern is _LLAMA3))
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([cut, level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    theirs.train_from_iterator([TEXT] * 3, trainer)
    theirs.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    theirs.save(str(tmp_path / "tokenizer.json"))
    size = theirs.get_vocab_size() + 3
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": size - 4}))
    ours = Ours.from_metadata(vocabulary(tmp_path, size), "folder")
    text = TEXT + "<|im_end|>\n"
    assert ours.encode(text, special=True) == theirs.encode(text).ids
    assert size - 4 in ours.stop_ids


@pytest.mark.parametrize("older", [True, False])
def test_pieces_are_those_of_tokenizers(tmp_path: Path, older: bool) -> None:
    """Llama 2's tokenizer.json: merges of characters and bytes for what is none of them, the space
    before a text as a normalizer or as a pre-tokenizer; BOS by a template."""
    rng = random.Random(3)
    words = ["".join(rng.choices("abcdeé", k=rng.randint(1, 7))) for _ in range(80)]
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("  ".join(rng.choices(words, k=6)) + " a  b" for _ in range(400)),
        model_writer=file,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    ids = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    merges = [  # as transformers makes them of a model of SentencePiece
        (text[:n], text[n:], -ids[text])
        for text in ids
        for n in range(1, len(text))
        if text[:n] in ids and text[n:] in ids and not text.startswith("<")
    ]
    merges.sort(key=lambda m: m[2], reverse=True)
    theirs = Tokenizer(
        models.BPE(ids, [m[:2] for m in merges], unk_token="<unk>", byte_fallback=True)
    )
    if older:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        theirs.normalizer = normalizers.Sequence(steps)
    else:
        theirs.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    theirs.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "</s>")])
    theirs.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", ids["<s>"])]
    )
    theirs.save(str(tmp_path / "tokenizer.json"))
    said = {"bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"]}
    (tmp_path / "config.json").write_text(json.dumps(said))
    ours = Ours.from_metadata(vocabulary(tmp_path, len(ids)), "folder")
    for _ in range(200):
        text = "".join(rng.choices([*words, " ", "  ", "\n", "工", "x", "a"], k=8))
        if older or not text.startswith(" "):  # before a space "first" puts none
            assert ours.encode(text, special=False) == theirs.encode(text).ids, repr(text)
    assert ours.encode("ab", special=False) == [ids["<s>"], *pieces.encode("ab")]


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for content in ("{}", "[]", "no JSON", '{"model": {"type": "Unigram"}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ModelRefused, match=r"tokenizer\.json"):
            vocabulary(tmp_path, 10)


def byte_level(folder: Path, **changed: object) -> Path:
    """A tokenizer.json of 256 bytes and <|im_end|>, with some of it changed."""
    theirs = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(_QWEN2), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([cut, level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    theirs.train_from_iterator(
        [], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False)
    )
    theirs.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(theirs.to_str()) | changed))
    return folder


def test_a_normalizer_that_is_not_known_is_refused(tmp_path: Path) -> None:
    nfc, lower = {"type": "NFC"}, {"type": "Lowercase"}
    for known in (None, nfc, {"type": "Sequence", "normalizers": [nfc]}):
        assert vocabulary(byte_level(tmp_path, normalizer=known), 257)
    for other in (lower, {"type": "Sequence", "normalizers": [nfc, lower]}):
        with pytest.raises(ModelRefused, match=r"normalizer: expected one .*, got 'Lowercase'"):
            vocabulary(byte_level(tmp_path, normalizer=other), 257)


def test_processors_in_processors_are_refused_in_one_line(tmp_path: Path) -> None:
    text = (byte_level(tmp_path, post_processor="here") / "tokenizer.json").read_text()
    for n in (50, *range(300, 500, 10)):  # some are more than Python follows, but are JSON to it
        nested = '{"type": "Sequence", "processors": [' * n + "null" + "]}" * n
        (tmp_path / "tokenizer.json").write_text(text.replace('"here"', nested))
        try:
            assert vocabulary(tmp_path, 257)
        except ModelRefused:
            assert n > 50


def test_more_rows_than_a_vocabulary_has_are_refused_before_work(tmp_path: Path) -> None:
    """A file without content may be large: its rows were made tokens one by one."""
    with pytest.raises(ModelRefused, match="expected at most 4194304, got 8388608"):
        vocabulary(byte_level(tmp_path), 1 << 23)


def test_a_wrong_id_is_shown_in_short(tmp_path: Path) -> None:
    for wrong in ("x" * 10_000, [["x"] * 1000] * 100, 2**70):
        token = {"content": "<x>", "special": True, "id": wrong}
        with pytest.raises(ModelRefused, match="id of '<x>': expected 0 to 256") as refused:
            vocabulary(byte_level(tmp_path, added_tokens=[token]), 257)
        assert len(str(refused.value)) < 200 + len(str(tmp_path))


def test_chat_templates_wherever_they_stand(tmp_path: Path) -> None:
    def found() -> tuple[object, object]:
        said = vocabulary(tmp_path, 257)
        return tuple(said.get(f"tokenizer.chat_template{k}") for k in ("", ".tool_use"))

    config = byte_level(tmp_path) / "tokenizer_config.json"
    assert found() == (None, None)
    config.write_text(json.dumps({"chat_template": "plain"}))
    assert found() == ("plain", None)
    both = [{"name": name, "template": f"{name}!"} for name in ("default", "rag", "tool_use")]
    config.write_text(json.dumps({"chat_template": [5, {}, *both]}))
    assert found() == ("default!", "tool_use!")
    (tmp_path / "chat_template.jinja").write_text("file")
    assert found() == ("file", None)  # of transformers' own, these alone
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert found() == ("file", "tools")
