"""The command line as people and scripts call it: a process, the sample model, real pipes."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO

import pytest

from isobit.backends.hardware import gpus
from tests.helpers.command import Done, ended, piped, run, start, terminal
from tests.helpers.expected import needs

ISOBIT = [sys.executable, "-m", "isobit"]
PROMPT = "def fibonacci(n):"
SPEED = r"isobit: prefill \d+ tokens?, [\d.]+ tokens/s; decode \d+ tokens?, [\d.]+ tokens/s"


def isobit(*args: str, typed: bytes = b"") -> Done:
    """Run a command on the CPU."""
    return run([args[0], "--backend", "cpu", *args[1:]], typed=typed)


# Buffered, as a user's stdout is: what is left in the buffer is written again at exit.
BUFFERED = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}


def run_json(*args: str) -> dict[str, object]:
    done = isobit("run", "--json", *args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_run_streams_text_and_reports_speed() -> None:
    command = [*ISOBIT, "run", "--backend", "cpu", "-p", PROMPT, "-n", "6"]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
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
    assert (found["backend"], found["activation_bits"], found["note"]) == ("cpu", 16, None)
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
    piped = isobit("run", "--prompt-file", "-", "-n", "4", typed=PROMPT.encode())
    assert piped.stdout.decode() == text


def test_backends_give_the_same_tokens() -> None:
    args = ["run", "--json", "-p", PROMPT, "-n", "12", "--temperature", "1", "--seed", "7"]
    cpu, reference = (
        json.loads(run([*args, "--backend", name]).stdout) for name in ("cpu", "reference")
    )
    assert (cpu["backend"], reference["backend"]) == ("cpu", "reference")
    assert cpu["token_ids"] == reference["token_ids"]


def test_the_cpu_is_no_news_where_there_is_no_gpu() -> None:
    if gpus():
        pytest.skip("not run: this machine has a GPU")
    done = run(["run", "-p", PROMPT, "-n", "1", "--json"])
    assert json.loads(done.stdout)["backend"] == "cpu"
    assert len(done.stderr.splitlines()) == 1  # the speed


def test_a_backend_this_machine_lacks_is_exit_4() -> None:
    done = run(["run", "-p", "x", "-n", "1", "--backend", "cuda"])
    if done.returncode == 0:
        pytest.skip("this machine has a usable GPU")
    assert done.returncode == 4
    assert done.stderr.decode().startswith("isobit: error: ")
    assert done.stderr.count(b"\n") == 1


def test_no_adapter_is_exit_4_and_says_what_to_install() -> None:
    needs("wgpu", "wgpu")
    nowhere = {"VK_DRIVER_FILES": "/none", "VK_ICD_FILENAMES": "/none"}
    done = run(["run", "-p", "x", "-n", "1", "--backend", "wgpu"], env=nowhere)
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
    once = isobit("chat", "--system", "Be brief.", "-n", "4", typed=b"Hello!")
    asked = isobit("chat", "--system", "Be brief.", "-n", "4", "-p", "Hello!")
    assert once.returncode == asked.returncode == 0
    assert once.stdout == asked.stdout
    assert re.search(SPEED, once.stderr.decode())


READY = b"\x1b[?2004h> "  # the line editor wants pasted lines marked, then the prompt


@dataclass
class Chat:
    """A chat in a terminal, whose stderr is a file."""

    control: int
    process: BaseProcess
    stderr: IO[bytes]

    def end(self) -> bytes:
        """What it said on stderr, once it has ended well."""
        code = ended(self.process)
        self.stderr.seek(0)
        err = self.stderr.read()
        assert code == 0, err
        return err


@pytest.fixture(params=[400])
def chat(request: pytest.FixtureRequest) -> Iterator[Chat]:
    """One whose answers have so many tokens."""
    control, theirs = terminal(80)
    with tempfile.TemporaryFile() as err:
        command = ["chat", "--backend", "cpu", "-n", str(request.param)]
        process = start(command, theirs, theirs, err.fileno(), {"TERM": "dumb"})
        os.close(theirs)
        try:
            wait_for(control, READY)
            yield Chat(control, process, err)
        finally:
            process.kill()
            process.join()
            os.close(control)


@pytest.mark.parametrize("chat", [20], indirect=True)
def test_chat_in_a_terminal_keeps_the_history(chat: Chat) -> None:
    control = chat.control
    for line in (
        *("/help", "first", "/stats", "", "/nonsense", "second", "/stats"),
        *("/clear", "first", "/stats"),
    ):
        os.write(control, line.encode() + b"\n")
        wait_for(control, READY)
    os.write(control, b"\x04")
    err = chat.end()
    first, second, again = (int(n) for n in re.findall(r"prefill (\d+) tokens", err.decode()))
    assert second > first + 3
    assert again == first
    assert err.startswith(b"isobit: pycoder-moe-33m-Q4_K_M on cpu; /help helps, Ctrl-D ends\n")
    assert b"no such command: /nonsense" in err


def test_ctrl_c_in_a_chat_stops_the_answer_alone(chat: Chat) -> None:
    control = chat.control
    os.write(control, b"Tell me all.\n")
    wait_for(control, b"\x1b[?2004l\r")  # after the message's echo
    os.read(control, 1)
    os.kill(process_id(chat.process), signal.SIGINT)
    wait_for(control, READY)
    os.write(control, b"/stats\n")
    wait_for(control, READY)
    interrupt(chat, lambda: select.select([control], [], [], 1)[0])  # "Ctrl-C again"
    wait_for(control, READY)
    interrupt(chat, lambda: chat.process.join(1) or not chat.process.is_alive())
    err = chat.end()
    assert b"isobit: stopped" in err
    assert b"Ctrl-C again" in err


def process_id(process: BaseProcess) -> int:
    assert process.pid is not None
    return process.pid


def interrupt(chat: Chat, done: Callable[[], object]) -> None:
    """Send SIGINT until it is noticed: Python's line editor misses one that comes as it begins."""
    for _ in range(30):
        time.sleep(0.1)
        os.kill(process_id(chat.process), signal.SIGINT)
        if done():
            return
    pytest.fail("expected SIGINT to be noticed")


