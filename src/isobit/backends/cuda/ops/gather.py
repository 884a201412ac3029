"""What each part of a split model has of a value, put together: devices write to one another."""

from isobit.backends.cuda.lowering import THREADS, Launch, Lowering
from isobit.backends.cuda.workspace import MIXED, STEPS, Inboxes, Pass
from isobit.model.graph import Op
from isobit.numerics.ops import LOGIT_ROWS, Gather


def supports(op: Op) -> str | None:
    """One range of columns a part, as products are split."""
    assert isinstance(op.operation, Gather)
    torn = any(len(ranges) != 1 for ranges in op.operation.parts)
    return "no kernel for columns in several ranges" if torn else None


def lower(g: Lowering, op: Op) -> None:
    """In place where that may be; else by blocks that all run at once, as they wait for others'."""
    if g.in_place(op):
        _lower_in_place(g, op)
        return
    gather = op.operation
    assert isinstance(gather, Gather)
    (x,), (y,) = op.inputs, op.outputs
    n, view, to = x.shape.row[-1], g.view(x, x.shape.row[-1]), g.new(y)
    each = x.shape.width // n
    most = g.blocks_at_once
    large = not g.captured or (y.shape.rows == LOGIT_ROWS and g.kind in (STEPS, MIXED))
    threads = 4 * THREADS if large else THREADS
    exchange = g.exchange_of(op, most if large else 0)
    moved = 4 if large and all(column % 4 == 0 for column in exchange.bounds) else 1
    widest = -(-max(gather.columns(r) for r in range(len(gather.parts))) // moved)
    lanes = min(threads, 1 << (widest - 1).bit_length())
    pieces = -(-widest // lanes)
    defines = {**exchange.defines, "BLOCKS": most, "WIDE": threads, "LANES": lanes, "MOVED": moved}
    defines |= {"FLAGGED": 1} if large else {}

    def make(p: Pass) -> None:
        vectors = p.rows(x.shape) * each
        items = -(-vectors * lanes // threads) * pieces
        arguments = (*view(), each, vectors, pieces, items, *exchange.arguments, to.address)
        g.launch("ops/gather", (min(items, most),), arguments, defines)

    g.emit(make, y)


def _lower_in_place(g: Lowering, op: Op) -> None:
    """Once all parts have stored their columns in every part's inbox."""
    (x,), (y,) = op.inputs, op.outputs
    exchange = g.mirrored.get(x) or g.mirror_of(op)
    if x not in g.mirrored:
        n, view, to = x.shape.row[-1], g.view(x, x.shape.row[-1]), exchange.place(y, exchange.first)
        each, width = x.shape.width // n, y.shape.row[-1]

        def send(p: Pass) -> None:
            vectors = p.rows(x.shape) * each
            arguments = (*view(), each, n, width, vectors, exchange.arguments[0], to.address)
            g.launch("ops/send", (-(-vectors * n // 4 // THREADS),), arguments, exchange.defines)

        g.emit(send)
    g.put(y, exchange.place(y))
    g.meet(exchange, y)


def numbering(g: Lowering, inboxes: Inboxes) -> Launch:
    """Queue what gives the exchanges of a pass their numbers."""
    return lambda _: g.launch("ops/exchanges", (1,), (inboxes.count, inboxes.sites))
