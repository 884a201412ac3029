"""Matrix products: few pairs or many, from tiles, from the file's blocks, or with float weights."""

from collections.abc import Sequence

from isobit.backends.cuda.device.layout import ACT_BYTES, COLUMN_ACT_BYTES
from isobit.backends.cuda.device.load import DeviceWeight, fuse_adjacent
from isobit.backends.cuda.device.memory import supers
from isobit.backends.cuda.device.protocol import Gpu
from isobit.backends.cuda.lowering import WARPS, Launch, Lowering, anything
from isobit.backends.cuda.ops import head_matmul
from isobit.backends.cuda.ops.batch_matmul import stream
from isobit.backends.cuda.ops.groups import GROUPS
from isobit.backends.cuda.ops.launch_shapes import FEW, fits_all, launch_shape
from isobit.backends.cuda.ops.part_matmul import lower_parts, parts_of
from isobit.backends.cuda.ops.product import Product
from isobit.backends.cuda.workspace import NOT_EXCHANGED, BufferView, Exchange, Pass
from isobit.model.graph import Op, Value

supports = anything

_PAIRS = 8  # that share one read of a weight: CHUNK of sorted_pairs.cuh
_MMA_FROM = 8  # pairs a matrix, on average, from which tensor cores pay
_TILED_ROWS, _TILED_SHARED = 32, 8 * 8 * ACT_BYTES + 8 * 8 * 32 * 4  # Shared of matmul.cu
_MMA_TOKENS, _MMA_ROWS = 32, 128  # TOKENS and ROWS of matmul_mma.cu
_BOTH = 512
"""Tokens of a prompt up to which products of two formats are made by one launch."""
_DEEP = 128, {16: 256, 8: 512}
"""Tokens between which products of many columns are faster by matmul_mma.cu than by blocks of so
many warps."""
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
            here = product.head and exchange is NOT_EXCHANGED
            if here and head_matmul.fits(g, w, product.pairs(p)):
                head_matmul.launch(g, w, product.input(w), product.pairs(p), at, stride)
                at += 4 * w.rows
                continue
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
