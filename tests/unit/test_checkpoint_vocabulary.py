"""tokenizer.json read as GGUF's tokenizer: its ids are those of the ``tokenizers`` package."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers

from isobit.errors import ModelRefused
from isobit.model.checkpoint.vocabulary import _QWEN2, _QWEN35, vocabulary
from isobit.text.tokenizer import Tokenizer as Ours

TEXT = "def read_lines(path):\n    return [l for l in open(path)]\n\nnaïve café 123 don't\n"


@pytest.mark.parametrize("pattern", [_QWEN2, _QWEN35])
def test_ids_are_those_of_tokenizers(tmp_path: Path, pattern: str) -> None:
    theirs = Tokenizer(models.BPE())
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


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for content in ("{}", "[]", "no JSON", '{"model": {"type": "Unigram"}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ModelRefused, match=r"tokenizer\.json"):
            vocabulary(tmp_path, 10)
