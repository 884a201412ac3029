"""Commands in a terminal, which draw bars on stderr, and whose tables are as wide as it is."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest

PROMPTS = '[17]\n"def fibonacci(n): return 42\\n"\n'
ONE = ["--tokens", "605,290"]
COMMANDS = [
    (["run", *ONE, "-n", "4"], "prefill"),
    (["inspect"], "Q4_K"),
    (["tokenize", "-p", "import os"], "702"),
    (["devices"], "reference"),
    (["bench", "-p", "16", "-n", "4", "-r", "1"], "pp16"),
    (["trace", *ONE, "-o", "x.trace"], "wrote"),
    (["verify", *ONE, "--planes", "1", "--against-planes", "2", "--min-cosine", "0.9"], "faulty"),
    (["verify", "--prompts", "prompts.txt", "--against", "oracle"], "prompt 1"),
    (["ablate", *ONE, "--stage", "qkv_matmul=f64"], "specification"),
    (["ablate", *ONE, "--rank", "--layers", "0..1"], "stage alone"),
    (["accuracy", "--text", "prompts.txt", "--planes", "2"], "KL"),
    (["perplexity", "--text", "prompts.txt"], "perplexity"),
]
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text(PROMPTS)


def in_terminal(args: list[str], width: int, stdout: Path | None = None) -> tuple[int, str]:
    """A command's exit code and what it shows in a terminal ``width`` columns wide.

    With ``stdout``, that is a file and only stderr is the terminal.
    """
    control, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    shown: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(control, 1 << 16):
                shown.append(data)
        except OSError:  # the other side is closed
            return

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with open(stdout or os.devnull, "wb") as file:  # noqa: PTH123
            done = subprocess.run(
                [sys.executable, "-m", "isobit", *args],
                stdin=subprocess.DEVNULL,
                stdout=file if stdout else terminal,
                stderr=terminal,
                env=os.environ | {"TERM": "xterm", "COLUMNS": ""},
                timeout=120,
                check=False,
            )
    finally:
        os.close(terminal)
        reader.join(60)
        os.close(control)
    assert not reader.is_alive(), "the terminal is still held open"
    return done.returncode, b"".join(shown).decode()


@pytest.mark.parametrize(("args", "expected"), COMMANDS, ids=[c[0][0] for c in COMMANDS])
def test_a_command_in_a_narrow_terminal(args: list[str], expected: str) -> None:
    code, shown = in_terminal(args, 60)
    assert code == 0, shown
    assert "Traceback" not in shown
    text = _ESCAPE.sub("", shown)
    assert expected in text
    rules = [line for line in text.replace("\r", "\n").split("\n") if "──" in line]
    assert all(len(line) <= 60 for line in rules), rules


@pytest.mark.parametrize(
    "args",
    [
        ["verify", *ONE],
        ["verify", *ONE, "--json"],
        ["verify", "--prompts", "prompts.txt", "--json"],
        ["ablate", *ONE, "--stage", "qkv_matmul=f64", "--json"],
        ["bench", "-p", "16", "-n", "4", "-r", "1", "-o", "json"],
        ["run", *ONE, "-n", "4", "--jsonl"],
    ],
)
def test_what_is_sent_to_a_file_is_not_on_the_terminal(args: list[str], tmp_path: Path) -> None:
    """While a bar is drawn, or was."""
    code, shown = in_terminal(args, 80, tmp_path / "out")
    assert code == 0, shown
    result = (tmp_path / "out").read_text()
    assert result.strip()
    assert not [line for line in result.splitlines() if len(line) > 8 and line in shown]
