"""Some columns: where they are already."""

from isobit.backends.wgpu.lowering import BufferView, Lowering, anything
from isobit.model.graph import Op
from isobit.numerics.ops import Columns

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """No step: what reads them knows that they are torn."""
    assert isinstance(op.operation, Columns)
    (y,), x = op.outputs, g.rows(op.inputs[0], op.inputs[0].shape.width)
    g.put(y, BufferView(x.slot, y.shape.width, x.stride, x.at + op.operation.first, x.behind))
