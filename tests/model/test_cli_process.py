"""The command line as people and scripts call it: a process, the sample model, real pipes."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ISOBIT = [sys.executable, "-m", "isobit"]
PROMPT = "def fibonacci(n):"
SPEED = r"isobit: prefill \d+ tokens, [\d.]+ tokens/s; decode \d+ tokens, [\d.]+ tokens/s"


def isobit(*args: str, **how: object) -> subprocess.CompletedProcess[bytes]:
    """Run a command on the CPU."""
    how.setdefault("stdin", subprocess.DEVNULL)
    command = [*ISOBIT, args[0], "--backend", "cpu", *args[1:]]
    return subprocess.run(command, capture_output=True, timeout=120, check=False, **how)  # type: ignore[call-overload]


# Buffered, as a user's stdout is: what is left in the buffer is written again at exit.
BUFFERED = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}

# SIGINT may be ignored around the tests (a shell's background job), and would stay so.
WITH_SIGINT = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from isobit.cli import main; sys.exit(main())"
)


def start(*args: str) -> subprocess.Popen[bytes]:
    """Start a command that the test will interrupt."""
    return subprocess.Popen(
        [sys.executable, "-c", WITH_SIGINT, *args],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=BUFFERED,
    )


def run_json(*args: str) -> dict[str, object]:
    done = isobit("run", "--json", *args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_run_streams_text_and_reports_speed() -> None:
    done = isobit("run", "-p", PROMPT, "-n", "6")
    assert done.returncode == 0
    assert len(done.stdout.decode().strip()) > 3
    assert re.fullmatch(SPEED + "\n", done.stderr.decode())


def test_run_json_and_the_three_ways_to_give_a_prompt(tmp_path: Path) -> None:
    found = run_json("-p", PROMPT, "-n", "4")
    assert found["finish_reason"] == "length"
    assert len(found["token_ids"]) == 4
    assert found["prefill_tokens"] == len(found["prompt_token_ids"])
    assert found["decode_tokens"] == 3
    assert found["prefill_tokens_per_second"] > 0
    assert found["decode_tokens_per_second"] > 0
    assert (found["backend"], found["activation_planes"], found["note"]) == ("cpu", 2, None)
    text = isobit("run", "-p", PROMPT, "-n", "4").stdout.decode()
    assert found["text"] == text

    ids = ",".join(map(str, found["prompt_token_ids"]))
    assert run_json("--tokens", ids, "-n", "4")["token_ids"] == found["token_ids"]
    assert found["logprobs"] is None
    logprobs = run_json("--tokens", ids, "-n", "4", "--logprobs", "2")["logprobs"]
    assert [len(row) for row in logprobs["top_ids"]] == [2] * 4  # type: ignore[index]
    assert [row[0] for row in logprobs["top_ids"]] == found["token_ids"]  # type: ignore[index]
    assert [row[0] for row in logprobs["top"]] == logprobs["tokens"]  # type: ignore[index]
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT)
    assert run_json("--prompt-file", str(path), "-n", "4")["token_ids"] == found["token_ids"]
    piped = isobit("run", "--prompt-file", "-", "-n", "4", stdin=path.open())
    assert piped.stdout.decode() == text


def test_backends_give_the_same_tokens() -> None:
    args = ["run", "--json", "-p", PROMPT, "-n", "12", "--temperature", "1", "--seed", "7"]
    cpu, reference = (
        json.loads(subprocess.check_output([*ISOBIT, *args, "--backend", name], timeout=120))
        for name in ("cpu", "reference")
    )
    assert (cpu["backend"], reference["backend"]) == ("cpu", "reference")
    assert cpu["token_ids"] == reference["token_ids"]


def test_auto_says_so_when_it_falls_back_to_the_cpu() -> None:
    done = subprocess.run(
        [*ISOBIT, "run", "-p", PROMPT, "-n", "1", "--json"],
        capture_output=True,
        timeout=120,
        check=True,
    )
    lines = done.stderr.decode().splitlines()
    if json.loads(done.stdout)["backend"] == "cpu":
        assert lines.pop(0).startswith("isobit: backend auto: using cpu (")
    assert len(lines) == 1  # the speed


def test_a_backend_this_machine_lacks_is_exit_4() -> None:
    done = subprocess.run(
        [*ISOBIT, "run", "-p", "x", "-n", "1", "--backend", "cuda"],
        capture_output=True,
        timeout=120,
        check=False,
    )
    if done.returncode == 0:
        pytest.skip("this machine has a usable GPU")
    assert done.returncode == 4
    assert done.stderr.decode().startswith("isobit: error: ")
    assert done.stderr.count(b"\n") == 1


def test_no_adapter_is_exit_4_and_says_what_to_install() -> None:
    pytest.importorskip("wgpu", reason="not run: no wgpu package")
    done = subprocess.run(
        [*ISOBIT, "run", "-p", "x", "-n", "1", "--backend", "wgpu"],
        capture_output=True,
        timeout=120,
        check=False,
        env=os.environ | {"VK_DRIVER_FILES": "/none", "VK_ICD_FILENAMES": "/none"},
    )
    if done.returncode == 0:
        pytest.skip("not run: an adapter that is not Vulkan's")
    assert done.returncode == 4
    assert b"apt-get install mesa-vulkan-drivers libvulkan1" in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_a_seed_repeats_a_sampled_text() -> None:
    args = ["-p", PROMPT, "-n", "5", "--temperature", "1.5", "--top-k", "50", "--top-p", "0.95"]
    first = run_json(*args)
    again = run_json(*args, "--seed", str(first["seed"]))
    assert again["token_ids"] == first["token_ids"]


def test_stop_strings_end_the_text() -> None:
    whole = run_json("-p", PROMPT, "-n", "8")
    word = whole["text"][4:7]
    cut = run_json("-p", PROMPT, "-n", "8", "--stop", word, "--stop", "never there")
    assert cut["text"] == whole["text"][: whole["text"].index(word)]
    assert cut["finish_reason"] == "stop"


def test_a_full_context_says_so() -> None:
    done = isobit("run", "-p", "x = 1", "-c", "7", "-n", "100")
    assert done.returncode == 0
    assert b"the context of 7 tokens is full" in done.stderr


def test_n_0_only_prefills() -> None:
    done = isobit("run", "-p", PROMPT, "-n", "0")
    assert (done.returncode, done.stdout) == (0, b"")


def test_output_that_the_terminal_cannot_show_is_escaped() -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    shown = subprocess.check_output([*ISOBIT, "inspect"], env=environment, timeout=60)
    assert b"\\u2026]" in shown  # the dots of a list that is cut


def test_chat_answers_standard_input_once() -> None:
    once = isobit("chat", "--system", "Be brief.", "-n", "4", stdin=None, input=b"Hello!")
    asked = isobit("chat", "--system", "Be brief.", "-n", "4", "-p", "Hello!")
    assert once.returncode == asked.returncode == 0
    assert once.stdout == asked.stdout
    assert re.search(SPEED, once.stderr.decode())


def test_chat_in_a_terminal_keeps_the_history() -> None:
    control, terminal = pty.openpty()
    process = subprocess.Popen(
        [*ISOBIT, "chat", "--backend", "cpu", "-n", "3"],
        stdin=terminal,
        stdout=terminal,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | {"TERM": "dumb"},
    )
    os.close(terminal)
    for line in (b"first\n", b"\n", b"second\n", b"\x04"):
        wait_for(control, b"> ")
        os.write(control, line)
    _, err = process.communicate(timeout=60)
    os.close(control)
    assert process.returncode == 0, err
    first, second = (int(n) for n in re.findall(r"prefill (\d+) tokens", err.decode()))
    assert second > first + 3


def wait_for(control: int, prompt: bytes) -> None:
    """Read a terminal's output up to a prompt."""
    seen = b""
    while not seen.endswith(prompt):
        ready, _, _ = select.select([control], [], [], 60)
        assert ready, f"expected {prompt!r}, got {seen!r} and no more"
        seen += os.read(control, 1)


