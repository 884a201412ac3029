"""Servers of one model behind a front: which of them live, and which a request goes to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

import httpx

from isobit.errors import UsageError
from isobit.server.front.affinity import PrefixAffinity, prefix_hashes

_CHECK_SECONDS = 1.0
_ANSWER_SECONDS = 5.0  # for one check; so one that hangs is lost within 12 s
_MISSED = 2  # checks in turn, until a replica counts as lost

_SILENT = "does not answer"


def patience() -> httpx.Timeout:
    """Seconds: a replica is there soon, and answers whenever it does."""
    return httpx.Timeout(5.0, read=None, pool=None)


class Replica:
    """One server."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        """``headers``: those of the front's own requests. Raises UsageError for what is no URL."""
        self.url = url
        self.up = False
        self.draining = False
        """Whether it gets no more requests, as it is to be restarted."""
        self.running = 0
        """Requests that it answers for this front."""
        self.why = _SILENT
        self._missed = 0
        self._headers = headers
        try:
            self.client = self._new_client()
        except httpx.InvalidURL as error:
            raise UsageError(f"URL: expected http://HOST:PORT, got {url!r:.80}: {error}") from None

    async def check(self) -> dict[str, Any] | None:
        """Ask whether it is ready; what it says of itself, or None."""
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                ready = await self.client.get("/ready", headers=self._headers)
                found = await self.client.get("/version", headers=self._headers)
            if ready.status_code == found.status_code == 200:
                return dict(found.json())
            key = ": expected its ISOBIT_FRONT_KEY, and its API key, to be the front's"
            why = f"/ready gives {ready.status_code}{key if ready.status_code == 401 else ''}"
            # What it is answering it may go on with.
            self._missed, self.up, self.why = 0, False, why
        except (httpx.HTTPError, TimeoutError, ValueError, TypeError, RuntimeError) as error:
            refused = isinstance(error, httpx.ConnectError)
            await self.missed(str(error) or _SILENT, at_once=refused)
        return None

    @property
    def silent(self) -> bool:
        """Whether it is lost because it does not answer at all."""
        return self._missed >= _MISSED

    def found(self) -> None:
        """It answers."""
        self._missed, self.up, self.why = 0, True, ""

    async def missed(self, why: str, *, at_once: bool = False) -> None:
        """It does not answer; if it is lost, whoever waits for an answer of it is told."""
        self._missed += 1
        if at_once or self._missed >= _MISSED:
            self.up, self.why = False, why
            client, self.client = self.client, self._new_client()
            await client.aclose()  # what is read from it fails

    def _new_client(self) -> httpx.AsyncClient:
        timeout = patience()
        limits = httpx.Limits(
            max_connections=None, max_keepalive_connections=256, keepalive_expiry=2
        )
        return httpx.AsyncClient(base_url=self.url, timeout=timeout, limits=limits, trust_env=False)


class Replicas:
    """All of them; a context manager within which they are watched."""

    def __init__(
        self, urls: Sequence[str], say: Callable[[str], None], headers: dict[str, str]
    ) -> None:
        """``headers``: those of the front's own requests."""
        self.all = [Replica(url, headers) for url in urls]
        self.about: dict[str, Any] = {}
        """What the first that was found says of itself, and so must all."""
        self._say = say
        self._changed = asyncio.Event()
        self._ended = False
        self._affinity = PrefixAffinity[Replica]()
        self._watching: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Replicas:
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._watching is not None:
            self._watching.cancel()
            with suppress(asyncio.CancelledError):
                await self._watching
        for replica in self.all:
            await replica.client.aclose()

    async def _check(self, replica: Replica) -> None:
        was, why = replica.up, replica.why
        about = await replica.check()
        if about is not None:
            self.about = self.about or about
            names = sorted(self.about.keys() | about.keys())
            name = next((n for n in names if about.get(n) != self.about.get(n)), None)
            if name is None:
                replica.found()
            else:
                wanted, got = self.about.get(name), about.get(name)
                replica.up = False
                replica.why = f"expected a server of {name} {wanted!s:.80}, got one of {got!s:.80}"
        if replica.up != was or replica.why not in (why, _SILENT):
            self._say(f"{replica.url}: " + ("ready" if replica.up else f"not used: {replica.why}"))
        self._changed.set()

    async def _watch(self) -> None:
        while True:
            await asyncio.gather(*map(self._check, self.all))
            await asyncio.sleep(_CHECK_SECONDS)

    async def suspect(self, replica: Replica) -> None:
        """A request of it failed as those of a dead one do."""
        if replica.up:
            await self._check(replica)

    async def close(self) -> None:
        """End what is asked of them, and let nobody wait for one."""
        self._ended = True
        self._changed.set()
        for replica in self.all:
            await replica.missed("the front ends", at_once=True)

    async def choose(
        self, body: Any, seconds: float, tried: Collection[Replica] = ()
    ) -> Replica | None:
        """Where a request goes; waits so long for one that is up, None if none comes.

        tried: those that it should not go to, if there is another.
        """
        blocks = prefix_hashes(body)
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self._ended and not any(r.up and not r.draining for r in self.all):
                    self._changed.clear()
                    await self._changed.wait()
        up = [r for r in self.all if r.up and not r.draining]
        up = [r for r in up if r not in tried] or up
        if not up:
            return None
        chosen = self._affinity.find(blocks, {r: r.running for r in up})
        self._affinity.learn(blocks, chosen)
        return chosen
