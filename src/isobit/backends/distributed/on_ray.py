"""Stages of a pipeline that are actors on a cluster of Ray.

Ray places them, each on a machine that has room, and starts one again that has died. What the new
one lacks is the KV cache of its layers: whoever asked is told by CacheLost, and runs again what was
in it.
"""

from __future__ import annotations

import os
import re
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from isobit.backend_names import OWN_GPU
from isobit.backends import open_backend
from isobit.backends.base import Backend, Batch, Results, Wanted
from isobit.backends.distributed.pipeline import LocalStage, StageInfo, TracedStages
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable, CacheLost, IsobitError, UsageError
from isobit.model.checkpoint import open_model
from isobit.model.weights import Weights

try:
    import ray
    from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
except ImportError as error:
    raise UsageError(f"{error.name}: not installed: pip install '.[ray]'") from None

_PATIENCE = 300.0  # seconds until a stage that has died is there again
_ROOM = 30.0  # seconds until there is room for all stages
_PAUSE = 0.5  # seconds between two looks


def connect() -> bool:
    """Connect to RAY_ADDRESS, to a cluster of this machine, or to one that begins here; False if
    this process was connected before. Raises BackendUnavailable."""
    if ray.is_initialized():
        return False
    _reach(os.environ.get("RAY_ADDRESS", ""))
    try:
        ray.init(logging_level="ERROR", log_to_driver=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise BackendUnavailable(f"ray: expected a cluster, got: {error}") from None
    return True


def _reach(address: str) -> None:
    """Raise BackendUnavailable for a HOST:PORT where nobody is: Ray itself asks for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "/" not in host:
        try:
            socket.create_connection((host, int(port)), 5).close()
        except (OSError, OverflowError) as error:
            raise BackendUnavailable(f"RAY_ADDRESS: no cluster at {address}: {error}") from None


class StageActor:
    """The actor: some layers of a model."""

    def __init__(self, path: str, backend: str, engine: EngineConfig, cut: tuple[int, int]) -> None:
        self._life = uuid.uuid4().hex
        self._stage: LocalStage | None = None
        self._refused: tuple[str, int] | None = None

        def make(weights: Weights, engine: EngineConfig) -> Backend:
            return open_backend(backend, weights, engine)

        try:
            weights = Weights.from_file(open_model(Path(path)))
            self._stage = LocalStage(make, weights, engine, cut)
        except IsobitError as error:
            self._refused = str(error), error.exit_code

    def about(self) -> tuple[str, StageInfo | tuple[str, int]]:
        """Which of its lives this is, and what it has, or why it cannot and an exit code."""
        return self._life, self._stage.about if self._stage else self._refused or ("", 1)

    def run(
        self, life: str, batch: Batch, wanted: Wanted, stages: frozenset[str] | None
    ) -> tuple[Results, TracedStages] | None:
        """See Stage; None if it is not that life's."""
        if life != self._life or self._stage is None:
            return None
        return self._stage.run(batch, wanted, stages)


def start(places: Sequence[str], weights: Weights, engine: EngineConfig) -> list[RayStage]:
    """Stages, each ``ray:FIRST:END@BACKEND``, which begin to load: their ``about`` waits for it.

    Raises UsageError if there is no room for all of them, BackendUnavailable.
    """
    if weights.file is None:
        raise UsageError("stages: expected a model from a file, got one made in memory")
    asked = []
    for place in places:
        found = re.fullmatch(r"ray:(\d{1,6}):(\d{1,6})@([a-z]+(?::[a-z]+)?)", place)
        if found is None:
            raise UsageError(
                f"stages: expected ray:FIRST:END@BACKEND, such as ray:0:24@cuda; got {place!r:.60}"
            )
        asked.append(((int(found[1]), int(found[2])), found[3]))
    connect()
    own = replace(engine, threads=engine.threads or 1, stages=(), stage_key=b"")
    needs = [{"CPU": own.cores} | ({"GPU": 1} if b in OWN_GPU else {}) for _, b in asked]
    group = placement_group(needs, strategy="SPREAD")
    if not group.wait(_ROOM):
        remove_placement_group(group)
        room = ", ".join(f"{n:g} {what}" for what, n in sorted(ray.cluster_resources().items()))
        raise UsageError(
            f"stages: expected room for {needs} in the cluster, all of which is {room}"
        )
    made = ray.remote(StageActor)
    stages = []
    for i, (place, (cut, backend)) in enumerate(zip(places, asked, strict=True)):
        where = PlacementGroupSchedulingStrategy(group, i)
        gpus = needs[i].get("GPU", 0)
        actor = made.options(
            num_cpus=own.cores, num_gpus=gpus, max_restarts=-1, scheduling_strategy=where
        ).remote(str(weights.file.path.resolve()), backend, own, cut)
        stages.append(RayStage(place, actor, group))
    return stages


class RayStage:
    """A stage that is an actor, from here."""

    def __init__(self, place: str, actor: Any, group: Any) -> None:
        """``group``: the placement group of all stages."""
        self._place, self._actor, self._group = place, actor, group
        self._about: StageInfo | None = None

    @property
    def about(self) -> StageInfo:
        """See Stage. Raises what loading it did."""
        if self._about is None:
            self._meet()
        assert self._about is not None
        return self._about

    def run(
        self, batch: Batch, wanted: Wanted, stages: frozenset[str] | None
    ) -> tuple[Results, TracedStages]:
        """See Stage. Raises CacheLost once it is there again, if it has died."""
        found: tuple[Results, TracedStages] | None = None
        try:
            found = ray.get(self._actor.run.remote(self._life, batch, wanted, stages))
        except RayActorError:
            pass
        except RayTaskError as error:
            if isinstance(error.cause, IsobitError):
                raise error.cause from None
            raise
        if found is None:
            self._meet()
            raise CacheLost(f"stage {self._place}: it was started again, without its KV cache")
        return found

    def close(self) -> None:
        """See Stage."""
        if ray.is_initialized():
            remove_placement_group(self._group)  # all of them end

    def _meet(self) -> None:
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                self._life, about = ray.get(self._actor.about.remote())
                break
            except RayActorError as error:
                if not isinstance(error, ActorUnavailableError) or time.monotonic() > until:
                    raise BackendUnavailable(f"stage {self._place}: it has ended") from None
                time.sleep(_PAUSE)
        if not isinstance(about, StageInfo):
            refused = IsobitError(f"stage {self._place}: {about[0]}")
            refused.exit_code = about[1]
            raise refused
        self._about = about
