"""y = W x with weights that stream through shared memory once for each group of pairs."""

from isobit.backends.cuda.device.layout import TILE_ROWS
from isobit.backends.cuda.device.load import DeviceWeight
from isobit.backends.cuda.device.memory import supers
from isobit.backends.cuda.lowering import Ahead
from isobit.backends.cuda.ops.groups import GROUPS
from isobit.backends.cuda.ops.launch_shapes import (
    BESIDE,
    FEW,
    FEWEST,
    bring,
    bring_own,
    launch_shape,
)
from isobit.backends.cuda.ops.product import Product
from isobit.backends.cuda.workspace import NOT_EXCHANGED, Exchange, Pass

_SHAPES_OF_BOTH = ((1, 16, 1),)
"""Of products of two formats, before those of launch_shapes.py: more warps are worth more than more
superblocks."""


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
    if dense and product.pairs(p) <= FEWEST and blocks % 4 == 0:
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
