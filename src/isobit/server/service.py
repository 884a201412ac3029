"""The engine behind the server: its thread, its name and its counts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from isobit import numerics
from isobit.runtime.model import Model
from isobit.runtime.scheduler import Limits
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
        limits: Limits | None = None,
        page: bool = True,
        origins: Sequence[str] = (),
    ) -> None:
        """Reads all of the model's file if its digest is not known yet.

        page: there is a page at ``/``; its files need no key. origins: of the pages elsewhere
        whose scripts a browser lets in; "*" for any.
        """
        self.model = model
        self.name = name or model.path.stem
        self.api_key = api_key
        self.page = page
        self.origins = tuple(origins)
        self.engine = model.generations
        if limits is not None:
            self.engine.limit(limits)
        limits = self.engine.scheduler.limits
        self.most_inside = limits.running + limits.waiting + _BESIDE
        """Requests that are answered at the same time; more are told to come again."""
        self.created = int(time.time())
        planes = 8 * model.engine.activation_planes
        self.fingerprint = (
            f"isobit-n{numerics.VERSION}-s{numerics.SAMPLING_VERSION}-a{planes}-"
            f"{model.file.sha256()[:16]}"
        )
        self.draining = False
        """Whether it takes no more requests, as it is being shut down."""
        self.metrics = Metrics(self.engine, self.name)

    @property
    def ready(self) -> bool:
        """Whether a request would be answered: the engine runs, and is not being shut down."""
        return self.engine.serving and not self.draining

    def __enter__(self) -> Self:
        self.engine.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.engine.stop()
