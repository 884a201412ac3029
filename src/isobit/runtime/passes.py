"""Passes of a model over sequences: the engine room behind ``Model``."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from isobit.backends import open_backend, warn
from isobit.backends.base import F32, I32, LOGITS, Backend, Batch, Results, Tap, Wanted
from isobit.backends.cpu._cpu import forget_mapping, name_mapping
from isobit.backends.cpu.sampler import RowSampler
from isobit.config import EngineConfig, ModelConfig
from isobit.errors import ModelRefused, UsageError
from isobit.hub import find
from isobit.machine import total_memory
from isobit.model.checkpoint import open_model
from isobit.model.graph import Graph
from isobit.model.weights import Weights
from isobit.runtime import kv_cache

if TYPE_CHECKING:
    from isobit.runtime.generation import Watcher

_LOOK = 0.1
"""Seconds between two looks at the model's file."""
_GONE = "expected the file to stay as it was opened, got a part that cannot be read; load it again"
SAMPLE = "pycoder-moe-33m-Q4_K_M.gguf"


def sample_path() -> Path:
    """The sample model that ships inside the package."""
    return Path(str(resources.files("isobit") / "data" / SAMPLE))


def locate(model: str | Path, note: Callable[[str], None] | None = None) -> Path:
    """The file of a model by its name: ``"sample"``, a path, or what `isobit.hub.find` knows.

    What the hub has and this machine has not is downloaded. Raises UsageError, ModelRefused.
    """
    if isinstance(model, str) and model == "sample":
        return sample_path()
    return find(model, note)


