"""The command line without a running model: arguments, mistakes, exit codes, output helpers."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from isobit.__main__ import loads_here
from isobit.backends import FallbackNote, NoGpuNote
from isobit.cli import COMMANDS, _parser, event_loop, main, options, sampling_options, tools
from isobit.cli.output import markdown, print_fitted, size, verdict_style, visible
from isobit.cli.run import show
from isobit.errors import NothingCompared
from isobit.verify.ablate import OWN

RUN = ["run", "--backend", "reference"]
X = [*RUN, "-p", "x"]


@pytest.mark.parametrize(
    ("argv", "code", "complaint"),
    [
        ([], 2, "COMMAND"),
        (["nothing"], 2, f"no such command: 'nothing'; there are {', '.join(COMMANDS)}; see"),
        (RUN, 2, "expected a prompt: -p TEXT, --prompt-file FILE or --tokens IDS"),
        (["rnu"], 2, "did you mean 'run'?; see isobit --help"),
        (["run", "Hello"], 2, "did you mean -p 'Hello'?"),
        ([*X, "--temp", "1"], 2, "did you mean --temperature?; see isobit run --help"),
        (["run", "--max-tokns", "3"], 2, "did you mean --max-tokens?"),
        (["run", "--top_k", "3"], 2, "did you mean --top-k?"),
        (["run", "--help-me"], 2, "did you mean --help?"),
        ([*X, "-ngl", "99"], 2, "no such option: -ngl (a model is on one device"),
        ([*X, "-m", "x.gguf"], 2, "no such option: -m (MODEL is written without"),
        ([*X, "-s", "3"], 2, "did you mean --seed?"),
        ([*X, "--colour"], 2, "no such option: --colour; see isobit run --help"),
        ([*X, "sample", "more"], 2, "got 'more' too"),
        (["contract", "chek", "x"], 2, "did you mean 'check'?; see isobit contract --help"),
        (["contract", "check", "--bakcends", "x"], 2, "did you mean --backends?"),
        (["run", "smaple", "-p", "x"], 3, "no such file: 'smaple'; did you mean 'sample'?"),
        (["run", "qwen3:30b", "-p", "x"], 3, "Ollama has pulled is ollama://qwen3:30b"),
        (["run", "a/b-GGUF", "-p", "x"], 3, "hub is hf://a/b-GGUF"),
        (["run", "https://a.org/c.gguf", "-p", "x"], 3, "'https://a.org/c.gguf'; download it"),
        ([*X, "--backend", "cdua"], 2, "did you mean 'cuda'?"),
        (["trace", "-p", "x", "-o", "x.t", "--stages", "qkv_mtmul"], 2, "mean 'qkv_matmul'?"),
        ([*X, "--stop", ""], 2, "--stop: expected a text, got an empty one"),
        ([*X, "--seed", "1.5"], 2, "--seed: expected a whole number, got '1.5'"),
        ([*X, "--seed", str(1 << 64)], 2, "to 18446744073709551615, got 18446744073709551616"),
        ([*X, "--seed=-9223372036854775809"], 2, "--seed: expected an integer from -92233720368"),
        (["chat", "-p", ""], 2, "expected a message, got an empty one"),
        ([*X, "--experts"], 2, "--experts: expected --jsonl"),
        (["tokenize", "--tokens", "8192"], 2, "token id: expected 0 to 8191, got 8192"),
        (["perplexity", "--text", "/dev/null"], 2, "expected a text, got an empty one"),
        (["completion", "tcsh"], 2, "invalid choice: 'tcsh'"),
        ([*X, "--tokens", "1"], 2, "not allowed with argument"),
        ([*X, "-n", "-3"], 2, "max-tokens: expected a whole number, 0 or more, or -1; got '-3'"),
        ([*X, "-n", "many"], 2, "got 'many'"),
        ([*X, "-n", "9" * 5000], 2, "expected a whole number"),
        ([*X, "--seed", "9" * 5000], 2, "expected a whole number"),
        ([*X, "--seed", str(1 << 64)], 2, "seed"),
        ([*X, "--temperature", "nan"], 2, "temperature"),
        (["run", "no-such-model", "-p", "x", "--temperature", "-1"], 2, "temperature"),
        (
            ["chat", "no-such-model", "-p", "x", "--top-p", "0"],
            2,
            "--top-p: expected a number in (0, 1], got 0.0",
        ),
        ([*X, "--top-p", "0"], 2, "--top-p: expected a number in (0, 1], got 0.0"),
        ([*X, "--min-p", "2"], 2, "--min-p"),
        ([*X, "--top-k", "-1"], 2, "--top-k: expected a whole number, 0 or more; got '-1'"),
        ([*X, "--repeat-penalty", "0"], 2, "--repeat-penalty: expected a number from"),
        ([*X, "--activation-bits", "24"], 2, "--activation-bits: expected 8 or 16, got 24"),
        ([*X, "--threads", "0"], 2, "threads"),
        ([*X, "--context", "0"], 2, "context: expected an integer from 1 to 16777216, got 0"),
        ([*X, "--context", "16777217"], 2, "context"),
        ([*X, "--sequences", "0"], 2, "--sequences: expected a whole number, 1 to 16777216"),
        ([*X, "--cache", "0"], 2, "--cache: expected a whole number, 1 to"),
        ([*X, "--json", "--jsonl"], 2, "--jsonl: not allowed with argument --json"),
        (["perplexity", "--text", "x", "--window", "99999999"], 2, "--window: expected"),
        (["accuracy", "--text", "x", "--window", "99999999"], 2, "--window: expected"),
        (
            ["verify", "-p", "x", "--against-activation-bits", "24"],
            2,
            "--against-activation-bits: expected 8 or 16, got 24",
        ),
        (
            ["ablate", "--tokens", "1", "--rank", "--activation-bits", "24"],
            2,
            "--activation-bits: expected 8 or 16, got 24",
        ),
        (["serve", "--port", "65536"], 2, "--port: expected a whole number, 0 to 65535"),
        (["serve", "--host", "a..b"], 2, "a..b:8000: expected an address of this machine"),
        (
            ["run", "-p", "x", "--backend", "cpu", "--parts", "99"],
            2,
            "--parts: expected at most 4, one a query head, got 99",
        ),
        ([*X, "--logprobs", "1"], 2, "--logprobs: expected --json or --jsonl beside it"),
        ([*X, "--json", "--logprobs", "8193"], 2, "--logprobs: expected an integer from 0 to 8192"),
        ([*X, "--routes", "/dev/null"], 2, "expected a file, got a device"),
        (["trace", "-p", "x", "-o", "/dev/null"], 2, "expected a file, got a device"),
        (["convert", ".", "-o", "/dev/null"], 2, "expected a file, got a device"),
        ([*X, "--backend", "abacus"], 2, "got 'abacus'"),
        ([*RUN, "-p", ""], 2, "at least one token"),
        ([*RUN, "-p", "a\udcffb"], 2, "surrogate"),
        ([*RUN, "-p", "def f(x): return", "-c", "3"], 2, "expected at most 3 tokens"),
        ([*RUN, "--tokens", "1,two"], 2, "got '1,two'"),
        ([*RUN, "--tokens", "8192"], 2, "token id: expected 0 to 8191, got 8192"),
        ([*RUN, "--tokens", "-1"], 2, "got -1"),
        ([*RUN, "--prompt-file", "no-such-file"], 2, "no such file: 'no-such-file'"),
        ([*RUN, "--prompt-file", "."], 2, "directory"),
        ([*RUN, "--prompt-file", "a\0b"], 2, "file name"),
        ([*RUN, "--prompt-file", "/dev/zero"], 2, "at most 16777216 bytes"),
        (["run", "no-such-model", "-p", "x"], 3, "no such file: 'no-such-model'"),
        (["inspect", "no-such-model"], 3, "no such file: 'no-such-model'"),
        (["bench", "no-such-model"], 3, "no such file: 'no-such-model'"),
        (["chat", "no-such-model", "-p", "x"], 3, "no such file: 'no-such-model'"),
        (["chat", "--tokens", "1", "--system", "x"], 2, "no --system"),
        (["bench", "-p", "0", "-n", "0"], 2, "--n-prompt, --n-gen: expected"),
        (["bench", "-p", "8,x"], 2, "got '8,x'"),
        (["bench", "-d", "-1"], 2, "--n-depth: expected 0 to 16777215 tokens, got -1"),
        (["bench", "-r", "0"], 2, "repetitions: expected a whole number, 1 or more; got '0'"),
        (["bench", "--warmup", "1"], 2, "--warmup goes with a prompt"),
        (["bench", "--prompt", "x", "-d", "1"], 2, "--n-depth does not go with a prompt"),
        (["bench", "--prompt", "x", "-n", "3"], 2, "not go with a prompt; use --max-tokens"),
        (["bench", "--prompt", "x", "-r", "3"], 2, "not go with a prompt; use --iterations"),
        (["bench", "--max-tokens", "3"], 2, "--max-tokens goes with a prompt; use --n-gen"),
        (["bench", "--prompt", "x", "--iterations", "0"], 2, "iterations"),
        (["bench", "--prompt", "x", "--max-tokens", "0"], 2, "max-tokens"),
        (
            ["bench", "--backend", "reference", "--tokens", ",".join(["1"] * 4097)],
            2,
            "expected at most 4096 tokens",
        ),
        (["bench", "--backend", "reference", "--prompt", ""], 2, "at least one token"),
    ],
)
def test_a_mistake_is_one_line_and_a_documented_code(
    argv: list[str], code: int, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert complaint in err
    assert err.startswith("isobit: error: ")
    assert err.count("\n") == 1
    assert len(err) < 500


@pytest.mark.parametrize("end", [None, 0, 1, "why"])
def test_code_that_ends_a_command_early_is_no_success(
    end: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("isobit.cli.devices.main", lambda _: sys.exit(end))
    assert main(["devices"]) == 2
    line = f"isobit: error: devices: expected to come to its end, got SystemExit: {end}\n"
    assert capsys.readouterr().err == line


def test_a_prompt_file_must_be_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "latin-1.txt"
    path.write_bytes(b"caf\xe9 ")
    assert main([*RUN, "--prompt-file", str(path)]) == 2
    assert "expected UTF-8 text, got invalid continuation byte at byte 3" in capsys.readouterr().err


def test_a_named_pipe_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    for command in (
        ["run", "--prompt-file", pipe],
        ["verify", "--prompts", pipe],
        ["perplexity", "--text", pipe],
        ["chat", "--tools", pipe, "-p", "x"],
    ):
        assert main(command) == 2
        assert "got: a named pipe; send it to standard input, -" in capsys.readouterr().err
    for command in (
        [*X, "--receipt", pipe],
        [*X, "--routes", pipe],
        ["trace", "-p", "x", "-o", pipe],
        ["verify", "-p", "x", "--html", pipe],
        ["contract", "status", "x", "-o", pipe],
        ["batch", "x", "-o", pipe],
    ):
        assert main(command) == 2
        assert "expected a file, got a named pipe" in capsys.readouterr().err
    end, other = os.pipe()  # as a shell gives it: tokenize --prompt-file <(a command)
    os.write(other, b"import os")
    os.close(other)
    assert main(["tokenize", "--prompt-file", f"/dev/fd/{end}"]) == 0
    assert capsys.readouterr().out == "702,657\n"
    os.close(end)


def test_a_damaged_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "evil\x1b[2J.gguf"
    path.write_bytes(b"GGUF" + bytes(20))
    for command in (["run", "-p", "x"], ["inspect"], ["bench"], ["chat", "-p", "x"]):
        assert main([command[0], str(path), *command[1:]]) == 3
        err = capsys.readouterr().err
        assert "version" in err
        assert "\x1b" not in err  # a file name must not drive the terminal


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_defaults(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    action = ["check"] if command == "contract" else []
    assert main([command, *action, "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    own = {"pull": "default: Q4_K_M", "models": "--remove", "convert": "default: bf16"}
    own |= {"front": "default: 8000"}
    shown = own.get(command, "default: sample")
    assert shown in out or command in ("devices", "completion")
    assert "exit codes: 0 done" in out


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


def test_importing_isobit_and_its_help_load_no_numpy() -> None:
    code = (
        "import sys, isobit, isobit.cli; isobit.cli.main(['--help']); "
        "assert not {'numpy', 'rich', 'tokenizers', 'jinja2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_inspect_reports_the_sample(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect"]) == 0
    out = capsys.readouterr().out
    assert "general.architecture = 'qwen3moe'" in out
    assert "(8,192 elements)" in out
    assert "refused: nothing" in out
    assert max(map(len, out.splitlines())) < 200  # the vocabulary is not all there


def test_inspect_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "sample", "--json", "--sha256"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sha256"] == "56306afd638240ef5bbf1ec27aa293e38d23f46119ba804d9fe009f37e29b22e"
    assert found["file_size"] == 20401760
    assert found["parameters"] == 32545024
    assert found["metadata"]["tokenizer.ggml.tokens"]["length"] == 8192
    assert found["refused"] == []
    assert sum(t["bytes"] for t in found["types"]) == sum(t["bytes"] for t in found["tensors"])
    assert found["kv_bytes_per_token"] == 8 * 2 * 2 * (2 * 128 + 4)
    assert found["config"]["n_experts_used"] == 4


def test_markdown_table() -> None:
    assert markdown(["test", "t/s"], [["pp512", "12.5"], ["a|b", "3"]]).splitlines() == [
        "| test  |  t/s |",
        "| ----- | ---: |",
        "| pp512 | 12.5 |",
        "| a\\|b  |    3 |",
    ]


def test_sizes() -> None:
    assert [size(n) for n in (0, 999, 1000, 20401760, 18.6e9, 2e12, 2e15)] == [
        "0 B",
        "999 B",
        "1 kB",
        "20.4 MB",
        "18.6 GB",
        "2 TB",
        "2000 TB",
    ]


def test_text_from_a_file_is_made_visible_and_short() -> None:
    assert visible("a\x1b[31m\nb\u202e") == "a\\x1b[31m\\nb\\u202e"
    assert visible("x" * 100, 10) == "x" * 10 + "…"


class FakeStream:
    """Pieces of a text as a generation gives them, a token each."""

    def __init__(self, pieces: list[str]) -> None:
        self.token_ids: list[int] = []
        self._pieces = iter(pieces)

    def __next__(self) -> str:
        piece = next(self._pieces)
        self.token_ids.append(len(self.token_ids))
        return piece


@pytest.mark.parametrize(
    ("terminal", "shown"), [(True, "a\\x1b[2J\tb\n\\x9b\n"), (False, "a\x1b[2J\tb\n\x9b")]
)
def test_a_models_text_does_not_drive_the_terminal(
    terminal: bool, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    out.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", out)
    stream = FakeStream(["a\x1b[2J", "\tb\n\x9b"])
    show(stream, next(stream))  # type: ignore[arg-type]
    assert out.getvalue() == shown


def test_closed_standard_streams_are_no_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["inspect"]) == 2
    assert "output: standard output is closed" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["trace", *RUN[1:], "--tokens", "1", "-o", str(tmp_path / "x.trace")]) == 0
    assert main(["nothing"]) == 2


def test_a_full_disk_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    assert main(["inspect"]) == 2
    assert capsys.readouterr().err == "isobit: error: output: No space left on device\n"


@pytest.mark.parametrize("note", ["the system will page", FallbackNote("using cpu")])
def test_a_comparison_refuses_a_fallback_alone(monkeypatch, capsys, note):
    class Opened:
        def __init__(self, _model, backend, _engine, tell):
            tell(note)
            self.backend = SimpleNamespace(name=backend)

    monkeypatch.setattr(tools, "Model", Opened)
    if isinstance(note, FallbackNote):
        with pytest.raises(NothingCompared):
            tools.open_exactly("sample", "auto", 16, None, 1)
    else:
        assert tools.open_exactly("sample", "cuda", 16, None, 1).backend.name == "cuda"
        assert note in capsys.readouterr().err


def test_a_table_fits_the_terminal_and_says_what_it_left_out() -> None:
    console = Console(width=40, file=io.StringIO(), color_system=None)
    header = ["stage", "layers", "a long heading", "verdict"]
    rows = [["attn_norm", "all 48", "0.123456789", "faulty"], ["lm_head", "", "1", "identical"]]
    print_fitted(console, header, rows, ["layers", "a long heading"])
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 40
    assert lines[0].split() == ["stage", "a", "long", "heading", "verdict"]
    assert lines[-1] == "left out for want of room: layers"
    for width in range(20, 60):  # what is kept is not folded
        narrow = Console(width=width, file=io.StringIO(), color_system=None)
        print_fitted(narrow, header, rows, header[:0:-1])
        table, *_ = narrow.file.getvalue().split("left out")
        assert len(table.splitlines()) == 4, table
    wide = Console(width=80, file=io.StringIO(), color_system=None)
    print_fitted(wide, header, rows, ["layers"])
    assert "all 48" in wide.file.getvalue()


@pytest.mark.parametrize(
    ("cell", "style"),
    [("faulty (A only)", "bold red"), ("propagated", "yellow"), ("identical", "green"), ("1", "")],
)
def test_verdicts_are_coloured(cell: str, style: str) -> None:
    assert verdict_style(cell) == style


def test_a_machine_without_a_gpu_is_no_news(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    note = NoGpuNote("backend auto: using cpu (no CUDA device)")
    monkeypatch.setattr(options, "gpus", list)
    options._tell(note)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(options, "gpus", lambda: ["NVIDIA"])
    options._tell(note)
    assert f"running on the CPU, not the GPU (NVIDIA): {note}" in capsys.readouterr().err


def test_a_file_s_recommended_sampling_yields_to_what_was_asked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    metadata = {
        "general.sampling.temp": 0.7,
        "general.sampling.top_p": 0.8,
        "general.sampling.top_k": -5,  # out of range, so no advice
        "general.sampling.min_p": "often",
    }
    assert sampling_options.recommended(metadata, {}) == {"temperature": 0.7, "top_p": 0.8}
    odd, kind = capsys.readouterr().err.splitlines()
    assert "general.sampling.top_k is not followed: top_k: expected" in odd
    assert (
        "general.sampling.min_p is not followed: min_p: expected a number from 0 to 1, got 'often'"
        in kind
    )
    assert sampling_options.recommended(metadata, {"temperature": 0.0}) == {"top_p": 0.8}
    assert sampling_options.words({"top_p": 0.8}) == "top-p 0.8, as the file recommends"
    assert sampling_options.words({}) == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command_and_option(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
    assert "max-tokens" in script
    if shell != "bash":
        return
    for words, expected in {
        "isobit r": "run replay",
        "isobit run --backend c": "cpu cuda cuda:unfused",
        "isobit run --prompt-": "--prompt-file",
        "isobit contract ch": "check",
        "isobit contract check --ev": "--evidence",
        "isobit completion z": "zsh",
        "isobit run m": "",  # files are the shell's own to complete: names may have spaces
    }.items():
        ask = f"COMP_WORDS=({words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 )); _isobit\n"
        ask = f'{script}{ask}echo "${{COMPREPLY[@]}}"; complete -p isobit'
        said = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
        assert said.stdout == f"{expected}\ncomplete -o default -F _isobit isobit\n", words


def test_tokenize_there_and_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenize", "-p", "import os"]) == 0
    ids = capsys.readouterr().out.strip()
    assert main(["tokenize", "--tokens", ids]) == 0
    assert capsys.readouterr().out == "import os\n"
    assert main(["tokenize", "-p", "<|im_end|>", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["token_ids"]) == 1
    assert main(["tokenize", "-p", "<|im_end|>", "--plain", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["token_ids"]) > 1


def test_devices_says_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "--json"]) == 0
    found = {b["backend"]: b for b in json.loads(capsys.readouterr().out)["backends"]}
    assert found["cpu"]["runs"]
    assert all(b["runs"] or b["reason"] for b in found.values())


def test_devices_says_that_the_matrix_unit_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isobit.backends.cpu._cpu.refused_unit", lambda: True)
    assert main(["devices"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "(AMX refused: see isobit devices)" in said
    assert "the system refuses it: expected Linux 5.16 or newer" in said


@pytest.mark.parametrize(("twice", "code"), [(False, 0), (True, -signal.SIGINT)])
def test_a_coroutine_ends_what_it_began_and_a_second_ctrl_c_the_process(
    twice: bool, code: int
) -> None:
    script = f"""
