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
