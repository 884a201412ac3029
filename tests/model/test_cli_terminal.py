"""Commands in a terminal, which draw bars on stderr, and whose tables are as wide as it is."""

import re
from pathlib import Path

import pytest

from tests.helpers.command import in_terminal

CONTRACT = Path(__file__).parents[2] / "contracts/qwen3-moe-forward-v1.yaml"
PROMPTS = '[17]\n"def fibonacci(n): return 42\\n"\n'
ONE = ["--tokens", "605,290"]
CPU = ["--backend", "cpu"]  # to look for GPUs takes longer than most of these
COMMANDS = [
    (["run", *ONE, *CPU, "-n", "4"], "prefill"),
    (["inspect"], "Q4_K"),
    (["tokenize", "-p", "import os"], "702"),
    (["devices"], "reference"),
    (["contract", "status", str(CONTRACT)], "obligation"),
    (["bench", *CPU, "-p", "16", "-n", "4", "-r", "1"], "pp16"),
    (["trace", *ONE, *CPU, "-o", "x.trace"], "wrote"),
    (
        [
            "verify",
            *ONE,
            "--activation-bits",
            "8",
            "--against-activation-bits",
            "16",
            "--min-cosine",
            "0.9",
        ],
        "post_attn_residual",
    ),
    (["verify", "--prompts", "prompts.txt", "--against", "oracle"], "prompt 1"),
    (["ablate", *ONE, "--stage", "qkv_matmul=f64"], "specification"),
    (["ablate", *ONE, "--rank", "--layers", "0..1"], "stage alone"),
    (["accuracy", "--text", "prompts.txt", "--activation-bits", "16"], "KL"),
    (["perplexity", *CPU, "--text", "prompts.txt"], "perplexity"),
]
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text(PROMPTS)


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
        ["bench", *CPU, "-p", "16", "-n", "4", "-r", "1", "-o", "json"],
        ["run", *ONE, *CPU, "-n", "4", "--jsonl"],
    ],
)
def test_what_is_sent_to_a_file_is_not_on_the_terminal(args: list[str], tmp_path: Path) -> None:
    """While a bar is drawn, or was."""
    code, shown = in_terminal(args, 80, tmp_path / "out")
    assert code == 0, shown
    result = (tmp_path / "out").read_text()
    assert result.strip()
    assert not [line for line in result.splitlines() if len(line) > 8 and line in shown]
