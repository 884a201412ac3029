"""Makes tests/data/vocabulary-excerpts.json: what real vocabularies make of some texts.

An excerpt holds the tokens and merges that can play a part in these texts and no others, so that
it gives the same ids as the whole. The ids are not made here: they are the vectors that llama.cpp
publishes beside a vocabulary, or what the ``tokenizers`` library makes with a tokenizer.json.

usage: python -m tests.unit.record_excerpts TEXTS.inp SOURCE...
SOURCE: NAME=VOCABULARY.gguf (with .inp and .out beside it), or NAME:PRE=tokenizer.json
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import tokenizers

from isobit.gguf.reader import GGUFFile
from isobit.text.pretokenizers import SPACE
from isobit.text.tokenizer import Tokenizer
from isobit.text.vocabulary import BYTE_OF_CHARACTER, BYTE_OF_TEXT

FILE = Path(__file__).parents[1] / "data" / "vocabulary-excerpts.json"
LONGEST = 32  # characters of a token that is looked for


def main(inputs: Path, *sources: str) -> None:
    texts = _texts(inputs)
    excerpts = {}
    for source in sources:
        name, _, path = source.partition("=")
        name, _, pre = name.partition(":")
        metadata, ids = _of_json(Path(path), pre, texts) if pre else _of_gguf(Path(path), texts)
        excerpts[name] = excerpt(metadata, texts) | {"ids": ids}
    FILE.write_text(_lines({"texts": texts, "vocabularies": excerpts}), "utf-8")


def _texts(path: Path) -> list[str]:
    return path.read_bytes().decode().split("\n__ggml_vocab_test__\n")


def _of_gguf(path: Path, texts: Iterable[str]) -> tuple[dict[str, object], list[list[int] | None]]:
    with GGUFFile.open(path, strict=False) as file:
        metadata = dict(file.metadata)
    lines = Path(f"{path}.out").read_text().split("\n")
    ids = [[int(i) for i in line.split()] for line in lines]
    published = dict(zip(_texts(Path(f"{path}.inp")), ids, strict=False))
    return metadata, [published.get(text) for text in texts]


def _of_json(
    path: Path, pre: str, texts: Iterable[str]
) -> tuple[dict[str, object], list[list[int] | None]]:
    model = json.loads(path.read_text("utf-8"))["model"]
    theirs = tokenizers.Tokenizer.from_file(str(path))
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    assert [model["vocab"][t] for t in tokens] == list(range(len(tokens)))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(tokens),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": False,
    }
    return metadata, [theirs.encode(text, add_special_tokens=False).ids for text in texts]


def excerpt(metadata: dict[str, object], texts: Iterable[str]) -> dict[str, object]:
    whole = Tokenizer.from_metadata(metadata, "whole").vocabulary
    words: set[str] = set()
    for text in texts:
        if whole.words is None:
            words.add(SPACE + text.replace(" ", SPACE))
        else:
            cutter = whole.words.build({}, [])
            normal = cutter.normalizer.normalize_str(text) if cutter.normalizer else text
            words |= {word for word, _ in cutter.pre_tokenizer.pre_tokenize_str(normal)}
    parts = {
        word[i:j]
        for word in words
        for i in range(len(word))
        for j in range(i + 1, min(len(word), i + LONGEST) + 1)
    }
    parts |= BYTE_OF_CHARACTER.keys() | BYTE_OF_TEXT.keys()
    kept = [i for i, text in enumerate(whole.tokens) if text in parts]
    made: dict[str, object] = {
        "model": metadata["tokenizer.ggml.model"],
        "pre": metadata.get("tokenizer.ggml.pre"),
        "tokens": {whole.tokens[i]: i for i in kept},
    }
    if whole.words:
        made["merges"] = [" ".join(pair) for pair in whole.merges if "".join(pair) in parts]
    else:
        made["scores"] = [whole.scores[i] for i in kept]
    return made


def _lines(value: dict[str, object]) -> str:
    """JSON with a line for each part, so that a change of one can be seen."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for key in ('"vocabularies"', '"tokens"', '"merges"', '"scores"', '"ids"'):
        text = text.replace(f",{key}", f",\n{key}")
    return text.replace('},"', '},\n"') + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
