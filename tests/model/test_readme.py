"""What the README shows works as it stands there."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    [example] = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(example, names)
    assert names["logits"].shape == (len(names["ids"]), 8192)
    assert capsys.readouterr().out.strip()


def test_links_lead_somewhere() -> None:
    for document in (README, *README.parent.glob("*.md"), *README.parent.glob("docs/*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if not target.startswith("https://"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_tables_are_whole() -> None:
    """A blank line would end one, and the rows after it would be text."""
    for block in re.findall(r"(?:^\|.*\n)+", README.read_text(), re.MULTILINE):
        header, rule, *rows = block.splitlines()
        assert re.fullmatch(r"\|(?::?-+:?\|)+", rule), header
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in (header, rule, *rows)}
        assert len(cells) == 1, header


def test_tokens_are_the_samples() -> None:
    [example] = re.findall(r"--tokens ([\d,]+)", README.read_text())
    assert all(int(token) < 8192 for token in example.split(","))
