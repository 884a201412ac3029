"""RMS norm, with the quantisation of what it gives; also of a sum."""

from collections.abc import Callable

from isobit.backends.cuda.device.memory import supers
from isobit.backends.cuda.lowering import Defines, Lowering, anything
from isobit.backends.cuda.workspace import NOT_EXCHANGED, BufferView, Exchange, Pass
from isobit.model.graph import Op, Value
from isobit.numerics.ops import RmsNorm

supports = anything

_SUPERS = 47  # of a row that norm_quantise.cu has room for
_WARPS = 16  # of a block at most
_ADDING, _READ = 4, 4
"""Where a product's parts are added up: blocks that a multiprocessor has registers for, beside
those of the product; parts that are read at once."""
_REGISTERS = 64 << 10  # of a multiprocessor; up to 128 a thread here


def fits(width: int) -> bool:
    """Whether :func:`norm` takes rows of so many values."""
    return width % 8 == 0 and supers(width) <= _SUPERS


def defines(width: int, added: int, *, weighted: bool) -> Defines:
    """The definitions of norm_quantise.cu: ``added`` rows are added to each row of ``width``."""
    each = -(-supers(width) // _WARPS)
    threads = 32 * -(-supers(width) // each)
    found = {"WIDTH": width, "ADDED": added, "ROW_THREADS": threads}
    found["AT_ONCE"] = max(1, _REGISTERS // (128 * threads))
    return found | ({"WEIGHTED": 1} if weighted else {})


def lower(g: Lowering, op: Op) -> None:
    """A vector a block."""
    assert isinstance(op.operation, RmsNorm)
    (x,), (y,), eps = op.inputs, op.outputs, op.operation.eps
    n = y.shape.row[-1]
    if len(y.shape.row) == 1 and fits(n) and g.multiplied(y):
        norm(g, op, g.dense(x), y)
        return
    view, weight, to, each = g.view(x, n), g.vector(op.weights[0]), g.new(y), y.shape.width // n

    def make(p: Pass) -> None:
        arguments = (*view(), each, weight(), eps, n, to.address)
        g.launch("ops/rms_norm", (p.rows(y.shape) * each,), arguments)

    g.emit(make, y)


def norm(
    g: Lowering,
    op: Op,
    x: BufferView,
    y: Value,
    addend: Value | None = None,
    shares: Value | None = None,
    *sums: Value,
    shared: tuple[Value, Value, Callable[[], int]] | None = None,
    exchange: Exchange = NOT_EXCHANGED,
    columns: int = 0,
) -> None:
    """The norm y of x, of x + addend, or of x and the addend's rows by their shares, with its
    quantised form; the sum, if there is one, takes x's place, as ``sums`` do. ``shared``: one row
    more, and what it is added by, the sigmoid of a product of a row with float32 weights.
    ``columns``: of the addend's rows, if other parts have others: then blocks wait, and so are no
    more at a time than run at once."""
    assert isinstance(op.operation, RmsNorm)
    n, eps, weight = y.shape.width, op.operation.eps, g.vector(op.weights[0])
    more = g.dense(addend) if addend else None
    by = g.dense(shares) if shares else None
    added = addend.shape.width // (columns or n) if addend else 0
    besides = (g.dense(shared[0]), g.dense(shared[1]), shared[2]) if shared else None
    how = {**defines(n, added, weighted=shares is not None), **exchange.defines}
    how |= {"SHARED": 1} if shared else {}
    to, acts = g.new(y), g.acts_of(y, n)
    at_once = g.gpu.multiprocessors * int(how["AT_ONCE"])
    parts = g.parts.get(addend) if addend else None

    def make(p: Pass) -> None:
        rows = p.rows(y.shape)
        if parts and (count := parts.count(p)) > 1:
            g.launch(
                "ops/norm_quantise",
                (rows,),
                (x.address, parts.slot.address, 0, 0, 0, 0, weight(), eps, to.address)
                + (acts.address, 0, 0, 0),
                {**how, "ADDED": count, "AT_ONCE": _ADDING, "READ_AT_ONCE": _READ},
            )
            return
        for first in range(0, rows, at_once if columns else rows):
            g.launch(
                "ops/norm_quantise",
                (min(rows - first, at_once) if columns else rows,),
                (x.address, more.address if more else 0, by.address if by else 0)
                + ((besides[0].address, besides[1].address, besides[2]()) if besides else (0, 0, 0))
                + (weight(), eps, to.address, acts.address, *exchange.arguments, first),
                how,
            )

    g.emit(make, *sums, y)
