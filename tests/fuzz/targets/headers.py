"""Changed headers: inspected, and their tokenizer tried."""

import os
import random

from isobit.gguf.reader import GGUFFile
from isobit.inspect import inspect
from isobit.text.tokenizer import Tokenizer
from tests.fuzz.targets.models import changed, folder

TEXT = "def f(x):\n    return <|im_end|> x <think> é𝔘"


def one(rng: random.Random) -> str:
    path = folder() / f"{os.getpid()}.gguf"
    path.write_bytes(changed(rng))
    found = inspect(path)
    for line in found.refused:
        assert len(line) < 1000 and "\n" not in line, f"a refusal of {len(line)} characters"
    with GGUFFile.open(path, strict=False) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata, "m.gguf")
    tokenizer.decode(tokenizer.encode(TEXT, special=True))
    assert tokenizer.decode(tokenizer.encode(TEXT, special=False, bos=False)) == TEXT
    return "inspected, refused" if found.refused else "inspected"
