"""Matrix products: few pairs or many, from tiles, from the file's blocks, or with float weights."""

from collections.abc import Sequence

from isobit.backends.cuda.device.layout import ACT_BYTES, COLUMN_ACT_BYTES, TILE_ROWS
from isobit.backends.cuda.device.load import DeviceWeight, fuse_adjacent
from isobit.backends.cuda.device.memory import supers
from isobit.backends.cuda.device.protocol import Gpu
from isobit.backends.cuda.lowering import WARPS, Ahead, Launch, Lowering, anything
from isobit.backends.cuda.ops.groups import GROUPS, token_columns
from isobit.backends.cuda.ops.launch_shapes import (
    BESIDE,
    FEW,
    LaunchShape,
    bring,
    bring_own,
    chunked_shape,
    fits_all,
    launch_shape,
)
from isobit.backends.cuda.ops.part_matmul import lower_parts, parts_of
from isobit.backends.cuda.ops.top_k import SortedPairs, ordering_bytes
from isobit.backends.cuda.workspace import (
    NOT_EXCHANGED,
    BufferView,
    Exchange,
    Pass,
    Slot,
)
from isobit.model.graph import Op, Value
from isobit.numerics.ops import LOGIT_ROWS

supports = anything

_PAIRS = 8  # that share one read of a weight: CHUNK of sorted_pairs.cuh
_MMA_FROM = 8  # pairs a matrix, on average, from which tensor cores pay
_TILED_ROWS, _TILED_SHARED = 32, 8 * 8 * ACT_BYTES + 8 * 8 * 32 * 4  # Shared of matmul.cu
_MMA_TOKENS, _MMA_ROWS = 32, 128  # TOKENS and ROWS of matmul_mma.cu
_BOTH = 512
"""Tokens of a prompt up to which products of two formats are made by one launch."""
_SHAPES_OF_BOTH = ((1, 16, 1),)
"""Of these, before those of launch_shapes.py: more warps are worth more than more superblocks."""
_FEWEST = 16
"""Tokens up to which blocks share the activations of dense products, and have ten warps for
experts."""
_DEEP = 128, {16: 256, 8: 512}
"""Tokens between which products of many columns are faster by matmul_mma.cu than by blocks of so
many warps."""
_SHAPE_OF_FEW = (2, 10, 2)
_SHAPES_OF_HEAD = {16: ((1, 16, 2), (2, 8, 1)), 32: ((1, 12, 1), (1, 8, 1))}
"""Shapes that go before those of launch_shapes.py: for few tokens' experts, and by pairs of a group
of the output product."""
_DENSE_WORDS = 96  # that a thread of matmul_dense.cu has for weights and activations
_DENSE_SHARED = 4 << 10, 8 << 10  # bytes for each superblock and each row: its DenseShared


def lower(g: Lowering, op: Op) -> None:
    """The products side by side."""
    weights, (y,) = [g.matrix(w) for w in op.weights], op.outputs
    if (exchange := g.shared(y)) is not NOT_EXCHANGED:
        _lower_shared(g, weights[0], op.inputs[0], y, exchange)
        return
    if y in g.added and (parts := parts_of(g, weights, y)):
        to = BufferView(g.new(y), y.shape.width, y.shape.row[-1])
        whole = multiply(g, weights, op.inputs[0], to)
        lower_parts(g, weights, op.inputs[0], y, parts, to, whole)
        return
    if all(launch_shape(g, w, GROUPS[0]) for w in weights):  # few pairs are streamed
        to, exchange = g.target(y)
    else:
        to, exchange = BufferView(g.new(y), y.shape.width, y.shape.row[-1]), NOT_EXCHANGED
    g.emit(multiply(g, weights, op.inputs[0], to, exchange=exchange), y)


