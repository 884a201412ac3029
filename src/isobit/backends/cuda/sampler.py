"""What is wanted of rows of logits, made where they lie (docs/numerics.md, sections 10 and 11)."""

from itertools import cycle

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import I32
from isobit.backends.base.draws import Draws
from isobit.backends.base.row_results import DIGEST, MAX_WORDS, RowRequest
from isobit.backends.cuda.device.memory import Region
from isobit.backends.cuda.device.protocol import Gpu
from isobit.numerics.digest import PIECE as DIGESTED

_PIECE = 2048  # values of a row that are a block's in logprobs.cu and draw.cu
_LEAF = DIGESTED // 4  # words that a piece of the tree of digests has
_LEAVES = 64  # of a block of digest.cu
_SUMS = 16  # bytes
_ROWS_AT_ONCE = 64
_SCRATCH = 5 * 1024 * _SUMS + 5 * 32 + 32  # bytes of Scratch of draw.cu

DRAW = np.dtype(
    [
        *(("row", np.int32), ("temperature", np.float32), ("top_k", np.int32)),
        *(("min_p", np.uint32), ("top_p", np.uint64), ("seed", np.uint64), ("index", np.uint64)),
    ]
)
"""Draw of draw.cu."""


class DeviceSampler:
    """Buffers and launches for so many rows of logits."""

    def __init__(self, gpu: Gpu, rows: int, vocabulary: int) -> None:
        self._gpu, self.rows, self._vocabulary = gpu, rows, vocabulary
        self._pieces, leaves = -(-vocabulary // _PIECE), -(-vocabulary // _LEAF)
        self._region = region = Region()
        self._ids = region.take(4 * rows * MAX_WORDS)
        self._found = region.take(4 * rows * MAX_WORDS)
        self._draws = region.take(DRAW.itemsize * rows)
        self._at_once = n = min(rows, _ROWS_AT_ONCE)
        self._keys = [region.take(8 * n * self._pieces * (MAX_WORDS // 2)) for _ in range(2)]
        self._sums = region.take(8 * n * self._pieces)
        sizes = leaves, -(-DIGEST * leaves // _LEAF)
        self._levels = [region.take(4 * DIGEST * n * size) for size in sizes]
        self._p = region.take(4 * n * vocabulary)
        self._kept = region.take(_SUMS * n * self._pieces)
        self._scratch = region.take(_SCRATCH * n)
        self._drawn = np.empty(0, DRAW)

    @property
    def nbytes(self) -> int:
        """Of the device's memory."""
        return self._region.nbytes

    def allocate(self) -> None:
        """Take it."""
        self._region.address = self._gpu.allocate(self.nbytes)
        zeros = np.zeros(_SCRATCH * self._at_once, np.uint8)
        self._gpu.upload(self._at(self._scratch), zeros)

    def give(self, ids: I32) -> None:
        """The ids of the rows that come next, int32 [R, n]."""
        if ids.size:
            self._gpu.upload(self._at(self._ids), ids)

    def draw(self, draws: NDArray[np.void]) -> None:
        """The draws of the rows that come next: see :func:`as_kernels_take`."""
        self._drawn = draws
        if len(draws):
            self._gpu.upload(self._at(self._draws), draws.view(np.uint8))

    def queue(
        self,
        logits: int,
        rows: int,
        asked: RowRequest,
        tokens: int = 0,
        repeated: int = 0,
        *,
        first: int = 0,
    ) -> None:
        """Measure rows of logits at an address. Draws move on to the next token of their output.

        tokens: where the drawn go, too, the last of them up to so many rows. first: the number of
        the first row, of those that come in parts.
        """
        logits -= 4 * self._vocabulary * first
        for at in range(first, first + rows, self._at_once):
            count = min(self._at_once, first + rows - at)
            self._queue(logits, at, count, asked, (tokens, rows, repeated))

    def rehearse(self) -> None:
        """Queue all that may be wanted of a row."""
        every = np.array([(0, 1, 1, 1, 1, 1, 1)], DRAW)
        self.draw(every)
        self.queue(self._at(self._p), 1, RowRequest(given=1, top=1, drawn=True, digest=True))

    @property
    def found(self) -> int:
        """Where what was found is then: int32 [rows, ``asked.words``]."""
        return self._at(self._found)

    def _queue(
        self, logits: int, first: int, rows: int, asked: RowRequest, also: tuple[int, int, int]
    ) -> None:
        """Of some rows."""
        at, n, pieces = self._at, self._vocabulary, self._pieces
        mine, k, keys = logits + 4 * n * first, max(asked.top, 1), cycle(map(at, self._keys))
        size, blocks, source = n, 0, 0
        while blocks != 1:
            blocks, to = -(-size // _PIECE), next(keys)
            self._launch("sampling/logprobs", "best", (blocks, rows), (mine, source, size, k, to))
            source, size = to, blocks * k
        if asked.drawn:
            self._queue_draws(logits, first, rows, source - 8 * k * first, k, asked, also)
        if asked.drawn_at > 1 or asked.drawn:
            self._launch(
                "sampling/logprobs", "weigh", (pieces, rows), (mine, n, source, k, at(self._sums))
            )
        ids, found = at(self._ids) + 4 * asked.given * first, self.found + 4 * asked.words * first
        of_row = asked.given, asked.top, int(asked.drawn), found, asked.words
        arguments = mine, n, source, k, at(self._sums), pieces, ids, *of_row
        self._launch("sampling/logprobs", "measured", (rows,), arguments)
        if asked.digest:
            self._queue_digests(mine, rows, found + 4 * (asked.words - DIGEST), asked.words)

    def _queue_draws(
        self,
        logits: int,
        first: int,
        rows: int,
        keys: int,
        k: int,
        asked: RowRequest,
        also: tuple[int, int, int],
    ) -> None:
        begin, end = np.searchsorted(self._drawn["row"], (first, first + rows)).tolist()
        some, count, n, pieces = self._drawn[begin:end], end - begin, self._vocabulary, self._pieces
        if not count:
            return
        counts, searches = int(some["top_k"].any()), int(some["top_p"].any())
        filters = int(counts or searches or some["min_p"].any())
        draws = self._at(self._draws) + DRAW.itemsize * begin
        p, kept, scratch = map(self._at, (self._p, self._kept, self._scratch))
        grid = pieces, count
        weighed = draws, logits, n, keys, k, p, kept, scratch, filters
        self._launch("sampling/draw", "weigh_draws", grid, weighed)
        for level in (*(1, 2) * counts, *(3, 4) * searches):
            self._launch(
                "sampling/draw", "narrow", grid, (draws, n, p, kept, scratch, level, counts)
            )
        if filters:
            self._launch("sampling/draw", "keep", grid, (draws, n, p, kept, scratch))
        kinds = draws, n, keys, k, p, kept, pieces, scratch, filters
        found = self.found, asked.drawn_at, asked.words
        self._launch("sampling/draw", "draw", (count,), (*kinds, *found, *also))

    def _queue_digests(self, logits: int, rows: int, found: int, stride: int) -> None:
        """Level by level, of ever fewer words of a row."""
        source, words, levels = logits, self._vocabulary, cycle(map(self._at, self._levels))
        while (leaves := -(-words // _LEAF)) > 1:
            to, grid = next(levels), (-(-leaves // _LEAVES), rows)
            self._launch(
                "sampling/digest", "digest", grid, (source, words, words, to, DIGEST * leaves)
            )
            source, words = to, DIGEST * leaves
        self._launch("sampling/digest", "digest", (1, rows), (source, words, words, found, stride))

    def _launch(
        self, stem: str, kernel: str, grid: tuple[int, ...], arguments: tuple[int, ...]
    ) -> None:
        self._gpu.launch(stem, kernel, grid, arguments, overlap=True)

    def _at(self, offset: int) -> int:
        return self._region.address + offset


def as_kernels_take(draws: Draws | None, rows: NDArray[np.integer]) -> NDArray[np.void]:
    """The draws of some of a pass's rows, which are ascending, in order: [n], each of the place
    that its row has among them."""
    if draws is None:
        return np.empty(0, DRAW)
    order = np.argsort(draws.rows)
    which = order[np.isin(draws.rows[order], rows)]
    of, made = draws.columns, np.empty(len(which), DRAW)
    made["row"], made["index"] = np.searchsorted(rows, draws.rows[which]), draws.index[which]
    made["min_p"] = of.min_p[which].view(np.uint32)
    for name in ("temperature", "top_k", "top_p", "seed"):
        made[name] = getattr(of, name)[which]
    return made
