"""Verifying one backend against another, the oracle or another engine, without saved traces.

Both run at the same time and hand over stage by stage, so that only a few tensors of either are
held, however large the model.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import numpy as np

from isobit.backends.base import I32
from isobit.errors import FileRefused, NothingCompared, UsageError
from isobit.model.checkpoint import open_model
from isobit.model.graph import Key
from isobit.model.weights import Weights
from isobit.numerics import VERSION
from isobit.runtime.model import Model, locate
from isobit.verify.arithmetic import Arithmetic, Array, Float64Arithmetic, SpecArithmetic
from isobit.verify.compare import Comparer
from isobit.verify.diff import Diff
from isobit.verify.replay import Replay
from isobit.verify.trace import ModelRun, Recordable, check_layers, check_tokens, pieces
from isobit.verify.trace_file import Manifest, where

_AHEAD = 8  # stages one run may be ahead of the other
Item = tuple[str, int | None, I32, Array]
"""(stage, layer, positions int32 [T], value [T, …])"""


def verify(
    x: Model,
    y: Recordable,
    tokens: Sequence[int],
    layers: range | None = None,
    progress: Callable[[str, int | None], None] | None = None,
    *,
    histograms: bool = False,
) -> Diff:
    """Run x and y over the same tokens and compare every stage as it comes.

    Against another ``ModelRun`` bits are compared, and each difference is replayed in y's
    arithmetic: a faulty operation or a propagated error. Against anything else the result is an
    accuracy, with each operation's own error beside the accumulated one. ``layers`` limits what is
    reported, not what is run. Raises NothingCompared if a stage is missing.
    """
    ids = x.checked(tokens)
    check_layers(layers, x.config.n_layers)
    run_x = ModelRun(x)
    arithmetic: Arithmetic = Float64Arithmetic()
    exact = isinstance(y, ModelRun)
    chunk = x.engine.chunk
    if isinstance(y, ModelRun):
        if y.model is x:
            raise UsageError("verify: expected two loaded models, got one twice")
        arithmetic = SpecArithmetic(y.model.engine.planes)
        chunk = min(chunk, y.model.engine.chunk)
    graph = run_x.graph.showing(y.graph.stages)  # what both have
    replay = Replay(graph, arithmetic)
    with ThreadPoolExecutor() as pool:  # each reads its whole file, for its digest
        about_x, about_y = pool.map(lambda run: run.manifest(ids), (run_x, y))
    comparer = Comparer(
        about_x, about_y, replay, layers=layers, accuracy=not exact, histograms=histograms
    )
    stages = frozenset(graph.names) - graph.on_request
    start = -1
    step = run_x.steps or (isinstance(y, ModelRun) and y.steps)
    together = side_by_side([run_x, y], ids, chunk, stages, step=step)
    for (stage, layer, positions, a), (_, _, _, b) in together:
        if int(positions[0]) != start:
            start = int(positions[0])
            comparer.start(np.array(ids, np.int32)[positions], positions)
        comparer.add(stage, layer, a, b)
        if progress is not None:
            progress(stage, layer)
    if not comparer.diff.stages:
        raise NothingCompared("expected stages that both runs give, got none")
    return comparer.diff


def side_by_side(
    sources: Sequence[Recordable],
    ids: list[int],
    chunk: int,
    stages: frozenset[str],
    *,
    step: bool = False,
) -> Iterator[list[Item]]:
    """Run all sources at once and yield each stage as all of them have it.

    Raises NothingCompared unless each emits every one of ``stages`` that the graphs of all have, of
    every layer and token, in graph order; where all leave out the same, they would agree on
    nothing.
    """
    common = set[Key].intersection(*(set(s.graph.stages) for s in sources))
    keys = [key for key in sources[0].graph.stages if key[0] in stages and key in common]
    with ExitStack() as stack:
        streams = [stack.enter_context(_Stream(s, ids, chunk, stages, keys, step)) for s in sources]
        for start, stop in pieces(len(ids), chunk, step=step):
            for key in keys:
                yield [_expected(s.next(), key, start, stop - start) for s in streams]
        for stream in streams:
            if (item := stream.next()) is not None:
                raise NothingCompared(f"expected the end of a run, got {where(item[0], item[1])}")


def _expected(item: Item | None, key: Key, start: int, tokens: int) -> Item:
    if item is not None:
        stage, layer, positions, value = item
        if (stage, layer) == key and int(positions[0]) == start and len(value) == tokens:
            return item
    got = "the end" if item is None else f"{len(item[3])} from {where(item[0], item[1])}"
    raise NothingCompared(
        f"{where(*key)}: expected values of {tokens} tokens from every run, got {got}"
    )


class _Stopped(Exception):
    """Ends a run whose values nobody wants any more."""


class _Stream:
    """A run in a thread of its own, its values taken one by one."""

    def __init__(
        self,
        source: Recordable,
        ids: list[int],
        chunk: int,
        stages: frozenset[str],
        keys: Sequence[Key],
        step: bool,
    ) -> None:
        self._keys, self._step = frozenset(keys), step
        self._queue: queue.Queue[Item | BaseException | None] = queue.Queue(_AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(source, ids, chunk, stages))

    def next(self) -> Item | None:
        """The next value, or None at the end; raises what the run raised."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def _run(self, source: Recordable, ids: list[int], chunk: int, stages: frozenset[str]) -> None:
        with suppress(_Stopped):
            try:
                source.run(ids, chunk, stages, self._emit, step=self._step)
            except _Stopped:
                return
            except BaseException as error:  # raised again by next()
                self._put(error)
            self._put(None)

    def _emit(self, stage: str, layer: int | None, positions: I32, value: Array) -> None:
        if (stage, layer) in self._keys:
            self._put((stage, layer, positions, value))

    def _put(self, item: Item | BaseException | None) -> None:
        while True:
            if self._stopped.is_set():
                raise _Stopped
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def __enter__(self) -> "_Stream":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopped.set()
        self._thread.join()


def open_replay(path: str, b: Manifest) -> Replay:
    """A replay of traces measured against ``b``: in its bits, or float64 for another engine.

    Raises FileRefused if model or arithmetic are not those that ``b`` was recorded from.
    """
    if b.numerics not in (None, VERSION):
        raise FileRefused(
            f"replay: expected a trace of numerics version {VERSION}, got {b.numerics}"
        )
    with open_model(locate(path)) as file:
        if b.model_sha256 is not None and b.model_sha256 != file.sha256():
            raise FileRefused(f"{path}: expected the model of the trace, {b.model_sha256}")
        weights = Weights.from_file(file)  # its views keep the map open
    check_tokens(b.tokens, weights.config)
    if b.numerics is None or b.activation_bits is None:
        return Replay(weights.graph, Float64Arithmetic())
    return Replay(weights.graph, SpecArithmetic(b.activation_bits // 8))
