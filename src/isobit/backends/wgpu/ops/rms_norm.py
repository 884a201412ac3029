"""RMS norm, with the quantisation of what it gives; also of a sum, and of chosen rows."""

from isobit.backends.wgpu.lowering import BufferView, Lowering, Pass, Slot, anything, bits
from isobit.model.graph import Op, Value
from isobit.numerics.ops import RmsNorm

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A superblock a workgroup."""
    norm(g, op, op.inputs[0], op.outputs[0])


def norm(
    g: Lowering,
    op: Op,
    x: Value,
    y: Value,
    addend: Value | None = None,
    shares: Value | None = None,
) -> Slot:
    """The norm y of x, of x + addend, or of x and the addend's rows by their shares; of the wanted
    rows alone, if y has no others. In the slot, y lies behind the sum; what was added, behind y."""
    assert isinstance(op.operation, RmsNorm)
    width, n, eps = x.shape.width, x.shape.row[-1], bits(op.operation.eps)
    weight_at = g.vector(op.weights[0])
    outputs = addend.shape.width // n if addend else 0
    state = g.slot("state", (3 if outputs else 2) * width, y.shape.rows)
    added = (g.dense(v) if v else g.nothing for v in (addend, shares))
    buffers = g.dense(x), *added, g.vectors, g.batch, state, g.acts_of(y, n)
    g.put(y, BufferView(state, n, n, behind=width))

    def parameters(p: Pass) -> tuple[int, ...]:
        rows_at = g.at(p).rows + p.first + 1 if y.shape.rows != x.shape.rows else 0
        region = state.capacity * width
        return n, outputs, int(shares is not None), weight_at, eps, region, rows_at

    g.rowwise("ops/rms_norm", y.shape, n, buffers, parameters, quantise=True)
    return state
