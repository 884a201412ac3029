"""docs/your-kernel.md runs as it stands there; functions that are wrong are one line each."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isobit.cli import main
from tests.helpers.page import run_page

DOCUMENT = Path(__file__).parents[2] / "docs/your-kernel.md"
Out = pytest.CaptureFixture[str]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("mine", None)


def test_the_page(home: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, compare = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)
    Path("mine.py").write_text(mine, "utf-8")
    assert run_page(DOCUMENT, capsys) == 2
    monkeypatch.syspath_prepend(home)
    names: dict[str, Any] = {}
    exec(compile(compare, DOCUMENT.name, "exec"), names)
    assert 0 < names["differing"] < names["right"].size


FUNCTIONS = """
import numpy as np
value = 1
def norm(weight, x): x[:] = 0; return x
def shape(gate, up): return gate[:1]
def double(gate, up): return gate.astype(float)
def none(gate, up): pass
def raises(gate, up): raise KeyError("oh")
def two(gate, up): return gate, up
def exits(gate, up): raise SystemExit(0)
"""


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("mine:shape", "expected STAGE=MODULE:FUNCTION"),
        ("moe_expert_swiglu=absent_module:f", "No module named 'absent_module'"),
        ("moe_expert_swiglu=mine:absent", "has no attribute 'absent'"),
        ("moe_expert_swiglu=mine:value", "expected a function, got int"),
        ("moe_expert_swigl=mine:shape", "did you mean 'moe_expert_swiglu'?"),
        ("moe_expert_swiglu=mine:shape", "expected float32 of shape (2, 4, 256), got float32 of"),
        ("moe_expert_swiglu=mine:double", "got float64 of"),
        ("moe_expert_swiglu=mine:none", "got NoneType of"),
        ("moe_expert_swiglu=mine:raises", "the function raised KeyError: 'oh'"),
        ("moe_expert_swiglu=mine:two", "expected 1 arrays, got 2"),
        ("moe_expert_swiglu=mine:exits", "the function raised SystemExit: 0"),
        ("moe_expert_swiglu=script:exits", "script:exits: loading it raised SystemExit: 0"),
    ],
)
def test_mistakes(text: str, complaint: str, home: Path, capsys: Out) -> None:
    Path("mine.py").write_text(FUNCTIONS, "utf-8")
    Path("script.py").write_text(FUNCTIONS + "raise SystemExit(0)\n", "utf-8")
    assert main(["verify", "--tokens", "5,6", "--op", text]) == 2
    err = capsys.readouterr().err
    assert complaint in err
    assert err.count("\n") == 1


def test_a_function_gets_weights_and_cannot_change_what_others_see(home: Path, capsys: Out) -> None:
    Path("mine.py").write_text(FUNCTIONS, "utf-8")
    assert main(["verify", "--tokens", "5,6", "--op", "final_norm=mine:norm"]) == 1
    assert "replay: faulty final_norm; " in capsys.readouterr().out
