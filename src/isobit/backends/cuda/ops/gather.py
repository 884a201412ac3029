"""What each part of a split model has of a value, put together: devices write to one another."""

from isobit.backends.cuda.lowering import THREADS, Defines, Launch, Lowering
from isobit.backends.cuda.workspace import Inboxes, Pass
from isobit.model.graph import Op
from isobit.numerics.ops import Gather


def supports(op: Op) -> str | None:
    """One range of columns a part, as products are split."""
    assert isinstance(op.operation, Gather)
    torn = any(len(ranges) != 1 for ranges in op.operation.parts)
    return "no kernel for columns in several ranges" if torn else None


def lower(g: Lowering, op: Op) -> None:
    """Blocks that all run at once, as they wait for others': on half of the multiprocessors, so
    that there is room for those of another part on the same device."""
    gather = op.operation
    assert isinstance(gather, Gather)
    (x,), (y,) = op.inputs, op.outputs
    n, view, to = x.shape.row[-1], g.view(x, x.shape.row[-1]), g.new(y)
    each = x.shape.width // n
    widest = max(gather.columns(r) for r in range(len(gather.parts)))
    most = max(1, g.gpu.multiprocessors // 2)
    threads = THREADS if g.captured else 4 * THREADS  # a value may be large
    flagged: Defines = {} if g.captured else {"FLAGGED": 1}
    exchange = g.exchange_of(op, 0 if g.captured else most)
    defines = {**exchange.defines, **flagged, "BLOCKS": most, "WIDE": threads}

    def make(p: Pass) -> None:
        vectors = p.rows(x.shape) * each
        arguments = (*view(), each, vectors, *exchange.arguments, to.address)
        blocks = min(-(-vectors * widest // threads), most)
        g.launch("ops/gather", (blocks,), arguments, defines)

    g.emit(make, y)


def numbering(g: Lowering, inboxes: Inboxes) -> Launch:
    """Queue what gives the exchanges of a pass their numbers."""
    return lambda _: g.launch("ops/exchanges", (1,), (inboxes.count, inboxes.sites))
