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


def in_float64(name: str) -> set[str]:
    """Files with such a test that say an architecture's name: as a string, since prose and other
    projects have such names too."""
    files = {p.name: p.read_text("utf-8") for p in TESTS.glob("test_*.py")}
    return {
        path
        for path, text in files.items()
        if re.search(r"def test_\w*in_float64", text) and re.search(rf"[\"']{name}[\"']", text)
    }


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_an_independent_forward_pass_in_float64(name: str) -> None:
    """transformers' own, or one that is written by hand: a test that names the architecture."""
    assert in_float64(name)


def test_a_mention_is_not_enough() -> None:
    assert in_float64("llama") == {"test_llama.py"}
