"""Coroutines of commands, and Ctrl-C while they run."""

import asyncio
import signal
from collections.abc import Coroutine
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run``, but a first Ctrl-C lets the coroutine end what it began, and a second ends
    the process where it is. (asyncio's own answer to a second is a traceback.)

    Raises KeyboardInterrupt after a first, with what the CancelledError says that came of it.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # it is ignored
        return asyncio.run(main)

    async def interruptible() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def stop(number: int, _: FrameType | None) -> None:
            signal.signal(number, signal.SIG_DFL)
            loop.call_soon_threadsafe(task.cancel)

        signal.signal(signal.SIGINT, stop)
        return await main

    try:
        found = asyncio.run(interruptible())
    except asyncio.CancelledError as stopped:
        raise KeyboardInterrupt(*stopped.args) from None
    finally:
        if signal.getsignal(signal.SIGINT) is not signal.SIG_DFL:  # there was no Ctrl-C
            signal.signal(signal.SIGINT, signal.default_int_handler)
    return found
