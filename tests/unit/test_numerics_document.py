"""The document and the code name the same constants."""

import re
from pathlib import Path

import isobit.numerics

DOCUMENT = Path(__file__).parents[2] / "docs/numerics.md"
PATTERN = re.compile(r"0x[0-9a-f]{8,16}")


def test_constants() -> None:
    """Some are too small in effect for a comparison of results to see their last bit."""
    document = set(PATTERN.findall(DOCUMENT.read_text().lower()))
    sources = Path(isobit.numerics.__file__).parent.glob("*.py")
    code = {c for path in sources for c in PATTERN.findall(path.read_text().lower())}
    others = {"0x7fffffff", "0x7f800000", "0x3f800000"}  # all but the sign; infinity; 1
    assert len(document) == 24
    assert code - others == document


def test_version() -> None:
    text = DOCUMENT.read_text()
    assert f"# Numerics, version {isobit.numerics.VERSION}\n" in text
    assert f"(sampling, version {isobit.numerics.SAMPLING_VERSION})\n" in text
