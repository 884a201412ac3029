"""RoPE of head vectors that were not rotated with their norm."""

from isobit.backends.wgpu.lowering import Lowering, anything
from isobit.model.graph import Op
from isobit.numerics.ops import Rope

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A value an invocation."""
    assert isinstance(op.operation, Rope)
    table = g.rope(op.operation.table)
    (y,), (heads, size) = op.outputs, op.outputs[0].shape.row
    n, neighbours = heads * size, int(op.operation.neighbours)
    x = g.rows(op.inputs[0], n)
    buffers = x.slot, g.batch, g.new(y)
    parameters = n, size, table.size, neighbours
    g.rowwise(
        "ops/rope",
        y.shape,
        n,
        buffers,
        lambda p: (*parameters, x.first, x.stride, g.at(p).rope[table]),
    )
