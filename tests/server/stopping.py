"""An isobit that stops itself, as SIGSTOP does it, as it comes to a function for the n-th time: it
is in the midst of its work for certain, and can be killed there, or be taken for one that hangs."""

import os
import subprocess
import sys

_STOPS = """
import os, pkgutil, signal, sys
from isobit.cli import main
owner, name, left = pkgutil.resolve_name(sys.argv[1]), sys.argv[2], int(sys.argv[3])
own = getattr(owner, name)
def stops(*given, **settings):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    return own(*given, **settings)
setattr(owner, name, stops)
sys.exit(main(sys.argv[4:]))
"""

LINE = "isobit.server.answer.answers", "line"
"""A line of a stream for a front: its stream has begun, and has not ended."""
WRITE = "isobit.server.batch.batch:Answered", "write"
"""A row of a batch."""


def stopping(where: tuple[str, str], at: int) -> list[str]:
    """The command, without arguments."""
    return [sys.executable, "-c", _STOPS, *where, str(at)]


def kill_when_it_stops(process: subprocess.Popen[bytes]) -> None:
    """With SIGKILL."""
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert process.poll() is None
    process.kill()
    process.wait()