def _lower_shared(g: Lowering, w: DeviceWeight, x: Value, y: Value, exchange: Exchange) -> None:
    """A product of float weights that all parts of a split model have, of which each makes some of
    the rows for all; of few rows all of them."""
    g.put(y, to := exchange.place(y))
    product, held, parts = Product(g, [w], x, None), dense_rows(g.gpu, w), len(exchange.bounds) - 1

    def make(p: Pass) -> None:
        if p.tokens <= FEW or not held:
            one(product, w, to.address, p.tokens, to.stride)
            return
        first, end = (p.tokens * r // parts for r in (exchange.rank, exchange.rank + 1))
        dense(product, w, to.address, end - first, to.stride, held, first=first, exchange=exchange)

    g.emit(make)
    g.meet(exchange, y)


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

    def shape(self, p: Pass, w: DeviceWeight) -> "LaunchShape | None":
        """How batch_matmul.cu takes a matrix; None if it does not."""
        columns = self.columns(p)
        first: Sequence[tuple[int, int, int]] = ()
        if self.head:
            first = _SHAPES_OF_HEAD.get(columns, ())
        elif self.stack and self.g.captured and p.tokens <= _FEWEST:
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


def multiply(
    g: Lowering,
    weights: Sequence[DeviceWeight],
    x: Value,
    y: BufferView,
    ids: Value | None = None,
    exchange: Exchange = NOT_EXCHANGED,
) -> Launch:
    """``y = W x``, the products of the weights side by side; ``exchange``: by which other parts get
    them at once.

    With ``ids``, every row of x, or every row that it has for an id, times its matrix.
    """
    stride = y.step if ids else y.stride
    made = g.formed(x, f"acts {weights[0].columns}") or len(g.readers[x]) > 1
    streamed = g.captured and ids is not None  # at any size, if it fits
    late = streamed and not made and all(fits_all(g, w) for w in weights)
    product = Product(g, weights, x, ids, late=late)
    later = ids is not None and x.shape.width != weights[0].columns  # than another with these ids

    def make(p: Pass) -> None:
        product.begin(p)
        at, left = y.address, fuse_adjacent(weights)
        while left:
            w = left.pop(0)
            how = product.shape(p, w)
            deep = how is not None and (
                not product.blocks_of_group(p, how.blocks * g.gpu.multiprocessors)
                if how.chunk
                else not how.shallow(w) and _DEEP[0] < p.tokens <= _DEEP[1].get(how.warps, 512)
            )
            pays = product.stack or product.head or not deep
            if how is None or not pays:
                one(product, w, at, product.pairs(p), stride, exchange=exchange)
                at += 4 * w.rows
                continue
            most = _BOTH if not g.captured and how.columns == GROUPS[-1] else FEW
            then = product.shape(p, left[0]) if left and p.tokens <= most else None
            more = left.pop(0) if then and not how.chunk and not then.chunk else None
            planned = not product.stack or later
            stream(product, p, w, at, stride, more=more, planned=planned, exchange=exchange)
            at += 4 * (w.rows + (more.rows if more else 0))

    return make


def prefers_tensor_cores(w: DeviceWeight, pairs: int, *, stack: bool) -> bool:
    """Whether a product of so many pairs is made by matmul_mma.cu."""
    return w.layout.fused and pairs > _MMA_FROM * (w.matrices if stack else 1)


def one(
    product: Product,
    w: DeviceWeight,
    y: int,
    pairs: int,
    stride: int,
    *,
    exchange: Exchange = NOT_EXCHANGED,
) -> None:
    """Queue ``y = W x``: rows of ``stride`` values at y, of which w.rows are written."""
    if prefers_tensor_cores(w, pairs, stack=product.stack):
        on_tensor_cores(product, w, y, pairs, stride, exchange=exchange)
        return
    assert exchange is NOT_EXCHANGED, "a product of few pairs is streamed"
    if not product.stack and (rows := dense_rows(product.g.gpu, w)):
        dense(product, w, y, pairs, stride, rows)
        return
    matrices = w.matrices if product.stack else 1
    chunks = -(-pairs // _PAIRS)
    if product.stack:
        chunks = min(chunks, -(-2 * pairs // (_PAIRS * matrices)))
    floats, shared, more = w.layout.kind == "floats", 0, {}
    tail: tuple[int, ...] = (w.rows, stride)
    if floats:
        per_block = 8 if pairs > 8 * _PAIRS else 1
        more = {"ROWS": str(per_block)}
    elif w.layout.kind == "tiled":
        per_block, shared = _TILED_ROWS, _TILED_SHARED
    else:
        per_block = WARPS
        tail += (w.columns,)
    file, kernel, defines = w.layout.matmul
    product.g.launch(
        f"{file}.{kernel}",
        (-(-w.rows // per_block), matrices, chunks),
        (w.address, w.matrix_bytes, product.input(w), w.columns if floats else supers(w.columns))
        + (*product.routing, pairs, y, *tail),
        defines | more,
        shared=shared,
    )


def dense_rows(gpu: Gpu, w: DeviceWeight) -> int:
    """Rows whose weights a thread of matmul_dense.cu has registers and memory for, if floats."""
    if w.layout.kind != "floats" or w.columns % 4:
        return 0
    s, (of_super, of_row) = supers(w.columns), _DENSE_SHARED
    return max(0, min(8, _DENSE_WORDS // s - 1, (gpu.shared_most - s * of_super) // of_row))


def dense(
    product: Product,
    w: DeviceWeight,
    y: int,
    pairs: int,
    stride: int,
    rows: int,
    *,
    first: int = 0,
    exchange: Exchange = NOT_EXCHANGED,
) -> None:
    """Queue a product of float weights, which threads hold while tokens come by, from the first of
    them on."""
    s, blocks = supers(w.columns), -(-w.rows // (2 * rows))
    tokens = -(-pairs // max(1, product.g.gpu.multiprocessors // blocks))
    shared = s * _DENSE_SHARED[0] + rows * _DENSE_SHARED[1]
    twice = tokens > 8 and 2 * shared <= product.g.gpu.shared_most
    product.g.launch(
        "ops/matmul_dense",
        (blocks, -(-pairs // tokens)),
        (w.address, product.input(w) + 4 * first * w.columns, w.columns, pairs, tokens)
        + (y + 4 * first * stride, w.rows, stride, exchange.arguments[0]),
        w.layout.matmul[2]
        | {"ROWS": rows, "SUPERS": s, "TOGETHER": 2 + 2 * twice}
        | exchange.defines,
        shared=shared * (1 + twice),
    )


def on_tensor_cores(
    product: Product,
    w: DeviceWeight,
    y: int,
    pairs: int,
    stride: int,
    *,
    rounds: int = 1,
    y_step: int = 0,
    exchange: Exchange = NOT_EXCHANGED,
) -> None:
    """Queue a product of many pairs; or, in ``rounds``, of equal stacks that lie behind one
    another, their results ``y_step`` floats apart."""
    gpu, matrices = product.g.gpu, w.matrices if product.stack else 1
    token_tiles = -(-pairs // (matrices * _MMA_TOKENS))
    blocks = -(-w.rows // _MMA_ROWS) * matrices * rounds * token_tiles
    narrow = blocks < gpu.multiprocessors
    rows = _MMA_ROWS // 2 if narrow else _MMA_ROWS
    stage = _MMA_TOKENS * COLUMN_ACT_BYTES + rows * w.layout.format.block_bytes
    stages = 3 if 2 * (3 * stage + 1024) <= gpu.shared_most else 2
    product.g.launch(
        "ops/matmul_mma",
        (-(-w.rows // rows), matrices * rounds, token_tiles),
        (w.address, w.matrix_bytes, product.input(w), supers(w.columns), *product.routing)
        + (pairs, y, w.rows, stride, matrices, y_step, exchange.arguments[0]),
        exchange.defines
        | {f"MMA_{w.layout.format.name}": 1, "STAGES": stages}
        | ({"NARROW": 1} if narrow else {}),
        shared=stages * stage,
    )


def stream(
    product: Product,
    p: Pass,
    w: DeviceWeight,
    y: int,
    stride: int,
    *,
    up: DeviceWeight | None = None,
    more: DeviceWeight | None = None,
    planned: bool,
    exchange: Exchange = NOT_EXCHANGED,
) -> None:
    """Queue a product whose weights are read once for a group of pairs; or with ``up`` the SwiGLU
    of both products; or with ``more``, of another format, one beside the other.

    planned: the groups were known before the kernel ahead began, so weights are fetched early.
    exchange: by which it is sent to other parts.
    """
    g, s, columns = product.g, supers(w.columns), product.columns(p)
    largest = max((w, more or w), key=lambda w: w.layout.format.block_bytes)
    how, ordering = product.shape(p, largest), product.own_order(p)
    if more and columns == GROUPS[-1]:
        how = launch_shape(g, largest, columns, first=_SHAPES_OF_BOTH)
    assert how is not None
    blocks, rows = how.blocks * g.gpu.multiprocessors, TILE_ROWS if up else 2 * TILE_ROWS
    row_blocks, more_row_blocks, more_blocks = w.rows // rows, more.rows // rows if more else 0, 0
    # Fewer row blocks than would keep all warps busy for long, and superblocks for each of them.
    dense = not product.stack and not up
    split = (
        dense
        and not how.chunk
        and s >= how.warps
        and row_blocks + more_row_blocks < 2 * how.warps * blocks
        and how.shared(largest, split=True) <= how.shared_most(g)
    )
    defines: dict[str, str | int] = {"WEIGHT": f"Tiled{w.layout.format.name}", "DEPTH": how.depth}
    defines |= {"BLOCK": 32 * how.warps, "COLUMNS": columns, "AT_ONCE": how.blocks}
    defines |= {"SUPERS_AT_ONCE": how.chunk} if how.chunk else {}
    defines |= {"BESIDE": BESIDE} if dense and how.warps == 16 and columns == GROUPS[0] else {}
    defines |= {"GATED": 1} if up else {}
    defines |= {"PLANNED": 1} if planned else {}
    defines |= {"WEIGHED": 1} if product.stack and not ordering else {}
    defines |= {"SPLIT": 1} if split else {}
    defines |= {"OWN_ORDER": product.pairs_a_thread(p, 32 * how.warps)} if ordering else {}
    late = product.late(p)
    if late:
        defines |= {"FLOATS": 1}
        exchange = product.exchange
    defines |= exchange.defines
    defines |= {"TOGETHER": 1} if product.stack and g.captured and p.tokens <= FEW else {}
    if more:
        defines |= {"MORE": f"Tiled{more.layout.format.name}"}
        more_blocks = round(blocks * more.matrix_bytes / (w.matrix_bytes + more.matrix_bytes))
        more_blocks = min(max(more_blocks, 1), blocks - 1)
    each = product.blocks_of_group(p, blocks)
    if dense and columns == GROUPS[-1] and not product.head and each > (more is not None):
        of_more = max(1, round(more_blocks * each / blocks)) if more else 0
        groups = -(-product.pairs(p) // columns)
        blocks, more_blocks = groups * each, groups * of_more
    if dense and product.pairs(p) <= _FEWEST and blocks % 4 == 0:
        defines |= {"CLUSTER": 2}
        more_blocks = min(more_blocks + more_blocks % 2, blocks - 2)
    defines |= {"ONCE": 1} if product.stack and g.captured and p.tokens <= FEW else {}
    defines |= bring_own(p.tokens) if up and ordering else {}
    ahead, brings = bring(product.ahead if dense else Ahead(), p.tokens)
    defines |= brings
    second = up or more
    product.g.launch(
        "ops/batch_matmul",
        (blocks,),
        (w.address, second.address if second else 0, w.matrix_bytes, row_blocks, s)
        + (product.input(w, late=late), *product.groups(p), y, stride, more_row_blocks, more_blocks)
        + (*product.chosen(p), *exchange.arguments, *ahead),
        defines,
        shared=how.shared(largest, split=split) + ordering,
    )