class Passes:
    """A model file on a backend, with a KV cache. A context manager; safe to use from threads."""

    def __init__(
        self,
        path: str | Path,
        backend: str,
        engine: EngineConfig,
        note: Callable[[str], None] | None = None,
    ) -> None:
        if not isinstance(path, (str, os.PathLike)) or not isinstance(backend, str):
            what, found = (
                ("backend", backend) if isinstance(path, (str, os.PathLike)) else ("model", path)
            )
            raise UsageError(f"{what}: expected a name or path, got {type(found).__name__}")
        self.file = open_model(locate(path, note))
        self.path = self.file.path  # of a split model the first part, whichever was named
        try:
            weights = Weights.from_file(self.file)
            self.config: ModelConfig = weights.config
            self.graph: Graph = weights.graph
            self.engine = engine
            for file, data in self.file.mapped:
                name_mapping(data, f"isobit: error: {str(file)!r}: {_GONE}")
            self._whole_at = time.monotonic()
            self._begin()
            self._lock = threading.Lock()  # held while the backend works
            self._closed = False
            self.backend: Backend = open_backend(backend, weights, engine, note or warn)
            limits = self.backend.limits
            self.context, self._pages = limits.positions, limits.pages
            states = limits.states if self.graph.recurrent else None
            self._pool = kv_cache.PagePool(self._pages, states)
            memory = total_memory()
            if self.backend.on_host and self.file.file_size > memory:
                (note or warnings.warn)(
                    f"{self.path}: {self.file.file_size / 1e6:.0f} MB of weights in "
                    f"{memory / 1e6:.0f} MB of memory: the system will page, reading them from "
                    "disk again and again"
                )
        except BaseException:
            self.file.close()
            raise

    def _begin(self) -> None:
        """Work to be done beside the backend, which mostly waits as it loads."""

    def new_sequence(self) -> kv_cache.Sequence:
        """An empty sequence with its own KV cache pages."""
        return kv_cache.Sequence(self._pool, self.context)

    def forward(
        self,
        sequence: kv_cache.Sequence,
        ids: Sequence[int],
        logit_rows: Sequence[int],
        tap: Tap | None = None,
        stages: frozenset[str] | None = None,
    ) -> F32:
        """Append ids to a sequence in one pass; logits float32 [len(logit_rows), vocabulary].

        The logits are as the backend gave them, finite or not: a trace wants to see them.
        """
        return _logits(self._run(sequence, ids, logit_rows, tap, stages))

    def run(
        self,
        sequence: kv_cache.Sequence,
        ids: Sequence[int],
        logit_rows: Sequence[int],
        tap: Tap | None = None,
        stages: frozenset[str] | None = None,
    ) -> F32:
        """:meth:`forward`, refusing logits that are not finite."""
        results = self._run(sequence, ids, logit_rows, tap, stages)
        if not results.finite.all():
            raise self._damaged()
        return _logits(results)

    def _run(
        self,
        sequence: kv_cache.Sequence,
        ids: Sequence[int],
        logit_rows: Sequence[int],
        tap: Tap | None,
        stages: frozenset[str] | None,
    ) -> Results:
        tokens = self._tokens(ids)
        positions, pages = sequence.extend(len(ids))
        batch = Batch(
            tokens=tokens,
            positions=positions,
            sequence=np.zeros(len(ids), np.int32),
            pages=pages[None, :],
            logit_rows=np.array(logit_rows, np.int32),
            states=np.array([sequence.state], np.int32) if self.graph.recurrent else None,
        )
        try:
            return self.run_batch(batch, LOGITS, tap, stages)
        except BaseException:
            sequence.undo(len(ids))
            raise

    @property
    def rows(self) -> RowSampler:
        """Works on rows of logits."""
        return self.backend.rows

    def run_batch(
        self,
        batch: Batch,
        wanted: Wanted = LOGITS,
        tap: Tap | None = None,
        stages: frozenset[str] | None = None,
    ) -> Results:
        """One pass over what the caller has laid out; see :meth:`Backend.run`."""
        with self._lock:
            backend = self._open_backend()
            self._check_file()
            return backend.run(batch, wanted, tap, stages)

    def take_all_pages(self) -> list[int]:
        """The pages of the KV cache, for an engine, which gives them back when it is closed.

        Raises ContextFull if a sequence holds some of them.
        """
        return self._pool.take(self._pages)

    def give_pages_back(self, pages: list[int]) -> None:
        """Sequences may have them again."""
        self._pool.give_back(pages)

    def _tokens(self, ids: Sequence[int]) -> I32:
        tokens = np.asarray(ids, np.int64)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.config.vocab:
            raise UsageError(f"token id: expected 0 to {self.config.vocab - 1}, got another")
        return tokens.astype(np.int32)

    def _damaged(self) -> ModelRefused:
        return ModelRefused(
            f"{self.path}: expected finite logits, got NaN or infinity; the weights are damaged"
        )

    def prefill(
        self,
        sequence: kv_cache.Sequence,
        ids: Sequence[int],
        watch: Watcher | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> F32:
        """Run a prompt in chunks; logits of its last token, float32 [vocabulary].

        ``progress(done, total)`` is told after each chunk how many tokens were run.
        """
        if not len(ids):
            raise UsageError("prompt: expected at least one token, got none")
        chunk = self.engine.chunk
        tap, stages = (watch.tap, watch.stages) if watch is not None else (None, None)
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            last = start + chunk >= len(ids)
            logits = self.run(sequence, part, [len(part) - 1] if last else [], tap, stages)
            if progress is not None:
                progress(start + len(part), len(ids))
        last_row: F32 = logits[0]
        return last_row

    def step(self, sequence: kv_cache.Sequence, token: int, watch: Watcher | None = None) -> F32:
        """Run one token; its logits, float32 [vocabulary]."""
        tap, stages = (watch.tap, watch.stages) if watch is not None else (None, None)
        row: F32 = self.run(sequence, [token], [0], tap, stages)[0]
        return row

    def step_all(self, sequences: Sequence[kv_cache.Sequence], tokens: Sequence[int]) -> F32:
        """Run one token of each of several sequences together; float32 [sequences, vocabulary].

        The bits are those of :meth:`step` one by one; a row that is not finite refuses its own
        sequence alone, which is for the caller to see. The model must have been opened with that
        many ``max_sequences``.
        """
        n, done = len(sequences), 0
        try:
            places = []
            for sequence in sequences:
                places.append(sequence.extend(1))
                done += 1
            pages = np.zeros((n, max(len(p) for _, p in places)), np.int32)
            for row, (_, table) in zip(pages, places, strict=True):
                row[: len(table)] = table
            batch = Batch(
                tokens=self._tokens(tokens),
                positions=np.concatenate([p for p, _ in places]),
                sequence=np.arange(n, dtype=np.int32),
                pages=pages,
                logit_rows=np.arange(n, dtype=np.int32),
                states=np.array([s.state for s in sequences], np.int32),
            )
            logits = _logits(self.run_batch(batch))
        except BaseException:
            for sequence in sequences[:done]:
                sequence.undo(1)
            raise
        return logits

    def likeliest(self, sequence: kv_cache.Sequence, token: int) -> int:
        """Run one token and return the id of its largest logit, the lowest among equals.

        Raises ModelRefused if a logit is not finite.
        """
        tokens = self._tokens([token])
        positions, pages = sequence.extend(1)
        states = np.array([sequence.state], np.int32)
        try:
            with self._lock:
                backend = self._open_backend()
                self._check_file()
                chosen = backend.greedy(tokens, positions, pages[None], 1, states)
            if chosen[0, 0] < 0:
                raise self._damaged()
        except BaseException:
            sequence.undo(1)
            raise
        return int(chosen[0, 0])

    def close(self) -> None:
        """Free the backend and unmap the file, after the pass that another thread may be in."""
        with self._lock:
            if not self._closed:
                for _, data in self.file.mapped:
                    forget_mapping(data)
            self._closed = True
            self.backend.close()
            self.file.close()

    def _check_file(self) -> None:
        """Refuse a file that has become shorter; looks now and then."""
        now = time.monotonic()
        if self.backend.on_host and now > self._whole_at + _LOOK:
            self.file.check_whole()
            self._whole_at = now

    def _open_backend(self) -> Backend:
        if self._closed:
            raise UsageError(f"{self.path}: expected an open model, got a closed one")
        return self.backend

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _logits(results: Results) -> F32:
    assert results.logits is not None
    return results.logits
