"""The command's first lines. ``python -m isobit`` is ``isobit``.

Python's own answer to Ctrl-C is a traceback. Until the command line is there and answers in a line,
the system's is better: the process ends.
"""

import gc
import signal
import sys
from collections.abc import Sequence

_LOAD_HERE = ("run", "chat", "serve", "batch", "bench")
_ELSEWHERE = ("--help", "-h", "--parts", "--hosts", "--replicas", "--ray")


def main() -> int:
    """Run a command and return its exit code."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else it is ignored
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if loads_here(sys.argv[1:]):
        gc.disable()  # until the model is there: cli/options.py
    from isobit.cli import main as run  # noqa: PLC0415 - takes 0.1 s

    return run(interruptible=ours)


def loads_here(argv: Sequence[str]) -> bool:
    """Whether a command is going to load a model in this process."""
    elsewhere = any(a.partition("=")[0] in _ELSEWHERE for a in argv)
    return "".join(argv[:1]) in _LOAD_HERE and not elsewhere


if __name__ == "__main__":
    sys.exit(main())