@pytest.mark.parametrize("chat", [20], indirect=True)
def test_a_turn_that_fails_does_not_end_the_chat(chat: Chat) -> None:
    control = chat.control
    os.write(control, b'"""\n')
    for _ in range(10):
        wait_for(control, "… ".encode())
        os.write(control, b"word " * 600 + b"\n")
    wait_for(control, "… ".encode())
    os.write(control, b'"""\n')
    wait_for(control, READY)
    os.write(control, b"x\n")
    wait_for(control, READY)
    os.write(control, b"/stats\n")
    wait_for(control, READY)
    os.write(control, b"/quit\n")
    err = chat.end()
    assert b"the message is taken back" in err
    assert re.search(r"prefill \d{1,2} tokens", err.decode())


def test_jsonl_is_a_line_for_each_token() -> None:
    done = isobit("run", "-p", PROMPT, "-n", "4", "--jsonl", "--experts")
    *tokens, totals = map(json.loads, done.stdout.splitlines())
    whole = run_json("-p", PROMPT, "-n", "4")
    assert [t["id"] for t in tokens] == whole["token_ids"] == totals["token_ids"]
    assert "".join(t["text"] for t in tokens) == whole["text"]
    assert [t["index"] for t in tokens] == [0, 1, 2, 3]
    assert all(len(t["experts"]) == 8 and len(t["experts"][0]) == 4 for t in tokens)
    assert totals["type"] == "done"
    assert [t["logprob"] for t in tokens] == totals["logprobs"]["tokens"]
    assert all(-20 < t["logprob"] < 0 and "top" not in t for t in tokens)
    done = isobit("run", "-p", PROMPT, "-n", "4", "--jsonl", "--logprobs", "2")
    *again, totals = map(json.loads, done.stdout.splitlines())
    assert [t["logprob"] for t in again] == [t["logprob"] for t in tokens]
    assert [[i for i, _ in t["top"]] for t in again] == totals["logprobs"]["top_ids"]
    assert [t["top"][0] for t in again] == [[t["id"], t["logprob"]] for t in again]


