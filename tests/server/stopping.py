"""An isobit that stops itself in a pass, as SIGSTOP does it: then it is in the midst of its work
for certain, and can be killed there, or be taken for one that hangs."""

import os
import subprocess
import sys

_STOPS = """
import os, signal, sys
from isobit.cli import main
from isobit.runtime.engine import Engine
run, left = Engine._run, int(sys.argv[1])
def stops(*given):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    return run(*given)
Engine._run = stops
sys.exit(main(sys.argv[2:]))
"""


def stopping(at: int | None) -> list[str]:
    """The command, without arguments; at: in which pass it stops, from 1. None: it does not."""
    own = ["-m", "isobit"] if at is None else ["-c", _STOPS, str(at)]
    return [sys.executable, *own]


def kill_when_it_stops(process: subprocess.Popen[bytes]) -> None:
    """With SIGKILL."""
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert process.poll() is None
    process.kill()
    process.wait()
