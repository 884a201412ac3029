"""A loaded model: the library's front door."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from typing import Any, TypedDict, TypeGuard, Unpack, overload

import numpy as np

from isobit.arguments import function, instance, listed, token_ids, whole, wholes, wrong
from isobit.backends.base import F32, I32, LOGITS, Batch, Results, Tap, Wanted
from isobit.config import MOST_PAGES, MOST_POSITIONS, EngineConfig, bits_of_planes
from isobit.errors import ModelRefused, UsageError
from isobit.numerics import TILE
from isobit.runtime.batches import damaged
from isobit.runtime.engine import Engine
from isobit.runtime.generation import (
    Completion,
    Settings,
    Stream,
    checked_sampling,
)
from isobit.runtime.grammar import Grammars
from isobit.runtime.passes import Passes, locate, sample_path
from isobit.runtime.sampler import Sampling
from isobit.runtime.scheduler import QueueFull
from isobit.runtime.sequence import Sequence as TokenSequence
from isobit.runtime.tokens import Generation, TakeRows, Watcher
from isobit.text.template import ChatPrompt, chat_prompt
from isobit.text.tokenizer import Tokenizer
from isobit.text.vocabulary import stop_ids

__all__ = ["Model", "load", "locate", "sample_path"]

READ_TOGETHER = 256  # texts lined up at once

Read = tuple[Sequence[int], Sequence[int], TakeRows]
"""A text, positions whose logits are wanted, and what takes them."""


class ChatVariables(TypedDict, total=False):
    """What a template is given beside messages; see ``Model.chat``."""

    tools: Sequence[Mapping[str, object]] | None
    documents: Sequence[Mapping[str, object]] | None
    chat_template_kwargs: Mapping[str, object] | None


class Model(Passes):
    """A model on a backend. A context manager; its methods may be called from several threads.

    What any method raises is an ``isobit.errors.IsobitError``: besides what it says itself,
    UsageError for arguments of another kind and once the model is closed, ModelRefused if the
    logits are not finite (damaged weights), and for text if the file has no tokenizer.
    """

    def __init__(
        self,
        path: str | Path,
        backend: str,
        engine: EngineConfig,
        note: Callable[[str], None] | None = None,
    ) -> None:
        """See :func:`load`."""
        super().__init__(path, backend, engine, note)
        self.generations = Engine(self)

    def close(self) -> None:
        """Free the backend and unmap the file, after the pass that another thread may be in."""
        self.generations.close()
        super().close()

    def _begin(self) -> None:
        self._tokenizer = _begun(
            lambda: Tokenizer.from_metadata(self.file.metadata, str(self.path))
        )

    def __repr__(self) -> str:
        c, e = self.config, self.engine
        return (
            f"<isobit.Model {str(self.path)!r}: {c.architecture} on {self.backend.name} "
            f"({self.backend.device}), context {self.context}, "
            f"activation_bits {e.activation_bits}{', closed' if self._closed else ''}>"
        )

    # Text

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

    # Logits and generation

    def logits(self, prompt: str | Sequence[int], rows: Sequence[int] | slice | None = None) -> F32:
        """Logits after the tokens of a text: float32 [n_tokens, vocabulary].

        ``rows`` chooses among them, as it would choose from a list: ``[-1]`` the last alone. Only
        these are computed, in that order. Raises UsageError for a prompt that is empty, too long or
        not text or token ids, and for rows that it has not.
        """
        ids = self.checked(self._ids(prompt))
        wanted = _rows(rows, len(ids))
        out = np.empty((len(wanted), self.config.vocab), np.float32)
        places: dict[int, list[int]] = {}
        for place, row in enumerate(wanted):
            places.setdefault(row, []).append(place)

        def take(positions: Sequence[int], logits: F32) -> None:
            for position, row in zip(positions, logits, strict=True):
                out[places[position]] = row

        if wanted:
            self._read([(ids[: max(wanted) + 1], sorted(places), take)])
        return out

    def logprobs(
        self, logits: F32, ids: Sequence[Sequence[int]] | I32, k: int = 0
    ) -> tuple[F32, I32, F32]:
        """Log-probabilities from rows of logits [R, vocabulary], section 11 of docs/numerics.md.

        (of n ids a row, float32 [R, n]; ids of the k most likely, int32 [R, k]; of these, float32
        [R, k]). Raises ModelRefused if logits are not finite.
        """
        vocab = self.config.vocab
        rows = np.ascontiguousarray(logits) if isinstance(logits, np.ndarray) else np.empty(0)
        if rows.dtype != np.float32 or rows.shape[1:] != (vocab,):
            raise wrong("logits", f"float32 [rows, {vocab}]", logits)
        given = _ids_by_row(ids, len(rows), vocab)
        k = whole("k", k, 0, vocab)
        argmax, values, top_ids, top = self.rows.measure(rows, given, k)
        if (argmax < 0).any():
            raise damaged()
        return values, top_ids, top

    @overload
    def score(
        self, text: str | Sequence[int], continuation: str | Sequence[int] | None = None
    ) -> F32: ...
    @overload
    def score(
        self,
        text: list[str] | list[list[int]],
        continuation: list[str] | list[list[int]] | None = None,
    ) -> list[F32]: ...
    def score(
        self,
        text: str | Sequence[int] | list[str] | list[list[int]],
        continuation: str | Sequence[int] | list[str] | list[list[int]] | None = None,
    ) -> F32 | list[F32]:
        """Log-probabilities of the tokens of a text but the first, or of a continuation after it.

        Args:
            text: text or token ids; a list of texts gives a list of arrays, run together.
            continuation: text or token ids for each text.

        Returns float32 [tokens - 1], or [tokens of the continuation]. Raises UsageError for unknown
        ids, an empty text, or more than the context holds.
        """
        if not _is_batch(text):
            return self._scores([text], [continuation])[0]  # type: ignore[list-item]
        if continuation is None:
            return self._scores(text, [None] * len(text))
        if not _is_batch(continuation) or len(continuation) != len(text):
            raise UsageError(f"continuation: expected one for each of {len(text)} texts")
        return self._scores(text, continuation)

    def _scores(
        self,
        texts: Sequence[str | Sequence[int]],
        continuations: Sequence[str | Sequence[int] | None],
    ) -> list[F32]:
        found: list[F32] = []
        reads: list[Read] = []
        for first, more in zip(texts, continuations, strict=True):
            ids = self.checked(self._ids(first))
            start = 1 if more is None else len(ids)
            if more is not None:
                ids = self.checked(
                    [*ids, *token_ids("continuation", self._ids(more), self.context)]
                )
            out = np.empty(len(ids) - start, np.float32)
            found.append(out)

            def take(
                positions: Sequence[int],
                logits: F32,
                ids: list[int] = ids,
                out: F32 = out,
                start: int = start,
            ) -> None:
                said = [[ids[p + 1]] for p in positions]
                at = [p + 1 - start for p in positions]
                out[at] = self.logprobs(logits, said)[0][:, 0]

            if len(ids) > start:
                reads.append((ids[:-1], range(start - 1, len(ids) - 1), take))
        self._read(reads)
        return found

    def _read(self, reads: Iterable[Read]) -> None:
        """Run texts together; each gives the logits after some of its positions to a function."""
        engine, waiting = self.generations, deque[Generation]()
        try:
            for ids, wanted, take in reads:
                if len(waiting) == READ_TOGETHER:
                    next(waiting[0], None)
                    waiting.popleft()
                waiting.append(engine.line_up(ids, 0, Sampling(), wanted=wanted, take_rows=take))
            while waiting:
                next(waiting[0], None)
                waiting.popleft()
        finally:
            for generation in waiting:
                generation.cancel()

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
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        logprobs: int | None = None,
        routes: bool = False,
        salt: str | None = "",
        stop: str | Sequence[str] | None = None,
        watch: Watcher | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Stream:
        """Continue a prompt (text, or token ids); yields text, then holds ``.completion``.

        Args:
            prompt: text, in which special tokens are recognised, or token ids.
            max_tokens: the most to generate; None goes on to the end of the context.
            temperature, top_k, top_p, min_p, repeat_penalty, presence_penalty,
                frequency_penalty, logit_bias, seed: see ``isobit.Sampling``.
            logprobs: k adds to the completion the log-probabilities of its tokens and, at each
                place, of the k most likely.
            routes: adds the experts of its tokens.
            salt: keys and values of a beginning that another prompt had, too, are used again among
                those of the same salt; None: with none.
            stop: the text ends before any of these; one that is the text of a special token is
                that token.
            watch: sees the passes and the choices, e.g. an ``isobit.Recorder``.
            progress: ``progress(done, total)`` is told how many tokens of the prompt were run.

        Raises:
            UsageError: the prompt is empty, longer than the context, or no text or token ids;
                a setting is of the wrong type or out of range.
        """
        sampling = checked_sampling(
            logit_bias,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repeat_penalty=repeat_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            seed=seed,
        )
        sampling.check_ids(self.config.vocab)
        return Stream(
            self,
            self.checked(self._ids(prompt)),
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop,
            watch=watch,
            progress=progress,
            logprobs=logprobs,
            routes=routes,
            salt=salt,
        )

    def _ids(self, prompt: str | Sequence[int]) -> Sequence[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, special=True, most=self.context)
        return prompt

    @overload
    def generate(self, prompt: str | Sequence[int], **settings: Unpack[Settings]) -> Completion: ...
    @overload
    def generate(
        self, prompt: list[str] | list[list[int]], **settings: Unpack[Settings]
    ) -> list[Completion]: ...
    def generate(
        self,
        prompt: str | Sequence[int] | list[str] | list[list[int]],
        **settings: Unpack[Settings],
    ) -> Completion | list[Completion]:
        """Continue a prompt and return it all at once; takes what :meth:`stream` takes.

        A list of prompts gives a list of completions: they run together, and each is what its
        prompt alone would give. All prompts are checked before the first is run. Waits while
        generations of other threads hold the KV cache. Raises what :meth:`stream` does.
        """
        if not _is_batch(prompt):
            return self.stream(prompt, **settings).complete()  # type: ignore[arg-type]
        streams = [self.stream(p, **settings) for p in prompt]
        try:
            with suppress(QueueFull):  # the rest is lined up when it is read
                for stream in streams:
                    stream.begin(wait=False)
            return [stream.complete() for stream in streams]
        finally:
            for stream in streams:
                stream.close()

    def chat_ids(
        self, messages: Sequence[Mapping[str, object]], **variables: Unpack[ChatVariables]
    ) -> list[int]:
        """Token ids of a conversation in the model's chat template, ready for the answer.

        Arguments and errors are those of :meth:`chat`.
        """
        return self.chat_prompt(messages, **variables).ids

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> ChatPrompt:
        """The ids of :meth:`chat_ids`, and the text that the template wrote."""
        own: Mapping[str, Any] = {} if chat_template_kwargs is None else chat_template_kwargs
        instance("chat_template_kwargs", own, Mapping, "variables of the template")
        taken = ("messages", "tools", "documents", "most", "tokenizer")
        for name in own:
            if not isinstance(name, str) or name in taken:
                raise wrong("chat_template_kwargs", "variables of the template", name)
        return chat_prompt(
            self.tokenizer,
            messages,
            tools=tools,
            documents=documents,
            most=self.context,
            **own,
        )

    def chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
        **settings: Unpack[Settings],
    ) -> Completion:
        """Answer a conversation.

        Args:
            messages: ``[{"role": "user", "content": …}, …]``, as OpenAI's interface has them.
            tools, documents: what the model may call and cite, as its template expects them.
            chat_template_kwargs: more variables for the template: ``{"enable_thinking": False}``.
            settings: those of :meth:`stream`.

        Raises:
            UsageError: a message is malformed or the template refuses it, which is named; and
                what :meth:`stream` raises.
            ModelRefused: the template is damaged or hostile.
        """
        ids = self.chat_ids(
            messages, tools=tools, documents=documents, chat_template_kwargs=chat_template_kwargs
        )
        return self.generate(ids, **settings)

    # Passes one by one, for comparing and measuring

    def new_sequence(self) -> TokenSequence:
        """An empty sequence with its own KV cache pages."""
        return TokenSequence(self.generations, self.context)

    def forward(
        self,
        sequence: TokenSequence,
        ids: Sequence[int],
        logit_rows: Sequence[int] = (),
        tap: Tap | None = None,
        stages: frozenset[str] | None = None,
    ) -> F32:
        """Append ids to a sequence in one pass; logits float32 [len(logit_rows), vocabulary].

        The logits are as the backend gave them, finite or not: a trace wants to see them.
        """
        function("tap", tap)
        if stages is not None:
            instance("stages", stages, frozenset, "a frozenset of names, or None")
        rows = wholes("logit_rows", logit_rows, 0, len(token_ids("ids", ids)) - 1)
        logits = self._pass([sequence], [ids], rows, LOGITS, tap, stages).logits
        assert logits is not None
        return logits

    def prefill(
        self,
        sequence: TokenSequence,
        ids: Sequence[int],
        progress: Callable[[int, int], None] | None = None,
    ) -> F32:
        """Append ids in chunks; the logits after the last, float32 [vocabulary].

        ``progress(done, total)`` is told after each chunk how many tokens were run.
        """
        ids = token_ids("ids", ids)
        if not ids:
            raise UsageError("ids: expected at least one token, got none")
        function("progress", progress)
        chunk = self.engine.chunk
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            last = start + chunk >= len(ids)
            logits = self.forward(sequence, part, [len(part) - 1] if last else [])
            if progress is not None:
                progress(start + len(part), len(ids))
        row: F32 = logits[0]
        return row

    def step(
        self, sequences: Sequence[TokenSequence], tokens: Sequence[int], wanted: Wanted = LOGITS
    ) -> Results:
        """Append a token to each of several sequences in one pass; see :meth:`Backend.run`."""
        instance("wanted", wanted, Wanted, "a Wanted")
        ids = [[t] for t in token_ids("tokens", tokens)]
        if len(ids) != len(listed("sequences", sequences)):
            raise UsageError(f"tokens: expected one for each sequence, got {len(ids)}")
        return self._pass(sequences, ids, range(len(sequences)), wanted)

    def _pass(
        self,
        sequences: Sequence[TokenSequence],
        ids: Sequence[Sequence[int]],
        rows: Sequence[int],
        wanted: Wanted,
        tap: Tap | None = None,
        stages: frozenset[str] | None = None,
    ) -> Results:
        last = self.config.vocab - 1
        tokens = [wholes("token ids", part, 0, last) for part in ids]
        for sequence in sequences:
            instance("sequence", sequence, TokenSequence, "what new_sequence() gives")
        if not {sequence.engine for sequence in sequences} <= {self.generations}:
            raise UsageError("sequence: expected one of this model, got another model's")
        if len(set(map(id, sequences))) < len(sequences):
            raise UsageError("sequences: expected each of them once")
        places: list[I32] = []
        with self.generations.turn():
            try:
                for sequence, part in zip(sequences, ids, strict=True):
                    places.append(sequence.extend(len(part)))
                tables = [s.table for s in sequences]
                pages = np.zeros((len(tables), max(len(t.pages) for t in tables)), np.int32)
                for row, table in zip(pages, tables, strict=True):
                    row[: len(table.pages)] = table.numbers
                states = None
                if self.graph.recurrent:
                    states = np.array([t.state for t in tables], np.int32)
                batch = Batch(
                    tokens=np.array(list(chain.from_iterable(tokens)), np.int32),
                    positions=np.concatenate(places),
                    sequence=np.repeat(np.arange(len(ids), dtype=np.int32), list(map(len, ids))),
                    pages=pages,
                    logit_rows=np.array(rows, np.int32),
                    states=states,
                )
                return self.run_batch(batch, wanted, tap, stages)
            except BaseException:
                for sequence, positions in zip(sequences, places, strict=False):
                    sequence.undo(len(positions))
                raise

    def checked(self, ids: Sequence[int]) -> list[int]:
        """Token ids as a list of int; raises UsageError for none, unknown or too many."""
        found = token_ids("prompt", ids, self.context)
        if not found:
            raise UsageError("prompt: expected at least one token, got none")
        odd = next((i for i in found if not 0 <= i < self.config.vocab), None)
        if odd is not None:
            raise wrong("token id", f"0 to {self.config.vocab - 1}", odd)
        return found


def load(
    path_or_sample: str | Path = "sample",
    backend: str = "auto",
    *,
    activation_bits: int = EngineConfig.activation_bits,
    threads: int | None = None,
    context: int | None = None,
    sequences: int = EngineConfig.max_sequences,
    chunk: int = EngineConfig.chunk,
    cache: int | None = None,
    parts: int = 1,
    expert_shares: Sequence[int] = (),
    stages: Sequence[str] = (),
    stage_key: bytes = b"",
    activation_planes: int | None = None,
) -> Model:
    """Load a GGUF model (``"sample"`` is the one that ships with isobit) on a backend.

    Args:
        path_or_sample: a path, ``hf://ORG/REPO[:QUANT]`` (downloaded if the cache has none),
            ``ollama://NAME``, or ``"sample"``; a file of that name is ``"./sample"``.
        backend: auto (cuda, else wgpu on a GPU, else cpu), reference, cpu, cuda or wgpu.
        activation_bits: 16 keeps activations in 16-bit fixed point, 8 in int8.
        threads: of the CPU; None: all.
        context: longest sequence in tokens; None: the model's, or what there is room for.
        sequences: how many are run together.
        chunk: prompt tokens in a pass.
        cache: tokens of all sequences together that the KV cache has room for; None: enough for
            sequences of full length, or what there is room for.
        parts: processes that the cpu backend, or GPUs that the cuda backend, is split over.
        expert_shares: each part has whole experts, in these proportions, instead of some columns of
            each expert; on cpu.
        stages: HOST:PORT of each stage of a pipeline, in order (``isobit stage``), which runs the
            layers instead of a backend here.
        stage_key: what the stages know their caller by.
        activation_planes: what activation_bits was before, 2 (16 bits) or 1 (8); for a release.

    Warns if the file is larger than the memory, if the KV cache is smaller than was asked, and if
    ``auto`` takes another backend than the GPU that there is; says why.

    Raises:
        ModelRefused: the file is damaged, hostile, or asks for what is not implemented.
        UsageError: an argument is of the wrong type or out of range.
        BackendUnavailable: the backend cannot run here, or has too little memory.
    """
    if activation_planes is not None:
        activation_bits = bits_of_planes(activation_planes)
    engine = EngineConfig(
        activation_bits=activation_bits,
        threads=threads,
        context=context,
        max_sequences=whole("sequences", sequences, 1, MOST_POSITIONS),
        chunk=chunk,
        pages=_pages(cache),
        parts=parts,
        expert_shares=expert_shares,  # type: ignore[arg-type]  # it makes tuples of these
        stages=stages,  # type: ignore[arg-type]
        stage_key=stage_key,
    )
    return Model(path_or_sample, backend, engine)


def _pages(cache: int | None) -> int | None:
    if cache is None:
        return None
    return -(-whole("cache", cache, 1, MOST_PAGES * TILE) // TILE)


def _begun(work: Callable[[], Tokenizer]) -> Callable[[], Tokenizer]:
    """Begin work in a thread of its own, if the system has one; gives what it gave or raised."""
    builder = ThreadPoolExecutor(1)
    try:
        future = builder.submit(work)
    except RuntimeError:  # no thread
        return cache(work)
    builder.shutdown(wait=False)
    return future.result


def _is_batch(prompt: object) -> TypeGuard[Sequence[str | Sequence[int]]]:
    """Whether it is a list of prompts, told by its first."""
    if isinstance(prompt, (str, bytes, bytearray, memoryview)):
        return False
    if isinstance(prompt, np.ndarray):
        return prompt.ndim > 1
    first = next(iter(prompt), None) if isinstance(prompt, Sequence) else None
    return isinstance(first, (str, Sequence, np.ndarray))


def _ids_by_row(ids: Sequence[Sequence[int]] | I32, rows: int, vocab: int) -> I32:
    """Token ids [rows, n], or UsageError."""
    expected = f"for each of {rows} rows as many token ids from 0 to {vocab - 1}"
    try:
        given = np.array(listed("ids", ids, expected)).reshape(rows, -1)
    except ValueError:  # rows of several lengths
        raise wrong("ids", expected, ids) from None
    if given.size and (given.dtype.kind not in "iu" or not 0 <= given.min() <= given.max() < vocab):
        raise wrong("ids", expected, ids)
    return given.astype(np.int32)


def _rows(rows: Sequence[int] | slice | None, n: int) -> list[int]:
    expected = f"a slice or whole numbers from {-n} to {n - 1}"
    if rows is not None and not isinstance(rows, slice):
        return [range(n)[row] for row in wholes("rows", rows, -n, n - 1, expected)]
    try:
        return list(range(n)[rows or slice(None)])
    except (TypeError, ValueError):  # of a slice from a text, or in steps of 0
        raise wrong("rows", expected, rows) from None
