"""Replicas that a front starts on its own machine: started again when they die or hang, or one by
one."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from isobit.errors import IsobitError
from isobit.server.front.replicas import Replica, Replicas

_LONGEST_PAUSE = 30.0  # seconds before one that dies again and again is started again
_LIVED = 60.0  # seconds, after which it starts at once
_HANGS = 30.0  # seconds that one is lost, until it is killed
_LATE = 10.0  # seconds beyond its grace, for one that was told to end


class Processes:
    """So many processes, each with a socket of its own; ``start`` them, and ``stop`` them."""

    def __init__(
        self, argv: Sequence[str], n: int, grace: float, key: str, say: Callable[[str], None]
    ) -> None:
        """``argv``: of an ``isobit serve``. ``key``: what they know their front by."""
        self._argv = argv
        self._grace = grace
        self._key = key
        self._say = say
        self._sockets = [_listening() for _ in range(n)]
        self.urls = [f"http://127.0.0.1:{s.getsockname()[1]}" for s in self._sockets]
        self._running: list[asyncio.subprocess.Process | None] = [None] * n
        self._keeping: list[asyncio.Task[None]] = []
        self._ready = False
        self._ending = asyncio.Event()
        self._rolling = asyncio.Lock()

    async def start(self, replicas: Replicas) -> None:
        """Start all; returns when they are ready. Raises what one of them ended with."""
        self._replicas = replicas
        self._keeping = [asyncio.create_task(self._keep(i)) for i in range(len(self.urls))]
        while not all(r.up for r in replicas.all):
            await asyncio.wait(
                [*self._keeping, asyncio.create_task(asyncio.sleep(0.1))],
                return_when=asyncio.FIRST_COMPLETED,
            )
            for task in self._keeping:
                if task.done():
                    task.result()
        self._ready = True

    async def roll(self) -> None:
        """Start one after the other again; their streams go on elsewhere."""
        async with self._rolling:
            for i, replica in enumerate(self._replicas.all):
                await self._again(i, replica)
            self._say("all replicas were started again")

    async def _again(self, i: int, replica: Replica) -> None:
        await self._until(lambda: replica.up)
        replica.draining, was = True, self._running[i]
        try:
            self._end(i)
            # Not that it is down: it may be up again before anyone looks.
            await self._until(lambda: self._running[i] not in (None, was))
            await self._until(lambda: replica.up)
        finally:
            replica.draining = False

    async def stop(self) -> None:
        """End all, with what they are answering."""
        self._ending.set()
        for i in range(len(self.urls)):
            self._end(i)
        if self._keeping:
            _, late = await asyncio.wait(self._keeping, timeout=self._grace + _LATE)
            for i, process in enumerate(self._running):
                if self._keeping[i] in late and process is not None:
                    with suppress(ProcessLookupError):
                        process.kill()
            await asyncio.gather(*self._keeping, return_exceptions=True)
        for s in self._sockets:
            s.close()

    def _end(self, i: int) -> None:
        process = self._running[i]
        if process is not None:
            with suppress(ProcessLookupError):
                process.terminate()

    async def _until(self, there: Callable[[], bool]) -> None:
        while not there() and not self._ending.is_set():
            await asyncio.sleep(0.05)

    async def _keep(self, i: int) -> None:
        """Have one run until all are to end."""
        replica, pause = self._replicas.all[i], 0.0
        while not self._ending.is_set():
            begun, code = time.monotonic(), 0
            try:
                process = self._running[i] = await self._start(i)
                if self._ending.is_set():  # meanwhile, when there was nothing to end
                    self._end(i)
                code = await self._ended(process, replica)
                ended = f"ended with {code}"
            except OSError as error:  # no memory, no files left: there may be later
                ended = f"could not be started ({error})"
            self._running[i] = None
            await replica.missed(f"its process {ended}", at_once=True)
            if self._ending.is_set() or (replica.draining and code == 0):
                continue
            if not self._ready:
                refused = IsobitError(f"replica {i}: expected it to be ready, it {ended}")
                refused.exit_code = code if code > 0 else refused.exit_code
                raise refused
            self._say(f"replica {i} {ended}: starting it again")
            pause = 0.0 if time.monotonic() - begun > _LIVED else min(2 * pause + 1, _LONGEST_PAUSE)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), pause)

    async def _ended(self, process: asyncio.subprocess.Process, replica: Replica) -> int:
        """A process's exit code. One that hangs is killed: it was ready, and says nothing for
        long."""
        ending, ready = asyncio.ensure_future(process.wait()), False
        spoke = time.monotonic()
        while not (await asyncio.wait([ending], timeout=1))[0]:
            ready = ready or replica.up
            if not ready or not replica.silent:
                spoke = time.monotonic()
            elif time.monotonic() - spoke > (self._grace + _LATE if replica.draining else _HANGS):
                self._say(f"{replica.url}: does not answer: it is killed")
                with suppress(ProcessLookupError):
                    process.kill()
        return ending.result()

    async def _start(self, i: int) -> asyncio.subprocess.Process:
        fd = self._sockets[i].fileno()
        environment = os.environ | {"ISOBIT_FRONT_KEY": self._key}
        devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if len(devices) > 1:
            environment["CUDA_VISIBLE_DEVICES"] = devices[i % len(devices)]
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "isobit", *self._argv, "--replica", str(fd)),
            stdin=asyncio.subprocess.PIPE,  # they end when it closes
            pass_fds=[fd],
            env=environment,
            start_new_session=True,  # a Ctrl-C is the front's
        )


def _listening() -> socket.socket:
    """A socket that outlives the process that answers there."""
    s = socket.socket()
    s.bind(("127.0.0.1", 0))
    s.listen(1024)
    return s
