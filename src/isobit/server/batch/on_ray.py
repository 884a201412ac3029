"""Workers of a batch on a cluster of Ray: each an actor with the model on a backend of its own.

Ray places them, and starts one again that has died. Workers of different backends stand beside one
another, since their answers have the same bits. What one of them was answering when it died is
asked of another; what was answered is in the file of answers already, which this process writes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from isobit.backend_names import OWN_GPU
from isobit.backends.distributed.on_ray import connect
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable, IsobitError, UsageError
from isobit.runtime.model import Model
from isobit.server.app import build
from isobit.server.batch.batch import limits_of, post
from isobit.server.service import Service
from isobit.verify.receipt import Receipt, replay

try:
    import ray
    from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError
except ImportError as error:
    raise UsageError(f"{error.name}: not installed: pip install '.[ray]'") from None

_TRIES = 5  # workers that a row may lose
_COMING = 60.0  # seconds that are given to workers that were not there yet
_PAUSE = 0.5  # seconds until a worker that has died is asked again whether it is back


class About(NamedTuple):
    """What a worker says of itself."""

    backend: str
    fingerprint: str
    notes: tuple[str, ...] = ()
    """What there is to know of how it runs."""
    refused: str = ""
    """Why it cannot run."""
    exit_code: int = 0


class Worker:
    """The actor."""

    def __init__(self, model: str, backend: str, engine: EngineConfig, at_once: int) -> None:
        notes: list[str] = []
        try:
            self._model = Model(model, backend, engine, notes.append)
            limits = limits_of(engine, at_once)
            self._service = Service(self._model, limits=limits)
            self._service.engine.start()
            self._app = build(self._service)
            self._about = About(
                self._model.backend.name, self._service.fingerprint, tuple(map(str, notes))
            )
        except IsobitError as error:
            self._about = About(backend, "", (), str(error), error.exit_code)

    async def about(self) -> About:
        """It is there."""
        return self._about

    async def ask(self, url: str, body: Any) -> tuple[int, Any]:
        """The answer to a row: its status and its body."""
        return await post(self._app, url, body)

    async def replay(self, receipt: Receipt) -> str | None:
        """The first thing that comes out otherwise."""
        found = await asyncio.to_thread(replay, receipt, self._model)
        return None if found is None else str(found)


@dataclass(eq=False)
class _Hired:
    """A worker, from here."""

    kind: str
    actor: Any
    about: About | None = None
    """None: it was not there yet."""
    up: bool = False
    running: int = 0


class Workers:
    """All of them; an asynchronous context manager, within which Ray is connected."""

    def __init__(
        self, model: str, engine: EngineConfig, at_once: int, say: Callable[[str], None]
    ) -> None:
        """``engine.threads``: of a worker, and the processors that it is given."""
        self._model = str(Path(model).resolve()) if Path(model).exists() else model
        self._engine = engine
        self._at_once = at_once
        self._say = say
        self._all: list[_Hired] = []
        self._changed = asyncio.Event()
        self._looking: set[asyncio.Task[None]] = set()
        self._failed: IsobitError | None = None
        self.fingerprint = ""

    async def __aenter__(self) -> Workers:
        """Connect: to RAY_ADDRESS, to a cluster of this machine, or to one that begins here."""
        mine = await asyncio.to_thread(connect)
        self._leave = ray.shutdown if mine else self.dismiss
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._looking:
            task.cancel()
        self._leave()

    async def hire(self, wanted: Mapping[str, int]) -> None:
        """So many workers of each backend; nothing said: one for each GPU of the cluster, else one
        for each machine. Returns when one is there.

        Raises UsageError if there is no room for all of them, and what a worker's start does.
        """
        machines = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
        if not wanted:
            gpus = int(sum(m.get("GPU", 0) for m in machines))
            wanted = {"cuda": gpus} if gpus else {"cpu": len(machines)}
            if not gpus and self._engine.threads is None:
                least = int(min(m.get("CPU", 1) for m in machines))
                self._engine = replace(self._engine, threads=max(least, 1))
        self._engine = replace(self._engine, threads=self._engine.threads or 1)
        kinds = [kind for kind, n in wanted.items() for _ in range(n)]
        for kind in kinds:
            needs = {"CPU": self._engine.cores, "GPU": int(kind in OWN_GPU)}
            machine = next(
                (m for m in machines if all(m.get(k, 0) >= n for k, n in needs.items())), {}
            )
            if not machine:
                raise UsageError(
                    f"workers: expected a cluster with room for {len(kinds)}, found none for one "
                    f"of {kind} that needs {needs['CPU']} CPU and {needs['GPU']} GPU"
                )
            for name, n in needs.items():
                machine[name] = machine.get(name, 0) - n
        for kind in kinds:
            actor = ray.remote(Worker).options(
                num_cpus=self._engine.cores,
                num_gpus=int(kind in OWN_GPU),
                max_restarts=-1,
                max_concurrency=1 << 10,
            )
            hired = _Hired(kind, actor.remote(self._model, kind, self._engine, self._at_once))
            self._all.append(hired)
            self._look(hired)
        await self._chosen(None)

    def dismiss(self) -> None:
        """End all workers."""
        for hired in self._all:
            ray.kill(hired.actor)
        self._all = []

    async def hire_others(self, backends: set[str], other: str) -> None:
        """Have workers of another kind than each of these, by one of ``other`` in place of all if
        there are none. Raises UsageError if that is none."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_COMING):
                while not self._failed and any(h.about is None for h in self._all):
                    self._changed.clear()
                    await self._changed.wait()
        if not self._differ(backends):
            self.dismiss()
            await self.hire({other: 1})
            if not self._differ(backends):
                raise UsageError(
                    f"audit_backend: expected another than {', '.join(sorted(backends))}, which "
                    f"answered, got {other}"
                )

    def _differ(self, backends: set[str]) -> bool:
        return all(self.backends - {backend} for backend in backends)

    def __len__(self) -> int:
        return len(self._all)

    @property
    def backends(self) -> set[str]:
        """Of the workers."""
        return {hired.about.backend for hired in self._all if hired.about}

    async def ask(self, url: str, body: Any) -> tuple[int, Any]:
        """The answer of the worker that has least to do. Raises BackendUnavailable."""
        found: tuple[int, Any] = await self._call("ask", url, body)
        return found

    async def replay(self, receipt: Receipt) -> str | None:
        """What comes out otherwise on a backend that is not the receipt's."""
        found: str | None = await self._call("replay", receipt, but=receipt.backend)
        return found

    async def _call(self, method: str, *args: Any, but: str | None = None) -> Any:
        for _ in range(_TRIES):
            hired = await self._chosen(but)
            hired.running += 1
            try:
                return await getattr(hired.actor, method).remote(*args)
            except RayActorError:
                if hired.up:
                    self._say(f"a worker of {hired.kind} has ended: others take its rows")
                    hired.up = False
                    self._look(hired)
            except RayTaskError as error:
                if isinstance(error.cause, IsobitError):
                    raise error.cause from None
                raise
            finally:
                hired.running -= 1
        raise BackendUnavailable(f"workers: {_TRIES} of them ended in turn over one row")

    async def _chosen(self, but: str | None) -> _Hired:
        """The least busy of those that are there."""
        while True:
            if self._failed:
                raise self._failed
            fit = [h for h in self._all if h.about is None or h.about.backend != but]
            if there := [h for h in fit if h.up]:
                return min(there, key=lambda h: h.running)
            if not fit:
                raise BackendUnavailable("workers: all have ended, for good")
            self._changed.clear()
            await self._changed.wait()

    def _look(self, hired: _Hired) -> None:
        """Ask a worker whether it is there, until it is."""
        task = asyncio.create_task(self._found(hired))
        self._looking.add(task)
        task.add_done_callback(self._looking.discard)

    async def _found(self, hired: _Hired) -> None:
        about = None
        while about is None:
            try:
                about = await hired.actor.about.remote()
            except ActorUnavailableError:
                await asyncio.sleep(_PAUSE)
            except RayActorError:  # for good
                if hired in self._all:
                    self._all.remove(hired)
                break
        else:
            self.fingerprint = self.fingerprint or about.fingerprint
            if about.refused:
                self._failed = IsobitError(f"a worker of {hired.kind}: {about.refused}")
                self._failed.exit_code = about.exit_code
            elif about.fingerprint != self.fingerprint:
                self._failed = UsageError(
                    f"workers: expected all to have {self.fingerprint}, one has {about.fingerprint}"
                )
            if hired.about is None:
                for note in about.notes:
                    self._say(f"a worker of {hired.kind}: {note}")
            hired.about, hired.up = about, True
        self._changed.set()