def test_ctrl_c_says_how_far_it_got() -> None:
    process = start("run", "--backend", "cpu", "-p", PROMPT, "-n", "2000")
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.fullmatch(r"isobit: interrupted after \d+ tokens\n", err.decode())


def test_ctrl_c_in_a_benchmark() -> None:
    process = start("bench", "--backend", "cpu", "-p", "0", "-n", "1", "-r", "100000")
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.fullmatch(r"isobit: interrupted( after \d+ of 100001 runs)?\n", err.decode())
    assert out == b""


def test_closed_standard_streams_are_no_traceback() -> None:
    command = " ".join([*ISOBIT, "chat", "--backend", "cpu", "-n", "1"])
    done = subprocess.run(
        ["sh", "-c", f"{command} <&-"], capture_output=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr.count(b"\n")) == (0, 1)


@pytest.mark.parametrize(
    "args", [["run", "--backend", "cpu", "-p", PROMPT, "-n", "2000"], ["inspect", "--json"]]
)
def test_a_closed_pipe_ends_quietly(args: list[str]) -> None:
    process = start(*args)
    assert process.stdout is not None
    assert process.stderr is not None
    if args[0] == "run":
        process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert err == b""


def test_a_full_disk_behind_stdout() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("/dev/full: not on this system")
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*ISOBIT, "inspect"],
            stdout=full,
            stderr=subprocess.PIPE,
            env=BUFFERED,
            check=False,
            timeout=60,
        )
    assert done.returncode == 2
    assert done.stderr == b"isobit: error: output: No space left on device\n"


def test_bench_rows_in_llama_bench_s_vocabulary() -> None:
    done = isobit("bench", "-p", "3", "-n", "2", "-d", "0,4", "-r", "3", "-o", "json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(r["n_prompt"], r["n_gen"], r["n_depth"]) for r in rows] == [
        (3, 0, 0),
        (0, 2, 0),
        (3, 0, 4),
        (0, 2, 4),
    ]
    for row in rows:
        assert len(row["samples_ts"]) == len(row["samples_ns"]) == 3
        assert min(row["samples_ts"]) <= row["median_ts"] <= max(row["samples_ts"])
        assert row["avg_ts"] == pytest.approx(sum(row["samples_ts"]) / 3)
        assert row["stddev_ts"] >= 0
        assert row["backend"] == "cpu"
        assert row["model_sha256"].startswith("56306afd")
        fraction = row["fraction_of_read_bandwidth"]
        if row["n_gen"]:
            read = row["active_bytes_per_token"] * row["median_ts"]
            assert fraction == pytest.approx(read / row["read_bandwidth"])
        else:
            assert fraction is None
