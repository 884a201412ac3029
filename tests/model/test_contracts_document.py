"""docs/contracts.md: every command in it, and every line that it shows."""

import re
from pathlib import Path

import pytest

from tests.helpers.page import run_page

DOCUMENT = Path(__file__).parents[2] / "docs/contracts.md"


def test_writing_one_from_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_page(DOCUMENT, capsys) > 30
    assert "discharged" in Path("status.html").read_text("utf-8")
    assert not list(tmp_path.glob("*.part"))


def test_every_kind_and_figure_is_in_the_table() -> None:
    from isobit.contracts.kinds import FIGURES  # noqa: PLC0415

    text = DOCUMENT.read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) \|$", text, re.MULTILINE)
    assert {k: re.findall(r"`(\w+)`", f) for k, f in rows} == {k: [*f] for k, f in FIGURES.items()}
