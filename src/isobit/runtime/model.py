"""A loaded model: the library's front door."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from numbers import Integral
from operator import index
from pathlib import Path
from types import TracebackType
from typing import Unpack

import numpy as np

from isobit.backends import open_backend
from isobit.backends.base import F32, Backend, Batch, Tap
from isobit.config import EngineConfig, ModelConfig
from isobit.errors import ModelRefused, UsageError
from isobit.gguf.reader import GGUFFile, physical_memory
from isobit.model.graph import Graph
from isobit.model.weights import Weights
from isobit.numerics import TILE
from isobit.runtime import kv_cache
from isobit.runtime.generation import Completion, Settings, Stream, Watcher
from isobit.runtime.sampler import Sampling
from isobit.text.template import encode_chat
from isobit.text.tokenizer import Tokenizer

SAMPLE = "pycoder-moe-33m-Q4_K_M.gguf"


def sample_path() -> Path:
    """The sample model that ships inside the package."""
    return Path(str(resources.files("isobit") / "data" / SAMPLE))


class Model:
    """A model on a backend. A context manager; its methods may be called from several threads."""

    def __init__(
        self,
        path: str | Path,
        backend: str,
        engine: EngineConfig,
        note: Callable[[str], None] | None = None,
    ) -> None:
        self.path = sample_path() if str(path) == "sample" else Path(path)
        self.file = GGUFFile.open(self.path)
        try:
            weights = Weights.from_file(self.file)
            self.config: ModelConfig = weights.config
            self.graph: Graph = weights.graph
            self.engine = engine
            self.context = engine.context or self.config.context_length
            builder = ThreadPoolExecutor(1)  # beside the backend, which mostly waits as it loads
            self._tokenizer = builder.submit(
                Tokenizer.from_metadata, self.file.metadata, str(self.path)
            )
            builder.shutdown(wait=False)
            self._lock = threading.Lock()  # held while the backend works
            self._closed = False
            pages = -(-self.context // TILE) * engine.max_sequences
            self._pool = kv_cache.PagePool(pages)
            self.backend: Backend = open_backend(backend, weights, engine, note)
            memory = physical_memory()
            if self.backend.name in ("reference", "cpu") and self.file.file_size > memory:
                (note or warnings.warn)(
                    f"{self.path}: {self.file.file_size / 1e6:.0f} MB of weights in "
                    f"{memory / 1e6:.0f} MB of memory: the system will page, reading them from "
                    "disk again and again"
                )
        except BaseException:
            self.file.close()
            raise

    # Text

    @property
    def tokenizer(self) -> Tokenizer:
        """The file's tokenizer. Raises ModelRefused if the file has none that is known."""
        return self._tokenizer.result()

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text; special tokens written in it are recognised."""
        return self.tokenizer.encode(text, special=True)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self.tokenizer.decode(ids)

    # Passes

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
        positions, pages = sequence.extend(len(ids))
        batch = Batch(
            tokens=np.array(ids, np.int32),
            positions=positions,
            sequence=np.zeros(len(ids), np.int32),
            pages=pages[None, :],
            logit_rows=np.array(logit_rows, np.int32),
        )
        try:
            with self._lock:
                return self._open_backend().forward(batch, tap, stages)
        except BaseException:
            sequence.length -= len(ids)  # their keys and values may not all be there
            raise

    def run(
        self,
        sequence: kv_cache.Sequence,
        ids: Sequence[int],
        logit_rows: Sequence[int],
        tap: Tap | None = None,
        stages: frozenset[str] | None = None,
    ) -> F32:
        """:meth:`forward`, refusing logits that are not finite."""
        return self._finite(self.forward(sequence, ids, logit_rows, tap, stages))

    def _finite(self, logits: F32) -> F32:
        if not np.isfinite(logits).all():
            raise ModelRefused(
                f"{self.path}: expected finite logits, got NaN or infinity; the weights are damaged"
            )
        return logits

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

        The bits are those of :meth:`step` one by one. The model must have been opened with that
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
                tokens=np.array(tokens, np.int32),
                positions=np.concatenate([p for p, _ in places]),
                sequence=np.arange(n, dtype=np.int32),
                pages=pages,
                logit_rows=np.arange(n, dtype=np.int32),
            )
            with self._lock:
                logits = self._open_backend().forward(batch)
        except BaseException:
            for sequence in sequences[:done]:
                sequence.length -= 1
            raise
        return self._finite(logits)

    def likeliest(self, sequence: kv_cache.Sequence, token: int) -> int | None:
        """Run one token and return the id of its largest logit, the lowest among equals.

        None, and nothing is run, where the backend cannot spare the logits the way to the host.
        """
        greedy = getattr(self.backend, "greedy", None)
        if greedy is None:
            return None
        positions, pages = sequence.extend(1)
        chosen = None
        try:
            with self._lock:
                self._open_backend()
                chosen = greedy(np.array([token], np.int32), positions, pages[None], 1)
        finally:
            if chosen is None:  # not run, or its key and value may not be there
                sequence.length -= 1
        return None if chosen is None else int(chosen[0, 0])

    def logits(self, token_ids: Sequence[int]) -> F32:
        """Logits after every token of a sequence: float32 [n_tokens, vocabulary]."""
        ids = self.checked(token_ids)
        chunk = self.engine.chunk
        with self.new_sequence() as sequence:
            parts = [ids[i : i + chunk] for i in range(0, len(ids), chunk)]
            return np.concatenate([self.run(sequence, p, range(len(p))) for p in parts])

    # Generation

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repeat_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        watch: Watcher | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Stream:
        """Continue a prompt (text, or token ids); yields text, then holds ``.completion``.

        ``max_tokens=None`` goes on to the end of the context. See Sampling for the other settings.
        ``watch`` sees the passes and the choices, e.g. an ``isobit.verify.receipt.Recorder``;
        ``progress(done, total)`` is told how many tokens of the prompt were run.
        """
        if max_tokens is not None and not (isinstance(max_tokens, Integral) and max_tokens >= 0):
            raise UsageError(f"max_tokens: expected an integer >= 0 or None, got {max_tokens!r}")
        sampling = Sampling(temperature, top_k, top_p, min_p, repeat_penalty, seed)
        ids = self.checked(self.tokenize(prompt) if isinstance(prompt, str) else prompt)
        return Stream(
            self,
            ids,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=[stop] if isinstance(stop, str) else stop or (),
            watch=watch,
            progress=progress,
        )

    def generate(self, prompt: str | Sequence[int], **settings: Unpack[Settings]) -> Completion:
        """Continue a prompt and return it all at once; takes what :meth:`stream` takes."""
        with self.stream(prompt, **settings) as stream:
            for _ in stream:
                pass
        assert stream.completion is not None
        return stream.completion

    def chat_ids(self, messages: Sequence[Mapping[str, object]]) -> list[int]:
        """Token ids of a conversation in the model's chat template, ready for the answer."""
        return encode_chat(self.tokenizer, messages)

    def chat(
        self, messages: Sequence[Mapping[str, object]], **settings: Unpack[Settings]
    ) -> Completion:
        """Answer a conversation ([{"role": "user", "content": …}, …])."""
        return self.generate(self.chat_ids(messages), **settings)

    def checked(self, ids: Sequence[int]) -> list[int]:
        """Token ids as a list of int; raises UsageError for none, unknown or too many."""
        try:
            ids = [index(i) for i in ids]
        except TypeError as error:
            raise UsageError(f"prompt: expected token ids, got something else: {error}") from None
        if not ids:
            raise UsageError("prompt: expected at least one token, got none")
        wrong = next((i for i in ids if not 0 <= i < self.config.vocab), None)
        if wrong is not None:
            raise UsageError(f"token id: expected 0 to {self.config.vocab - 1}, got {wrong}")
        if len(ids) > self.context:
            raise UsageError(
                f"prompt: expected at most {self.context} tokens (the context), got {len(ids)}"
            )
        return ids

    # Life

    def close(self) -> None:
        """Free the backend and unmap the file, after the pass that another thread may be in."""
        with self._lock:
            self._closed = True
            self.backend.close()
            self.file.close()

    def _open_backend(self) -> Backend:
        if self._closed:
            raise UsageError(f"{self.path}: expected an open model, got a closed one")
        return self.backend

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def load(
    path_or_sample: str | Path = "sample",
    backend: str = "auto",
    *,
    activation_planes: int = 2,
    threads: int | None = None,
    context: int | None = None,
) -> Model:
    """Load a GGUF model (``"sample"`` is the one that ships with isobit) on a backend.

    backend: auto (cuda, else wgpu on a GPU, else cpu), reference, cpu, cuda or wgpu.
    activation_planes: 2 keeps activations in 16-bit fixed point, 1 in int8. threads: CPU threads,
    default all. context: longest sequence, default the model's. Raises ModelRefused, UsageError or
    BackendUnavailable, each with one line of reason; warns if the file is larger than the memory.
    """
    engine = EngineConfig(activation_planes=activation_planes, threads=threads, context=context)
    return Model(path_or_sample, backend, engine)
