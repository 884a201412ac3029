"""Passes one by one, for comparing and measuring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np

from isobit.arguments import function, instance, listed, token_ids, wholes
from isobit.backends.base import F32, I32, LOGITS, Batch, Results, Tap, Wanted
from isobit.errors import UsageError
from isobit.runtime.engine import Engine
from isobit.runtime.loaded import LoadedModel
from isobit.runtime.sequence import Sequence as TokenSequence


class DirectPasses(LoadedModel):
    """A model whose caller lays out passes."""

    generations: Engine

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

        ``progress(done, total)`` is called after each chunk: how many tokens were run.
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
