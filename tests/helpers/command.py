"""Commands in processes that are forked from one that has imported what they need.

To start Python and import NumPy, rich and isobit takes a second of CPU each time. In a fork a
command has streams, signals and an exit code of its own, as in a process that a shell starts; what
differs is how Python itself begins and ends, and tests of that start it.
"""

import contextlib
import fcntl
import multiprocessing
import os
import pty
import signal
import struct
import sys
import tempfile
import termios
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any

from isobit.cli import COMMANDS, main

PATIENCE = 120  # seconds that a command may take
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "pytest",  # which each process would import, to have the same __main__
        *(f"isobit.cli.{name.replace('-', '_')}" for name in COMMANDS),
        *("isobit.cli.tools", "rich.progress", "rich.table", "tests.helpers.command"),
    ]
)


@dataclass
class Done:
    """A command that has ended."""

    returncode: int
    stdout: bytes
    stderr: bytes


def start(
    argv: list[str], stdin: int, stdout: int, stderr: int, env: Mapping[str, str] | None = None
) -> ForkServerProcess:
    """A command's process, with file descriptors as its streams; these stay open here."""
    streams = [_Stream(fd) for fd in (stdin, stdout, stderr)]
    process = _FORKS.Process(target=_run, args=(argv, streams, dict(env or {}), str(Path.cwd())))
    process.start()
    return process


def run(argv: list[str], *, typed: bytes = b"", env: Mapping[str, str] | None = None) -> Done:
    """Run a command to its end, with ``typed`` on its standard input."""
    with contextlib.ExitStack() as stack:
        given, out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
        given.write(typed)
        given.seek(0)
        code = ended(start(argv, given.fileno(), out.fileno(), err.fileno(), env))
        out.seek(0)
        err.seek(0)
        return Done(code, out.read(), err.read())


@contextlib.contextmanager
def piped(argv: list[str]) -> Iterator[tuple[ForkServerProcess, IO[bytes], IO[bytes]]]:
    """A command that runs, and its stdout and stderr to read from."""
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    with open(os.devnull, "rb") as nothing, open(out, "rb", 0) as a, open(err, "rb", 0) as b:  # noqa: PTH123
        process = start(argv, nothing.fileno(), out_end, err_end)
        os.close(out_end)
        os.close(err_end)
        try:
            yield process, a, b
        finally:
            process.kill()
            process.join()


def ended(process: ForkServerProcess) -> int:
    """The exit code, once there is one."""
    process.join(PATIENCE)
    code = process.exitcode
    process.kill()
    assert code is not None, "expected the command to end"
    return code


def terminal(width: int) -> tuple[int, int]:
    """Both ends of a terminal: what a person has, and what a program has."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    return ours, theirs


def in_terminal(argv: list[str], width: int, stdout: Path | None = None) -> tuple[int, str]:
    """A command's exit code and what it shows in a terminal ``width`` columns wide.

    With ``stdout``, that is a file and only stderr is the terminal.
    """
    control, theirs = terminal(width)
    shown: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # the other side is closed
            while data := os.read(control, 1 << 16):
                shown.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with open(os.devnull, "rb") as nothing, open(stdout or os.devnull, "wb") as file:  # noqa: PTH123
            out = file.fileno() if stdout else theirs
            env = {"TERM": "xterm", "COLUMNS": ""}
            code = ended(start(argv, nothing.fileno(), out, theirs, env))
    finally:
        os.close(theirs)
        reader.join(60)
        os.close(control)
    assert not reader.is_alive(), "the terminal is still held open"
    return code, b"".join(shown).decode()


class _Stream:
    """A file descriptor that is sent to the process."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (DupFd(self._fd),)


def _received(sent: Any) -> int:
    return int(sent.detach())


def _run(argv: list[str], streams: list[int], env: Mapping[str, str], folder: str) -> None:
    """The other side: what Python does before and after ``main``, and that."""
    os.setsid()  # a signal to the tests is none to the command
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
        os.close(fd)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run where it is ignored
    os.environ.update(env)
    os.chdir(folder)
    sys.exit(main(argv))
