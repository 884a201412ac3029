"""A model's file on a backend, its tokenizer, and passes over batches."""

from __future__ import annotations

import gc
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

from isobit import arguments
from isobit.arguments import token_ids, wrong
from isobit.backends import driver_held, open_backend, warn
from isobit.backends.base import ARGMAX, GREEDY, LOGITS, Backend, Batch, Results, Tap, Wanted
from isobit.backends.cpu._cpu import forget_mapping, name_mapping
from isobit.backends.cpu.sampler import RowSampler
from isobit.config import EngineConfig, ModelConfig
from isobit.errors import ModelRefused, UsageError, shown
from isobit.hub import find
from isobit.machine import total_memory
from isobit.model.checkpoint import open_model
from isobit.model.graph import Graph
from isobit.model.weights import Weights
from isobit.runtime.grammar import Grammars
from isobit.text.tokenizer import Tokenizer
from isobit.text.vocabulary import stop_ids

_GONE = "expected the file to stay as it was opened, got a part that cannot be read; load it again"
SAMPLE = "pycoder-moe-33m-Q4_K_M.gguf"


def sample_path() -> Path:
    """The sample model that ships inside the package."""
    return Path(__file__).parent.parent / "data" / SAMPLE


def locate(model: str | Path, note: Callable[[str], None] | None = None) -> Path:
    """The file of a model by its name: ``"sample"``, a path, or what `isobit.hub.find` knows.

    What the hub has and this machine has not is downloaded. Raises UsageError, ModelRefused.
    """
    if isinstance(model, str) and model == "sample":
        return sample_path()
    try:
        path = find(model, note)
        with suppress(FileNotFoundError, NotADirectoryError, ValueError):  # opening says it better
            path.stat()
    except OSError as error:
        raise ModelRefused(f"{shown(os.fspath(model))}: {error.strerror}") from None
    return path


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Python's collector stands still: it would look again and again through all that a load makes
    and keeps, a third of the time that this holds Python's lock."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class LoadedModel:
    """A model file on a backend, with a KV cache. A context manager; safe to use from threads."""

    @_no_garbage()
    def __init__(
        self,
        path: str | Path,
        backend: str,
        engine: EngineConfig,
        note: Callable[[str], None] | None = None,
    ) -> None:
        named = arguments.path("model", path)
        arguments.text("backend", backend)
        arguments.instance("engine", engine, EngineConfig, "an EngineConfig")
        arguments.function("note", note)
        self.located = locate(named, note)
        """What another process can open the same model by."""
        there = self.located.exists()
        with driver_held(backend, engine) if there else nullcontext():
            self._open(backend, engine, note)

    def _open(self, backend: str, engine: EngineConfig, note: Callable[[str], None] | None) -> None:
        self.file = open_model(self.located)
        self.path = self.file.path  # of a split model the first part, whichever was named
        try:
            weights = Weights.from_file(self.file)
            self.config: ModelConfig = weights.config
            self.graph: Graph = weights.graph
            self.engine = engine
            for file, data in self.file.mapped:
                name_mapping(data, f"isobit: error: {str(file)!r}: {_GONE}")
            self._tokenizer = _Beside(
                lambda: Tokenizer.from_metadata(self.file.metadata, str(self.path))
            )
            self._lock = threading.Lock()  # held while the backend works
            self._closed = False
            beside = self._tokenizer.begin
            self.backend: Backend = open_backend(backend, weights, engine, note or warn, beside)
            self.file.check_unchanged()  # what was read of it is what was opened
            self.context = self.backend.limits.positions
            memory = total_memory()
            if self.backend.on_host and self.file.file_size > memory:
                (note or warnings.warn)(
                    f"{self.path}: {self.file.file_size / 1e6:.0f} MB of weights in "
                    f"{memory / 1e6:.0f} MB of memory: the system will page, reading them from "
                    "disk again and again"
                )
        except BaseException:
            self._free()
            raise

    @property
    def tokenizer(self) -> Tokenizer:
        """The file's tokenizer. Raises ModelRefused if the file has none that is known."""
        return self._tokenizer()

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a generation: what the file says of them, with or without a tokenizer."""
        try:
            return self.tokenizer.stop_ids
        except ModelRefused:
            return stop_ids(self.file.metadata, self.config.vocab, str(self.path))

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text; special tokens written in it are recognised.

        Raises UsageError for what is no text, and for one that has more than 2 MiB without a space
        or line where it could be cut.
        """
        return self.tokenizer.encode(text, special=True)

    def detokenize(self, ids: Iterable[int]) -> str:
        """The text of token ids. Raises UsageError for ids that there are not."""
        return self.tokenizer.decode(ids)

    @cached_property
    def grammars(self) -> Grammars:
        """Compiles grammars that its answers can be held to."""
        return Grammars(self.tokenizer, self.config.vocab, self.stop_ids)

    def _ids(self, prompt: str | Sequence[int]) -> Sequence[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, special=True, most=self.context)
        return prompt

    def checked(self, ids: Sequence[int]) -> list[int]:
        """Token ids as a list of int; raises UsageError for none, unknown or too many."""
        found = token_ids("prompt", ids, self.context)
        if not found:
            raise UsageError("prompt: expected at least one token, got none")
        odd = next((i for i in found if not 0 <= i < self.config.vocab), None)
        if odd is not None:
            raise wrong("token id", f"0 to {self.config.vocab - 1}", odd)
        return found

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
            if self._closed:
                raise self.closed_error()
            self.check_file()
            greedy = GREEDY in self.backend.on_device and not self.backend.goes_ahead
            if wanted is ARGMAX and not stages and greedy:
                n = len(batch.pages)
                if len(batch.tokens) == len(batch.logit_rows) == n:  # a step of all
                    args = batch.tokens, batch.positions, batch.pages, 1, batch.states
                    ids = self.backend.greedy(*args)[0]
                    return Results(ids >= 0, argmax=ids)
            return self.backend.run(batch, wanted, tap, stages)

    def closed_error(self) -> UsageError:
        """What is said to whoever uses a closed model."""
        return UsageError(f"{self.path}: expected an open model, got a closed one")

    def close(self) -> None:
        """Free the backend and unmap the file, after the pass that another thread may be in."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._free()

    def _free(self) -> None:
        """What there is of it by now."""
        for _, data in self.file.mapped:
            forget_mapping(data)
        if hasattr(self, "backend"):
            self.backend.close()
        self.file.close()

    def check_file(self) -> None:
        """Refuse a file that has changed since it was opened, if passes read it."""
        if self.backend.reads_file:
            self.file.check_unchanged()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Beside:
    """Work in a thread of its own, if the system has one; a call gives what it gave or raised."""

    def __init__(self, work: Callable[[], Tokenizer]) -> None:
        self._work, self._lock = work, threading.Lock()
        self._found: Callable[[], Tokenizer] | None = None

    def begin(self) -> None:
        """Begin, unless it has."""
        with self._lock:
            if self._found is not None:
                return
            builder = ThreadPoolExecutor(1)
            try:
                self._found = builder.submit(self._work).result
            except RuntimeError:  # no thread
                self._found = cache(self._work)
            builder.shutdown(wait=False)

    def __call__(self) -> Tokenizer:
        self.begin()
        assert self._found is not None
        return self._found()
