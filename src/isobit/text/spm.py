"""SentencePiece's merging by score: tokenizer model ``llama`` (Llama 2, Mistral 7B, Gemma 3).

Owns the way from text to token ids for vocabularies with a score a token and no list of merges. Of
all neighbouring pieces that join to a token, those with the best score join first, the leftmost of
equals; what is no token in the end is written as bytes. Kudo and Richardson 2018,
https://arxiv.org/abs/1808.06226; ids are those of llama.cpp and of SentencePiece's BPE.

Pieces can only ever join across two characters that stand side by side in some token, so that text
is cut everywhere else first (before the space of every word, in most vocabularies). The words of a
text repeat, and their ids are kept.
"""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

from isobit.errors import UsageError
from isobit.text.pretokenizers import SPACE

KEPT_WORDS = 1 << 16  # words whose ids are remembered,
KEPT_LENGTH = 64  # of so many characters at most
LONGEST_WORD = 1 << 20  # characters: 10 s of work and 0.5 GB


class ScoreMerges:
    """Text to token ids. Immutable but for what it remembers; threads may share it."""

    def __init__(
        self,
        pieces: Mapping[str, int],
        scores: Sequence[float],
        byte_ids: Sequence[int],
        *,
        unused: frozenset[int] = frozenset(),
        space_prefix: bool = True,
    ) -> None:
        """Take a checked vocabulary.

        Args:
            pieces: text to id of every token that text may become.
            scores: of every id, finite; the greater, the sooner.
            byte_ids: the 256 tokens that stand for single bytes.
            unused: ids that merges go through but that are taken apart again in the end.
            space_prefix: whether a space goes before every text.
        """
        self._pieces = pieces
        self._scores = scores
        self._byte_ids = byte_ids
        self._unused = unused
        self._prefix = SPACE if space_prefix else ""
        self._joined = {text[i : i + 2] for text in pieces for i in range(len(text) - 1)}
        self._known = lru_cache(KEPT_WORDS)(self._merged)

    def encode(self, text: str) -> Iterator[Sequence[int]]:
        """Token ids of a text without lone surrogates, a word at a time; none for an empty one.

        Raises:
            UsageError: there is too long a stretch that cannot be cut.
        """
        if text:
            for word in self._words(self._prefix + text.replace(" ", SPACE)):
                yield self._known(word) if len(word) <= KEPT_LENGTH else self._merged(word)

    def _words(self, text: str) -> Iterator[str]:
        """The text in stretches that no piece reaches beyond."""
        joined, start = self._joined, 0
        for i in range(1, len(text)):
            if text[i - 1 : i + 1] not in joined:
                yield text[start:i]
                start = i
        yield text[start:]

    def _merged(self, word: str) -> tuple[int, ...]:
        if len(word) > LONGEST_WORD:
            raise UsageError(
                f"text: expected words of at most {LONGEST_WORD} characters, got {len(word)}"
            )
        pieces, scores, unused = self._pieces, self._scores, self._unused
        parts: list[str] = list(word)  # "" once joined to the one on its left
        before = list(range(-1, len(parts) - 1))
        after = [*range(1, len(parts)), -1]
        queue: list[tuple[float, int, int, int]] = []  # -score, left, right, length of both
        halves: dict[str, tuple[str, str]] = {}

        def offer(left: int, right: int) -> None:
            joined = parts[left] + parts[right]
            if (i := pieces.get(joined)) is not None:
                heapq.heappush(queue, (-scores[i], left, right, len(joined)))
                if i in unused:
                    halves[joined] = parts[left], parts[right]

        for i in range(len(parts) - 1):
            offer(i, i + 1)
        while queue:
            _, left, right, length = heapq.heappop(queue)
            # Parts only grow: of that length together, they are as they were when offered.
            a, b = parts[left], parts[right]
            if not a or not b or len(a) + len(b) != length:
                continue
            parts[left], parts[right] = a + b, ""
            end = after[left] = after[right]
            if end >= 0:
                before[end] = left
                offer(left, end)
            if before[left] >= 0:
                offer(before[left], left)
        return tuple(self._ids(filter(None, parts), halves))

    def _ids(self, parts: Iterator[str], halves: Mapping[str, tuple[str, str]]) -> Iterator[int]:
        todo = list(parts)[::-1]
        while todo:
            part = todo.pop()
            i = self._pieces.get(part)
            if i is None or (i in self._unused and part not in halves):
                yield from (self._byte_ids[byte] for byte in part.encode())
            elif i in self._unused:
                todo += halves[part][::-1]
            else:
                yield i
