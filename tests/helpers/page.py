"""Running a page of the documentation: its files, its commands, and every line that it shows."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from isobit.cli import main


def run_page(page: Path, capsys: pytest.CaptureFixture[str]) -> int:
    """Run a page's commands in the current folder, each with the output the one before left.

    A block of text or YAML becomes the file that is named last before it. A line shown must stand
    in what the command prints, apart from spaces; "[exit code N]" at the end says how it ends, 0
    otherwise. Returns the number of lines that were compared.
    """
    shown = before = 0
    text = page.read_text("utf-8")
    for block in re.finditer(r"```(\w+)\n(.*?)```", text, re.DOTALL):
        words, before = text[before : block.start()], block.end()
        if block[1] in ("text", "yaml"):
            name = re.findall(r"`([\w-]+\.(?:txt|yaml))`", words)[-1]
            Path(name).write_text(block[2], "utf-8")
        if block[1] != "console":
            continue
        for part in re.split(r"^\$ ", block[2], flags=re.MULTILINE)[1:]:
            command, *lines = part.rstrip("\n").split("\n")
            argv = [
                a[1:].replace("\\n", "\n") if a.startswith("$") else a for a in shlex.split(command)
            ]
            if argv[0] == "sed":
                subprocess.run(argv, check=True)
                continue
            assert argv[0] == "isobit"
            expected = 0
            if lines and (code := re.fullmatch(r"\[exit code (\d)\]", lines[-1])):
                expected = int(code[1])
                lines.pop()
            capsys.readouterr()
            code_found = main(argv[1:])
            captured = capsys.readouterr()
            out = " ".join(f"{captured.out} {captured.err}".split())
            assert code_found == expected, f"{command}\n{captured.err}"
            for line in lines:
                assert " ".join(line.split()) in out, f"{command}: {line}\n{captured.out}"
                shown += 1
    return shown
