"""What was measured before Ctrl-C is shown, and how far it came."""

from collections.abc import Callable
from pathlib import Path

import pytest

from isobit.cli import accuracy as accuracy_command
from isobit.cli import main
from isobit.cli import verify as verify_command
from isobit.contracts import check
from isobit.verify import accuracy
from isobit.verify.ablate import Ablation

CONTRACT = Path(__file__).parents[2] / "contracts/qwen3-moe-forward-v1.yaml"


def stopping(function: Callable[..., object], after: int) -> Callable[..., object]:
    """The function, until Ctrl-C comes in its place."""
    calls = iter(range(after))

    def called(*args: object, **how: object) -> object:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return function(*args, **how)

    return called


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_ranking(
    after: int,
    small_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Ablation, "alone", stopping(Ablation.alone, after))
    assert main(["ablate", str(small_model), "--tokens", "60,29", "--rank"]) == 130
    out, err = capsys.readouterr()
    assert len([line for line in out.splitlines() if line.startswith("|")]) == 4 + after
    assert "specification, experts pinned" in out
    assert f"interrupted after {after} of 21 runs" in err


def test_prompts_of_verify(
    tmp_path: Path,
    small_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("[17]\n[60, 29]\n[2]\n")
    for after in (2, 0):
        monkeypatch.setattr(verify_command, "verify", stopping(verify_command.verify, after))
        assert main(["verify", str(small_model), "--prompts", str(prompts)]) == 130
        out, err = capsys.readouterr()
        assert out.count(" of 37 |") == after  # stages
        assert (f"interrupted after {after} of 3 prompts" in err) is (after > 0)
        monkeypatch.undo()


def test_accuracy(
    tmp_path: Path,
    small_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "text"
    text.write_text("def f(x):\n    return x\n" * 20)
    argv = ["accuracy", str(small_model), "--text", str(text), "--activation-bits", "16"]
    argv += ["--window", "16", "--limit", "64"]
    monkeypatch.setattr(accuracy, "side_by_side", stopping(accuracy.side_by_side, 2))
    assert main(argv) == 130
    out, err = capsys.readouterr()
    assert "| cpu, 16 bits |     32 |" in out
    assert "interrupted after 32 of 64 tokens" in err
    monkeypatch.setattr(accuracy_command, "_show", pytest.fail)  # nothing to show
    monkeypatch.setattr(accuracy, "side_by_side", stopping(accuracy.side_by_side, 0))
    assert main(argv) == 130


def test_a_contract_s_evidence_is_whole_or_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "take", stopping(check.take, 1))
    argv = ["contract", "check", str(CONTRACT), "--evidence", str(tmp_path / "evidence")]
    assert main(argv) == 130
    out, err = capsys.readouterr()
    assert out.count("passed ") == 1
    assert "interrupted while cpu was measured, of which none is kept" in err
    assert not list((tmp_path / "evidence").glob("*"))
