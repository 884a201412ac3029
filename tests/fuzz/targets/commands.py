"""Command lines of options that there are and values that make little sense."""

import functools
import io
import os
import random
import sys

from isobit.cli import COMMANDS, main, options_of
from tests.fuzz.targets.models import bases, folder

CODES = {0, 1, 2, 3, 4, 5, 6, 130, 141}
ENDLESS = {"contract check", "bench", "accuracy", "ablate", "verify", "perplexity", "pull", "serve"}
VALUES = [
    *(
        "",
        "-1",
        "0",
        "1",
        "2",
        "3",
        "1e9",
        "nan",
        "inf",
        "9" * 30,
        "x",
        "é",
        "\x1b[0m",
        "a b",
        "{",
        "-",
    ),
    *(
        "1,2,3",
        "1,,2",
        "999999",
        "cpu",
        "reference",
        "nosuch",
        "auto",
        "all",
        "0..1",
        "f64",
        "\udcff",
    ),
]
INSIDE = ("validate", "lint", "status", "schema", "amend")


@functools.cache
def files() -> list[str]:
    model, text, empty = (folder() / name for name in ("m.gguf", "p.txt", "empty"))
    model.write_bytes(bases()[0].bytes())
    text.write_text("def f(x):\n    return x\n")
    empty.touch()
    binary = folder() / "binary"
    binary.write_bytes(bytes(range(256)))
    pipe = folder() / "pipe"
    if not pipe.exists():
        os.mkfifo(pipe)
    paths = [str(p) for p in (model, text, empty, binary, folder())]
    return [*paths, str(model), str(model), "nosuch", "/nosuch/x", "a\0b", "x" * 300]


def argv(rng: random.Random) -> list[str]:
    command = rng.choice([c for c in COMMANDS if c not in ENDLESS])
    words = [command]
    if command == "contract":
        words.append(rng.choice(INSIDE))
    options = sorted(options_of(" ".join(words)) or [])
    words += [rng.choice(files()) for _ in range(rng.choice([0, 1, 1, 2]))]
    if "--tokens" in options and rng.random() < 0.7:
        words += ["--tokens", "1,2,3"]
    if "--max-tokens" in options:
        words += ["-n", "2"]
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        if options:
            words.append(rng.choice(options))
            words += [rng.choice([*VALUES, *files()])] if rng.random() < 0.9 else []
    return words


def one(rng: random.Random) -> str:
    words = argv(rng)
    os.chdir(folder())
    kept = sys.stdin, sys.stdout, sys.stderr
    err = io.StringIO()
    typed = io.TextIOWrapper(io.BytesIO(rng.choice([b"", b"hi\n", b"\xff"])))
    sys.stdin, sys.stdout, sys.stderr = typed, io.StringIO(), err
    try:
        code = main(words)
    finally:
        sys.stdin, sys.stdout, sys.stderr = kept
    said = err.getvalue()
    assert code in CODES and "Traceback" not in said, f"{code} {words} {said[-300:]}"
    assert code == 0 or said, f"{code} {words} without a word"
    return f"exit {code}"
