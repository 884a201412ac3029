"""docs/contracts.md: every command in it, and every line that it shows."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from isobit.cli import main

DOCUMENT = Path(__file__).parents[2] / "docs/contracts.md"


def test_writing_one_from_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = DOCUMENT.read_text("utf-8")
    [contract] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    Path("router-v1.yaml").write_text(contract)
    shown = 0
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, *lines = part.rstrip("\n").split("\n")
            argv = shlex.split(command)
            if argv[0] == "sed":
                subprocess.run(argv, check=True)
                continue
            assert argv[0] == "isobit"
            expected = 0
            if lines and (code := re.fullmatch(r"\[exit code (\d)\]", lines[-1])):
                expected = int(code[1])
                lines.pop()
            assert main(argv[1:]) == expected, command
            out = " ".join(capsys.readouterr().out.split())
            for line in lines:
                assert " ".join(line.split()) in out, f"{command}: {line}"
                shown += 1
    assert shown > 15
    assert "discharged" in Path("status.html").read_text("utf-8")
    assert not list(tmp_path.glob("*.part"))


def test_every_kind_and_figure_is_in_the_table() -> None:
    from isobit.contracts.measures import FIGURES  # noqa: PLC0415

    text = DOCUMENT.read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) \|$", text, re.MULTILINE)
    assert {k: re.findall(r"`(\w+)`", f) for k, f in rows} == {k: [*f] for k, f in FIGURES.items()}
