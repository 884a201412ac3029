"""What is wanted of rows of logits, made where they lie (docs/numerics.md, sections 10 and 11)."""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import I32
from isobit.backends.base.draws import ADJUSTED, Adjusted, Draws, Fill
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

_EDITS = 1 << 15
"""Logits that change, copied together: 512 KiB. More come after each other."""
_STAGED = 3
"""Copies that a group of rows is told by, of masks and edits: so many places in the host's memory
hold them until the device has read them. More wait for it."""

DRAW = np.dtype(
    [
        *(("row", np.int32), ("temperature", np.float32), ("top_k", np.int32)),
        *(("min_p", np.uint32), ("top_p", np.uint64), ("seed", np.uint64), ("index", np.uint64)),
        *(("repetition", np.float32), ("presence", np.float32), ("frequency", np.float32)),
        ("mask", np.int32),
    ]
)
"""Draw of draws.cuh."""


class RowDraws(NamedTuple):
    """Draws of some rows, as kernels take them."""

    each: NDArray[np.void]
    """DRAW [n], rows ascending."""
    adjusted: Sequence[tuple[int, Adjusted]] = ()
    """By numbers of these draws."""
    held: Sequence[tuple[int, Fill]] = ()

    @classmethod
    def of(cls, draws: Draws | None, rows: NDArray[np.integer]) -> "RowDraws":
        """rows: of each draw its row on the device, or one below 0 if it has none there."""
        if draws is None:
            return cls(np.empty(0, DRAW))
        order = np.argsort(rows, kind="stable")
        which = order[np.searchsorted(rows[order], 0) :]
        of, made = draws.columns, np.empty(len(which), DRAW)
        made["row"], made["index"] = rows[which], draws.index[which]
        made["min_p"] = of.min_p[which].view(np.uint32)
        for name in ("temperature", "top_k", "top_p", "seed"):
            made[name] = getattr(of, name)[which]
        made["repetition"], made["presence"], made["frequency"], made["mask"] = 1, 0, 0, -1
        if not draws.adjusted and not draws.held:
            return cls(made)
        number = {draw: number for number, draw in enumerate(which.tolist())}
        adjusted = [(number[i], a) for i, a in draws.adjusted if i in number]
        held = [(number[i], f) for i, f in draws.held if i in number]
        for i, a in adjusted:
            for name in ("repetition", "presence", "frequency"):
                made[name][i] = getattr(a, name)
        return cls(made, adjusted, held)

    def part(self, first: int, rows: int) -> "RowDraws":
        """Those of some rows."""
        begin, end = np.searchsorted(self.each["row"], (first, first + rows)).tolist()
        mine = range(begin, end)
        return RowDraws(
            self.each[begin:end],
            [(i - begin, a) for i, a in self.adjusted if i in mine],
            [(i - begin, f) for i, f in self.held if i in mine],
        )

    def edits(self, most: int) -> Iterator[list[NDArray[np.uint8]]]:
        """Of all that are adjusted: the bytes of at most so many ADJUSTED at a time, where they
        lie."""
        now, room = list[NDArray[np.uint8]](), most
        for i, a in self.adjusted:
            a.number(i)
            first = 0
            while first < len(a.ids):
                part = a.ids[first : first + room]
                now.append(part.view(np.uint8))
                first, room = first + len(part), room - len(part)
                if not room:
                    yield now
                    now, room = [], most
        if now:
            yield now


NO_DRAWS = RowDraws(np.empty(0, DRAW))


