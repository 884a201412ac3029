"""The command's first lines. ``python -m isobit`` is ``isobit``.

Python's own answer to Ctrl-C is a traceback. Until the command line is there and answers in a line,
the system's is better: the process ends.
"""

import gc
import os
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
    if may_use_cuda(sys.argv[1:]) and any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg"))):
        import threading  # noqa: PLC0415

        threading.Thread(target=open_driver).start()
    from isobit.cli import main as run  # noqa: PLC0415 - takes 0.1 s

    return run(interruptible=ours)


def loads_here(argv: Sequence[str]) -> bool:
    """Whether a command is going to load a model in this process."""
    elsewhere = any(a.partition("=")[0] in _ELSEWHERE for a in argv)
    return "".join(argv[:1]) in _LOAD_HERE and not elsewhere


def may_use_cuda(argv: Sequence[str]) -> bool:
    """Whether it does that on a GPU, if there is one."""
    backend = "auto"
    for i, option in enumerate(argv):
        if option.startswith("--backend"):
            backend = option.partition("=")[2] or "".join(argv[i + 1 : i + 2])
    return loads_here(argv) and backend in ("auto", "cuda")


def open_driver() -> None:
    """Open NVIDIA's driver and the context that a model's will be: 0.2 to 1.1 s, in which Python's
    lock is free for the imports. What goes wrong is said when the backend asks."""
    import ctypes  # noqa: PLC0415

    try:
        driver, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
        if driver.cuInit(0) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
    except OSError:
        pass


if __name__ == "__main__":
    sys.exit(main())
