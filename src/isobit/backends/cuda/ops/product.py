"""What products of one input have in common: which pairs are multiplied, and where these lie."""

from collections.abc import Sequence

from isobit.backends.cuda.device.load import DeviceWeight
from isobit.backends.cuda.lowering import Ahead, Launch, Lowering
from isobit.backends.cuda.ops.groups import token_columns
from isobit.backends.cuda.ops.launch_shapes import (
    FEW,
    FEWEST,
    LaunchShape,
    chunked_shape,
    fits_all,
    launch_shape,
)
from isobit.backends.cuda.ops.top_k import SortedPairs, ordering_bytes
from isobit.backends.cuda.workspace import Exchange, Pass, Slot
from isobit.model.graph import Value
from isobit.numerics.ops import LOGIT_ROWS

_SHAPE_OF_FEW = (2, 10, 2)
_SHAPES_OF_HEAD = {16: ((1, 16, 2), (2, 8, 1)), 32: ((1, 12, 1), (1, 8, 1))}
"""Shapes that go before those of launch_shapes.py: for few tokens' experts, and by pairs of a group
of the output product."""


class Product:
    """What products of one input have in common: the activations, and which pairs go where."""

    def __init__(
        self,
        g: Lowering,
        weights: Sequence[DeviceWeight],
        x: Value,
        ids: Value | None,
        *,
        late: bool = False,
    ) -> None:
        """late: activations of few tokens are quantised by the product itself."""
        columns = weights[0].columns
        self.g, self._x, self.head = g, x, x.shape.rows == LOGIT_ROWS
        quantised = any(w.layout.kind != "floats" for w in weights)
        floats = any(w.layout.kind == "floats" for w in weights)
        self._quantise: Launch | None = None
        self._acts: Slot | None = None
        if late:
            self._acts, self._quantise = g.quantising(x, columns)
        elif quantised:
            self._acts = g.acts(x, columns)
        self._floats = g.dense(x) if floats or late else None
        self._sorted_pairs = SortedPairs.of(g, ids) if ids else None
        if self._sorted_pairs and not (
            g.captured
            and all(fits_all(g, w, ordering=self._sorted_pairs.most_bytes) for w in weights)
        ):
            g.sorted.add(self._sorted_pairs.value)
        self.ahead = Ahead()
        if ids is None and not self.head and all(w.layout.fused for w in weights):
            g.ahead = self.ahead
        self._each = ids.shape.width if ids else 1
        self._top_k = self._each * columns // x.shape.width

    def pairs(self, p: Pass) -> int:
        """How many."""
        return p.rows(self._x.shape) * self._each

    def columns(self, p: Pass) -> int:
        """Pairs of a group."""
        at = self._sorted_pairs
        return at.columns(p.tokens) if at else token_columns(self.pairs(p), head=self.head)

    @property
    def exchange(self) -> Exchange:
        """By which other parts' columns of its activations arrive."""
        return self.g.arriving(self._x)

    @property
    def stack(self) -> bool:
        """Whether pairs choose their matrix."""
        return self._sorted_pairs is not None

    def late(self, p: Pass) -> bool:
        """Whether it quantises its activations itself (FLOATS of batch_matmul.cu)."""
        return self._quantise is not None and p.tokens <= FEW

    def begin(self, p: Pass) -> None:
        """Queue what has to be there."""
        if self._quantise is not None and not self.late(p):
            self._quantise(p)

    def input(self, w: DeviceWeight, *, late: bool = False) -> int:
        """The activations that such a weight multiplies."""
        at = self._floats if w.layout.kind == "floats" or late else self._acts
        assert at is not None
        return at.address

    @property
    def routing(self) -> tuple[int, int, int]:
        """sorted_pairs, expert_offsets and top_k of sorted_pairs.cuh."""
        at = self._sorted_pairs
        return (
            (at.sorted_pairs.address, at.expert_offsets.address, self._top_k) if at else (0, 0, 1)
        )

    def own_order(self, p: Pass) -> int:
        """Bytes of shared memory in which blocks order the pairs themselves; 0 if they do not."""
        at = self._sorted_pairs
        if at is None or not at.own(self.g, p):
            return 0
        return ordering_bytes(p.tokens, at.each, at.experts, self.columns(p))

    def pairs_a_thread(self, p: Pass, threads: int) -> int:
        """Rounded up, so that kernels are few."""
        return 1 << (-(-self.pairs(p) // threads) - 1).bit_length()

    def shape(self, p: Pass, w: DeviceWeight) -> LaunchShape | None:
        """How batch_matmul.cu takes a matrix; None if it does not."""
        columns = self.columns(p)
        first: Sequence[tuple[int, int, int]] = ()
        if self.head:
            first = _SHAPES_OF_HEAD.get(columns, ())
        elif self.stack and self.g.captured and p.tokens <= FEWEST:
            first = (_SHAPE_OF_FEW,)
        found = launch_shape(self.g, w, columns, first=first, ordering=self.own_order(p))
        if found is None and not (self.stack or self.head or self.g.captured):
            return chunked_shape(self.g, w, columns)
        return found

    def blocks_of_group(self, p: Pass, blocks: int) -> int:
        """How many of so many blocks a group of tokens has, if none is to have row blocks of two; 0
        if that would leave some without work."""
        groups = -(-self.pairs(p) // self.columns(p))
        each = blocks // groups
        return each if 20 * groups * each >= 19 * blocks else 0

    def groups(self, p: Pass) -> tuple[int, ...]:
        """The number of groups, the groups, sorted_pairs and top_k, for batch_matmul.cu."""
        at = self._sorted_pairs
        if at is not None and at.own(self.g, p):
            return at.ids.address, 0, 0, self._top_k
        return (*at.grouped, at.sorted_pairs.address, self._top_k) if at else (0, 0, 0, 1)

    def chosen(self, p: Pass) -> tuple[int, int, int]:
        """Pairs, and if these choose their matrix, experts, and how many a token has."""
        at = self._sorted_pairs
        return self.pairs(p), *((at.experts, at.each) if at else (0, 1))
