"""Waking those who wait in an event loop for what the engine's thread gives them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from math import inf
from operator import methodcaller
from typing import Protocol
from weakref import WeakKeyDictionary, ref

_TICK = 1.0  # seconds between two looks at who has waited long enough

_by_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, LoopWaker] = WeakKeyDictionary()


class Waitable(Protocol):
    """What something comes from: a generation."""

    def has_news(self) -> bool:
        """Whether there is something to take, or no more will come."""


class LoopWaker:
    """A listener of one event loop. However many wait in it, a pass wakes it once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)
        self._said = threading.Event()
        self._waiting: dict[asyncio.Future[bool], tuple[Sequence[Waitable], float]] = {}
        """What each waits for, and until when."""
        self._ticks = False

    @classmethod
    def of_running_loop(cls) -> LoopWaker:
        """That of the running loop."""
        loop = asyncio.get_running_loop()
        news = _by_loop.get(loop)
        if news is None:
            news = _by_loop[loop] = cls(loop)
        return news

    async def wait(self, sources: Sequence[Waitable], seconds: float = inf) -> bool:
        """Until one of these has something to take or has ended, which is True; or so long."""
        if _any(sources):
            return True
        loop = asyncio.get_running_loop()
        future: asyncio.Future[bool] = loop.create_future()
        self._waiting[future] = sources, loop.time() + seconds
        if not self._ticks and seconds < inf:
            self._tick(loop)
        try:
            return await future
        finally:
            del self._waiting[future]

    def notify(self) -> None:
        """From any thread: there may be something new."""
        self._said.clear()
        loop = self._loop()
        try:
            if loop is not None:
                loop.call_soon_threadsafe(self._look)
                return
        except RuntimeError:  # it is closed, and so nobody waits
            pass
        self._said.set()

    def wait_taken(self, seconds: float) -> None:
        """From the thread that notified: until those who waited wait again, or so long."""
        self._said.wait(seconds)

    def _look(self) -> None:
        for future, (sources, _) in self._waiting.items():
            if _any(sources) and not future.done():
                future.set_result(True)
        # They run before what is called now, and what they write is sent before the next round.
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, self._said.set)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        """One timer for all: to set one for each token would cost more than to wait for it."""
        now = loop.time()
        for future, (_, end) in self._waiting.items():
            if end <= now and not future.done():
                future.set_result(False)
        left = min((end for _, end in self._waiting.values()), default=inf) - now
        self._ticks = left < inf
        if self._ticks:
            loop.call_later(min(max(left, 0.0), _TICK), self._tick, loop)


_has_news = methodcaller("has_news")


def _any(sources: Sequence[Waitable]) -> bool:
    return any(map(_has_news, sources))
