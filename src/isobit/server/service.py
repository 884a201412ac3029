"""The engine behind the server: its thread, its name and its counts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from isobit import numerics
from isobit.runtime.engine import Engine
from isobit.runtime.model import Model
from isobit.runtime.scheduler import Limits
from isobit.server.errors import ShuttingDown
from isobit.server.metrics import Metrics

_BESIDE = 64  # requests inside that generate nothing, or are being read


class Service:
    """One model, served. A context manager: the engine's thread runs within it."""

    def __init__(
        self,
        model: Model,
        *,
        name: str | None = None,
        api_key: str | None = None,
        front_key: str | None = None,
        limits: Limits | None = None,
        page: bool = True,
        origins: Sequence[str] = (),
    ) -> None:
        """Reads all of the model's file if its digest is not known yet.

        api_key: what clients must give. front_key: what a front must give to be told tokens.
        page: there is a page at ``/``; its files need no key. origins: of the pages elsewhere
        whose scripts a browser lets in; "*" for any.
        """
        self.model = model
        self.name = name or model.path.stem
        self.api_key = api_key
        self.front_key = front_key
        self.page = page
        self.origins = tuple(origins)
        self._engine = model.generations
        if limits is not None:
            self._engine.limit(limits)
        self.limits = self._engine.scheduler.limits
        self.most_inside = self.limits.requests + _BESIDE
        """Requests that are answered at the same time; more are told to come again."""
        self.created = int(time.time())
        bits = model.engine.activation_bits
        self.fingerprint = (
            f"isobit-n{numerics.VERSION}-s{numerics.SAMPLING_VERSION}-a{bits}-"
            f"{model.file.sha256()[:16]}"
        )
        self.draining = False
        """Whether it takes no more requests, as it is being shut down."""
        self.streams: dict[str, Callable[[], None]] = {}
        """What ends each answer that streams, by its name."""
        self._ended = False
        self.metrics = Metrics(self._engine, self.name)

    @property
    def engine(self) -> Engine:
        """What answers. Raises ShuttingDown once that has ended: of a request that came in before
        and was still being read, nobody would run what it asks for."""
        if self._ended:
            raise ShuttingDown
        return self._engine

    @property
    def ready(self) -> bool:
        """Whether a request would be answered: the engine runs, and is not being shut down, and so
        does the device."""
        return self._engine.serving and not self.draining and self.model.backend.lost is None

    def count(self, route: str, status: int) -> None:
        """A request was answered."""
        self.metrics.requests.labels(route, str(status)).inc()

    async def end(self) -> None:
        """End what is being answered, in the event loop that answers."""
        self._ended = True
        await asyncio.to_thread(self._engine.stop)

    def __enter__(self) -> Self:
        self._engine.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._engine.stop()