import asyncio, os, signal
from isobit.cli import event_loop

async def main():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        if {twice}:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(60)
        raise asyncio.CancelledError("after 3 rows")

signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    event_loop.run(main())
except KeyboardInterrupt as stop:
    assert str(stop) == "after 3 rows"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (code, b"")


def test_ctrl_c_is_pythons_again_after_a_coroutine_that_failed() -> None:
    async def main() -> None:
        raise ValueError

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(ValueError, match=r"^$"):
            event_loop.run(main())
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("line", "here"),
    [
        ("run -p x", True),
        ("serve model.gguf --backend auto", True),
        ("run --help", False),
        ("serve --replicas 2", False),
        ("run --parts=2", False),
        ("inspect model.gguf", False),
        ("", False),
    ],
)
def test_which_commands_load_a_model_in_their_process(line, here):
    assert loads_here(line.split()) == here


def test_the_collector_stands_still_until_the_model_is_there():
    """In a process of our own: what is there then is never looked through."""
    code = (
        "import gc, sys\n"
        "from isobit.__main__ import main\n"
        "seen = []\n"
        "from isobit.cli import options\n"
        "load = options.Model\n"
        "options.Model = lambda *a: (seen.append(gc.isenabled()), load(*a))[1]\n"
        "sys.argv[1:] = ['run', '--tokens', '5', '-n', '1', '--backend', 'cpu', '--json']\n"
        "main()\n"
        "print(seen, gc.isenabled(), gc.get_freeze_count() > 10_000)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[False] True True"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("batch in -o out model", ("in", "model", "out")),
        ("batch -o out in --audit 0.1 model --ray", ("in", "model", "out")),
        ("batch -oout in --audit=0.1 model", ("in", "model", "out")),
    ],
)
def test_what_is_no_option_may_stand_anywhere(argv: str, expected: tuple[str, str, str]) -> None:
    parser = _parser(argv.split())
    asked = parser.check(argv.split())
    args, extras = parser.parse_known_args(asked.ordered)
    assert (args.prompts, args.model, args.output) == expected
    assert not extras


def test_the_value_of_an_option_stays_beside_it() -> None:
    for given, rank in (("--rank float32 model -p x", "float32"), ("model -p x --rank", OWN)):
        argv = ["ablate", *given.split()]
        parser = _parser(argv)
        args = parser.parse_args(parser.check(argv).ordered)
        assert (args.rank, args.model, args.prompt) == (rank, "model", "x")
    assert main(["run", "sample", "-p"]) == 2


def test_the_readme_has_every_command() -> None:
    """``stage`` was missing from its table."""
    text = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    assert [c for c in COMMANDS if not re.search(rf"^\| `isobit {c}[ `]", text, re.M)] == []
