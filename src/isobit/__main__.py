"""The command's first lines. ``python -m isobit`` is ``isobit``.

Python's own answer to Ctrl-C is a traceback. Until the command line is there and answers in a line,
the system's is better: the process ends.
"""

import signal
import sys


def main() -> int:
    """Run a command and return its exit code."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else it is ignored
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from isobit.cli import main as run  # noqa: PLC0415 - takes 0.1 s

    return run(interruptible=ours)


if __name__ == "__main__":
    sys.exit(main())
