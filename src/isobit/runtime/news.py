"""Waking those who wait in an event loop for what the engine's thread gives them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol
from weakref import WeakKeyDictionary, ref

_of_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, News] = WeakKeyDictionary()


class Source(Protocol):
    """What something comes from: a generation."""

    @property
    def ready(self) -> bool:
        """Whether there is something to take."""

    @property
    def ended(self) -> bool:
        """Whether no more will come."""


class News:
    """Of one event loop. However many wait in it, a pass wakes it once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)
        self._waiting: dict[asyncio.Future[None], Sequence[Source]] = {}

    @classmethod
    def here(cls) -> News:
        """That of the running loop."""
        loop = asyncio.get_running_loop()
        news = _of_loop.get(loop)
        if news is None:
            news = _of_loop[loop] = cls(loop)
        return news

    async def wait(self, sources: Sequence[Source]) -> None:
        """Until one of these has something to take, or has ended; not if one has already."""
        if not _any(sources):
            future = asyncio.get_running_loop().create_future()
            self._waiting[future] = sources
            try:
                await future
            finally:
                self._waiting.pop(future, None)

    def tell(self) -> None:
        """From any thread, as a generation's ``listen``: there may be something new."""
        loop = self._loop()
        if loop is not None:
            with suppress(RuntimeError):  # it is closed, and so nobody waits
                loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        for future, sources in self._waiting.items():
            if not future.done() and _any(sources):
                future.set_result(None)


def _any(sources: Sequence[Source]) -> bool:
    return any(source.ready or source.ended for source in sources)
