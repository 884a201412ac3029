"""What a pass is made of: its inputs, memory, where values lie in it, stages that can be read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import workspace as slots
from isobit.backends.cuda.device.memory import aligned
from isobit.model.graph import Value
from isobit.numerics.ops import LOGIT_ROWS, Shape

PASS, STEPS, STEP, ROWS, MIXED = "pass", "steps", "step", "rows", "mixed"
"""Kinds of program: any batch; one token of each of several sequences; one token of one sequence;
so many tokens, of one sequence or of several; any batch of a padded size. All but the first are
captured: nothing of them may depend on lengths that the host knows."""

EXPERTS = "experts"
"""Exchanges of rows that each part of a split model has of its experts."""


@dataclass(frozen=True)
class Inputs:
    """Addresses of what a batch gives."""

    tokens: int
    positions: int
    sequence: int
    """int32 [T]: where each token's page table begins, in tables of ``each`` entries."""
    pages: int
    each: int
    rows: int
    """Tokens whose logits are wanted."""
    chunks: int
    """SequenceChunk of sequence_chunks.cuh, for each sequence."""
    generated: int = 0
    """int32: of a step, the most likely tokens so far, by position."""
    number: int = 0
    """int32: of a step, which is not 0 and not that of the step before."""
    of: int = 0
    """int32 [T]: the number of each token's sequence, where one may have several."""


@dataclass(frozen=True)
class Pass:
    """What decides the launches of a pass."""

    tokens: int
    sequences: int
    inputs: Inputs
    first: int = 0
    """Of the logit rows that are computed now …"""
    count: int = 0
    """… and how many."""
    spans: Mapping[int, int] = field(default_factory=dict)
    """How many spans there are of each length, for attention of many tokens."""
    many: bool = True
    """Whether a sequence may have more than FEW_TILES tiles of keys."""

    def rows(self, shape: Shape) -> int:
        """Rows of a value."""
        return self.count if shape.rows == LOGIT_ROWS else self.tokens


@dataclass(eq=False)
class Slot(slots.Slot):
    """A slot, and where it lies."""

    address: int = 0
    zero: bool = False
    """Whether it begins as zeros."""
    lasting: bool = False
    """Whether it is read at the end of a pass: all of these lie side by side."""
    own: bool = False
    """Whether it keeps something between passes."""

    def nbytes(self, rows: Mapping[str, int]) -> int:
        """Its size, with so many rows of each kind."""
        return aligned(4 * (self.words * rows[self.rows] + self.more))


@dataclass(eq=False)
class Inboxes:
    """Where the other devices of a split model put their parts of values: see exchange.cuh."""

    table: Slot
    """ExchangeTable: what the host tells (parts.py), and how many exchanges there were."""
    own: tuple[Slot, Slot]
    """The two halves."""
    parts: int
    sites: int = 0
    """Exchanges of a pass."""

    @property
    def count(self) -> int:
        """Where the number of exchanges so far is."""
        return self.table.address + 8 * (self.parts + 3)


@dataclass(frozen=True)
class Exchange:
    """One exchange of a pass, as its kernels take it."""

    inboxes: Inboxes | None = None
    site: int = 0
    bounds: tuple[int, ...] = ()
    """The first column of each part, then the end of the last."""
    rank: int = 0
    flags: int = 0
    """Words of flags ahead of it in an inbox, if it comes to lie there as a whole (Mirrors of
    exchange.cuh)."""

    @property
    def first(self) -> int:
        """This part's first column."""
        return self.bounds[self.rank] if self.bounds else 0

    @property
    def defines(self) -> dict[str, str | int]:
        """Of a kernel that receives such a value, or makes one that comes to lie as a whole."""
        if self.flags:
            return {"MIRRORED": len(self.bounds) - 1}
        return self.waited

    @property
    def waited(self) -> dict[str, str | int]:
        """Of a kernel that waits for other parts."""
        return {"BOUNDS": ",".join(map(str, self.bounds))} if self.bounds else {}

    def place(self, whole: Value, first: int = 0) -> "BufferView":
        """Where it lies as a whole, from a column on."""
        assert self.inboxes is not None
        row, at = whole.shape.row[-1], self.flags + first
        return BufferView(self.inboxes.own[self.site % 2], whole.shape.width, row, at)

    @property
    def sent(self) -> dict[str, str | int]:
        """Of a kernel that sends one, and may receive another."""
        return {f"SENT_{name}": bounds for name, bounds in self.defines.items()}

    @property
    def arguments(self) -> tuple[int, int]:
        """Of the kernels."""
        return self.inboxes.table.address if self.inboxes else 0, self.site


NOT_EXCHANGED = Exchange()
"""What a kernel takes for a value that is here as a whole."""


@dataclass(frozen=True)
class BufferView:
    """Where a value's float32 or int32 lie, in words from a slot's begin."""

    slot: Slot
    stride: int
    """From row to row."""
    step: int
    """From one vector of a row to the next."""
    at: int = 0

    @property
    def address(self) -> int:
        """The first word's."""
        return self.slot.address + 4 * self.at


class Source(Protocol):
    """What stages are read from: the device, or a copy of some of its memory."""

    def download(self, address: int, out: NDArray[np.generic]) -> None:
        """Copy from there."""


@dataclass(frozen=True)
class TracePoint:
    """A stage that can be read once the launches before it have run."""

    value: Value
    read: Callable[["Source", Pass], NDArray[np.generic]]
    lasting: bool = False
    """Whether it can still be read at the end of the pass."""
