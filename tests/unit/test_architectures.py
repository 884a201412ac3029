"""An architecture is one file, and something finds its graph wrong that does not walk it."""

import re
from pathlib import Path

import pytest

import isobit
from isobit.model.architectures import ARCHITECTURES

SOURCE, TESTS = Path(isobit.__file__).parent, Path(__file__).parents[1] / "model"
TOKENIZERS = {"text/pretokenizers.py", "text/vocabulary.py", "model/checkpoint/vocabulary.py"}
"""Where the same names are those of tokenizers."""


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    files = (p for p in SOURCE.rglob("*.py") if p.is_file())
    return {p.relative_to(SOURCE).as_posix(): p.read_text("utf-8") for p in files}


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_one_file_knows_its_name(name: str, sources: dict[str, str]) -> None:
    naming = {path for path, text in sources.items() if re.search(rf"[\"']{name}[\"']", text)}
    (path,) = naming - TOKENIZERS
    assert path.startswith("model/architectures/")


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_an_independent_forward_pass_in_float64(name: str) -> None:
    """transformers' own, or one that is written by hand: a test that names the architecture."""
    asked = (p.read_text("utf-8") for p in TESTS.glob("test_*.py"))
    oracles = [text for text in asked if re.search(r"def test_\w*(in_float64|oracle)", text)]
    assert any(re.search(rf"\b{name}\b", text) for text in oracles)
