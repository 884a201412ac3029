"""Contracts: YAML changed line by line, read, judged and shown."""

import functools
import random
import re
import tempfile
from pathlib import Path

from isobit.cli import options_of
from isobit.contracts import document, findings, lint, validate

HOME = Path(__file__).parents[3] / "contracts"
SCALARS = [
    *("", "~", "true", "no", "0", "-1", "1e999", "-.inf", ".nan", "9" * 19, "9" * 5000, "0x10"),
    *("2026-02-30", "0000-00-00", '"\\ud800"', '"\\x00"', '"\\e[31m"', "*a", "&a x", "&a [*a]"),
    *("!!python/object/apply:os.system [true]", "!!binary aGk=", "!foo bar", "{}", "[]", "[[]]"),
    *("{a: {b: 1}}", "|\n  x\n", "- x", "? a\n: b", "1.0.0", '"01.00.0"', "DRAFT", "parity", "cpu"),
    *("[reference, cpu]", "tests/x.d::test_a", "tests/" + "a" * 300 + ".py", "a/" * 3000 + "b.py"),
    *("../../etc/passwd.txt", "isobit run --nosuch", "isobit run 'unclosed", "é\u0301", "\u2028"),
    *("AC_QW3_MOE_001..999999999", "all " + "9" * 5000 + " tests", "(" * 3000, "a" * 100_000),
    *("(A" + "-A" * 3000 + ")", "x/" + "." * 5000 + "b", "%s%n", "<script>|x", "{at_most: .nan}"),
]
DEEP = [5, 31, 32, 33, 1000, 100_000]


@functools.cache
def folder() -> Path:
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    (root / "pyproject.toml").touch()
    (root / "tests" / "x.d").mkdir(parents=True)
    (root / "contracts").mkdir()
    return root


@functools.cache
def originals() -> list[str]:
    return [path.read_text() for path in sorted(HOME.glob("*.yaml"))]


def thinned(rng: random.Random, text: str) -> str:
    """A contract with few items in each list: it is read and judged several times as fast."""
    kept: list[str] = []
    dropped: int | None = None  # the indentation of an item whose lines are left out
    for line in text.split("\n"):
        indent = len(line) - len(line.lstrip())
        if dropped is not None and (not line.strip() or indent > dropped):
            continue
        dropped = None
        if line.lstrip().startswith("- ") and not kept[-1].endswith(":") and rng.random() < 0.8:
            dropped = indent
        else:
            kept.append(line)
    return "\n".join(kept)


def change(rng: random.Random, text: str) -> str:
    lines = text.split("\n")
    i = rng.randrange(len(lines))
    match rng.randrange(12):
        case 0 | 1 | 2 | 3 | 4:
            keys = [k for k, line in enumerate(lines) if re.match(r"\s*(- )?[\w_]+:", line)]
            if keys:
                k = rng.choice(keys)
                start = re.match(r"\s*(?:- )?[\w_]+:", lines[k])
                lines[k] = f"{start[0]} " + rng.choice(SCALARS) if start else lines[k]
        case 5:
            del lines[i : i + rng.choice([1, 1, 30])]
        case 6:
            lines[i:i] = lines[rng.randrange(len(lines)) :][: rng.randrange(40)]
        case 7:
            lines[i] = " " * rng.randrange(9) + lines[i].lstrip()
        case 8:
            n = rng.choice(DEEP)
            lines.insert(i, rng.choice(["x: " + "[" * n, "x: " + "{a: " * n, "- " * n + "x"]))
        case 9:
            at = rng.randrange(len(text) + 1)
            odd = ["\0", "\ufeff", "\x85", "\u2028", "\r", "\t", "'", '"', "{", "&a", "*a", "---\n"]
            return text[:at] + rng.choice(odd) + text[at + rng.randrange(3) :]
        case 10:
            return text[: rng.randrange(len(text) + 1)]
        case _:
            return rng.choice(
                [text + "\n---\n" + text, text + "dup: 1\n" * 3000, "\n" * 9999 + text]
            )
    return "\n".join(lines)


def one(rng: random.Random) -> str:
    text = rng.choice(originals())
    text = thinned(rng, text) if rng.random() < 0.95 else text
    for _ in range(rng.choice([1, 1, 2, 3])):
        text = change(rng, text)
    path = folder() / "contracts" / "c-v1.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    read = document.read(path)
    contract = validate.validate(read)
    if contract is not None:
        lint.lint(read, contract, options_of)
    for shown in (findings.text(read.findings), findings.to_json(read.findings)):
        assert "\x1b" not in str(shown), "an escape in the findings"
    assert contract is not None or read.findings, "neither a contract nor a finding"
    return "a contract" if contract is not None else "findings"