class DeviceSampler:
    """Buffers and launches for so many rows of logits."""

    def __init__(self, gpu: Gpu, rows: int, vocabulary: int) -> None:
        self._gpu, self.rows, self._vocabulary = gpu, rows, vocabulary
        self._pieces, leaves = -(-vocabulary // _PIECE), -(-vocabulary // _LEAF)
        self._region = region = Region()
        self._ids = region.take(4 * rows * MAX_WORDS)
        self._found = region.take(4 * rows * MAX_WORDS)
        self._at_once = n = min(rows, _ROWS_AT_ONCE)
        self._draws = region.take(DRAW.itemsize * n)
        self._keys = [region.take(8 * n * self._pieces * (MAX_WORDS // 2)) for _ in range(2)]
        self._edited_keys = [region.take(8 * n * self._pieces) for _ in range(2)]
        self._sums = region.take(8 * n * self._pieces)
        sizes = leaves, -(-DIGEST * leaves // _LEAF)
        self._levels = [region.take(4 * DIGEST * n * size) for size in sizes]
        self._p = region.take(4 * n * vocabulary)
        self._kept = region.take(_SUMS * n * self._pieces)
        self._scratch = region.take(_SCRATCH * n)
        self._words = -(-vocabulary // 32)  # of a mask
        sizes = 4 * self._words * n, ADJUSTED.itemsize * _EDITS
        self._masks, self._edits = map(region.take, sizes)
        self._most_told = max(sizes)
        self._staged: deque[tuple[NDArray[np.uint8], object | None]] = deque()

    @property
    def nbytes(self) -> int:
        """Of the device's memory."""
        return self._region.nbytes

    def allocate(self) -> None:
        """Take it."""
        self._region.address = self._gpu.allocate(self.nbytes)
        zeros = np.zeros(_SCRATCH * self._at_once, np.uint8)
        self._gpu.upload(self._at(self._scratch), zeros)
        self._take_places()

    def give(self, ids: I32) -> None:
        """The ids of the rows that come next, int32 [R, n]."""
        if ids.size:
            self._gpu.upload(self._at(self._ids), ids)

    def queue(
        self,
        logits: int,
        rows: int,
        asked: RowRequest,
        draws: RowDraws = NO_DRAWS,
        tokens: int = 0,
        repeated: int = 0,
        *,
        first: int = 0,
    ) -> None:
        """Measure rows of logits at an address.

        draws: of all rows that there are. tokens: where the drawn go, too, the last of them up to
        so many rows. first: the number of the first row, of those that come in parts.
        """
        logits -= 4 * self._vocabulary * first
        for at in range(first, first + rows, self._at_once):
            count = min(self._at_once, first + rows - at)
            part = draws.part(at, count)
            self._queue(logits, at, count, asked, part, (tokens, rows, repeated))

    def rehearse(self) -> None:
        """Queue all that may be wanted of a row."""
        one = np.array([(0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0)], DRAW)
        adjusted = Adjusted(np.zeros(1, ADJUSTED))
        every = RowDraws(one, [(0, adjusted)], [(0, lambda mask: mask.fill(~np.uint32(0)))])
        self.queue(self._at(self._p), 1, RowRequest(1, 1, drawn=True, digest=True), every)

    @property
    def found(self) -> int:
        """Where what was found is then: int32 [rows, ``asked.words``]."""
        return self._at(self._found)

    def _queue(
        self,
        logits: int,
        first: int,
        rows: int,
        asked: RowRequest,
        draws: RowDraws,
        also: tuple[int, int, int],
    ) -> None:
        """Of some rows."""
        at, n, pieces = self._at, self._vocabulary, self._pieces
        mine, k = logits + 4 * n * first, max(asked.top, 1)
        source = self._queue_best(mine, rows, k, self._keys)
        if len(draws.each):
            self._queue_draws(logits, source - 8 * k * first, k, draws, asked, also)
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

    def _queue_best(
        self, logits: int, rows: int, k: int, keys: Sequence[int], *, masked: bool = False
    ) -> int:
        """The k largest of each row; where their keys are."""
        size, blocks, source, turns = self._vocabulary, 0, 0, cycle(map(self._at, keys))
        while blocks != 1:
            blocks, to = -(-size // _PIECE), next(turns)
            arguments = logits, source, size, k, to, int(masked)
            self._launch("sampling/logprobs", "best", (blocks, rows), arguments)
            source, size = to, blocks * k
        return source

    def _queue_draws(
        self,
        logits: int,
        keys: int,
        k: int,
        draws: RowDraws,
        asked: RowRequest,
        also: tuple[int, int, int],
    ) -> None:
        at, n, pieces, each, edited = self._at, self._vocabulary, self._pieces, draws.each, 0
        counts, searches = int(each["top_k"].any()), int(each["top_p"].any())
        filters = int(counts or searches or each["min_p"].any())
        p, kept, scratch, told = map(at, (self._p, self._kept, self._scratch, self._draws))
        each["mask"][[i for i, _ in draws.held]] = np.arange(len(draws.held))
        self._gpu.upload(told, each.view(np.uint8))
        if draws.adjusted or draws.held:
            self._queue_edits(told, logits, draws)
            keys = self._queue_best(p, len(each), 1, self._edited_keys, masked=True)
            logits, k, edited = p, 1, 1
        grid = pieces, len(each)
        weighed = told, logits, n, keys, k, edited, p, kept, scratch, filters
        self._launch("sampling/draw", "weigh_draws", grid, weighed)
        for level in (*(1, 2) * counts, *(3, 4) * searches):
            self._launch(
                "sampling/draw", "narrow", grid, (told, n, p, kept, scratch, level, counts)
            )
        if filters:
            self._launch("sampling/draw", "keep", grid, (told, n, p, kept, scratch))
        kinds = told, n, keys, k, edited, p, kept, pieces, scratch, filters
        found = self.found, asked.drawn_at, asked.words
        self._launch("sampling/draw", "draw", (len(each),), (*kinds, *found, *also))

    def _queue_edits(self, told: int, logits: int, draws: RowDraws) -> None:
        """Copies of the rows that are drawn from, with bias, penalties and masks, for the draws
        that are told at an address."""
        n, words, p, masks, edits = (
            self._vocabulary,
            self._words,
            *map(self._at, (self._p, self._masks, self._edits)),
        )
        if draws.held:
            staged = self._stage(4 * words * len(draws.held))
            rows = staged.view(np.uint32).reshape(-1, words)
            for row, (_, fill) in zip(rows, draws.held, strict=True):
                fill(row)
            self._tell(masks, staged)
        of_row = logits, n, masks, words, p
        self._launch("sampling/edits", "copied", (self._pieces, len(draws.each)), (told, *of_row))
        for parts in draws.edits(_EDITS):
            staged = self._stage(sum(map(len, parts)))
            np.concatenate(parts, out=staged)
            self._tell(edits, staged)
            count = len(staged) // ADJUSTED.itemsize
            arguments = told, edits, count, *of_row
            self._launch("sampling/edits", "adjusted", (-(-count // 256),), arguments)

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

    def _stage(self, nbytes: int) -> NDArray[np.uint8]:
        """Page-locked memory, which the device has read: a copy of other memory, if it is not
        small, might wait for all that is queued."""
        if not self._staged:  # a rehearsal before there is memory
            self._take_places()
        buffer, mark = self._staged.popleft()
        self._staged.append((buffer, None))
        if mark is not None:
            self._gpu.wait(mark)
        return buffer[:nbytes]

    def _take_places(self) -> None:
        """Page-locked memory takes long to get: all of it before the first pass."""
        while len(self._staged) < _STAGED * -(-self.rows // self._at_once):
            self._staged.append((self._gpu.page_locked(self._most_told), None))

    def _tell(self, address: int, staged: NDArray[np.uint8]) -> None:
        """Upload what was just staged."""
        self._gpu.upload(address, staged)
        self._staged[-1] = self._staged[-1][0], self._gpu.mark()

    def _launch(
        self, stem: str, kernel: str, grid: tuple[int, ...], arguments: tuple[int, ...]
    ) -> None:
        self._gpu.launch(stem, kernel, grid, arguments, overlap=True)

    def _at(self, offset: int) -> int:
        return self._region.address + offset
