"""What each part of a split model has of a value, put together: devices write to one another."""

from isobit.backends.cuda.lowering import THREADS, Defines, Launch, Lowering
from isobit.backends.cuda.workspace import MIXED, STEPS, Inboxes, Pass
from isobit.model.graph import Op
from isobit.numerics.ops import LOGIT_ROWS, Gather


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
    large = not g.captured or (y.shape.rows == LOGIT_ROWS and g.kind in (STEPS, MIXED))
    threads = 4 * THREADS if large else THREADS
    flagged: Defines = {"FLAGGED": 1} if large else {}
    exchange = g.exchange_of(op, most if large else 0)
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