def test_what_was_generated_before_ctrl_c_is_kept(tmp_path: Path) -> None:
    receipt = tmp_path / "r.json"
    command = ["run", "--backend", "cpu", "-p", PROMPT, "-n", "3000", "--jsonl"]
    with piped([*command, "--receipt", str(receipt)]) as (process, stdout, stderr):
        first = stdout.readline()
        os.kill(process_id(process), signal.SIGINT)
        rest, err = stdout.read(), stderr.read()
        assert ended(process) == 130, err
    *tokens, totals = map(json.loads, [first, *rest.splitlines()])
    assert totals["finish_reason"] == "interrupted"
    assert [t["id"] for t in tokens] == totals["token_ids"]
    assert "".join(t["text"] for t in tokens) == totals["text"]
    kept = json.loads(receipt.read_text())
    assert [t["token"] for t in kept["tokens"]] == totals["token_ids"]


def test_a_dash_reads_the_prompt_from_standard_input() -> None:
    given = isobit("run", "-p", "-", "-n", "4", typed=PROMPT.encode())
    assert given.stdout == isobit("run", "-p", PROMPT, "-n", "4").stdout


def test_minus_one_goes_on_to_the_end_of_the_context() -> None:
    assert run_json("--tokens", "1,2", "-n", "-1", "-c", "9")["note"] is not None


def wait_for(control: int, prompt: bytes) -> str:
    """Read a terminal's output up to a prompt."""
    seen = b""
    while not seen.endswith(prompt):
        ready, _, _ = select.select([control], [], [], 60)
        assert ready, f"expected {prompt!r}, got {seen!r} and no more"
        seen += os.read(control, 1)
    return seen.decode()


def test_ctrl_c_says_how_far_it_got() -> None:
    with piped(["run", "--backend", "cpu", "-p", PROMPT, "-n", "2000"]) as (process, out, err):
        assert out.read(1)
        os.kill(process_id(process), signal.SIGINT)
        said = err.read().decode()
        assert ended(process) == 130
    assert re.fullmatch(r"isobit: interrupted after \d+ tokens?\n", said)


def test_ctrl_c_in_a_benchmark(tmp_path: Path) -> None:
    command = ["bench", "--backend", "cpu", "-p", "0", "-n", "1", "-r", "100000", "-o", "json"]
    control, theirs = terminal(80)
    with (tmp_path / "out").open("wb") as out:
        process = start(command, theirs, out.fileno(), theirs)
    os.close(theirs)
    for _ in range(9):
        wait_for(control, b"tg1 ")  # its bar, drawn again after a run
    os.kill(process_id(process), signal.SIGINT)
    shown = wait_for(control, b" runs\r\n")
    assert ended(process) == 130
    os.close(control)
    found = re.search(r"isobit: interrupted after (\d+) of 100001 runs\r\n", shown)
    assert found, shown
    [row] = json.loads((tmp_path / "out").read_text())
    assert len(row["samples_ts"]) in (int(found[1]) - 1, int(found[1]))


def test_closed_standard_streams_are_no_traceback() -> None:
    command = " ".join([*ISOBIT, "chat", "--backend", "cpu", "-n", "1"])
    done = subprocess.run(
        ["sh", "-c", f"{command} <&-"], capture_output=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)  # there is no message


@pytest.mark.parametrize(
    "args", [["run", "--backend", "cpu", "-p", PROMPT, "-n", "2000"], ["inspect", "--json"]]
)
def test_a_closed_pipe_ends_quietly(args: list[str]) -> None:
    process = subprocess.Popen(
        [*ISOBIT, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=BUFFERED
    )
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
