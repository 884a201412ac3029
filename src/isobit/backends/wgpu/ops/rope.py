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
    n, x = heads * size, g.packed(op.inputs[0])
    buffers = x.slot, g.batch, g.new(y)
    parameters = n, size, table.size
    g.rowwise(
        "ops/rope", y.shape, n, buffers, lambda p: (*parameters, x.first, g.at(p).rope[table])
    )
