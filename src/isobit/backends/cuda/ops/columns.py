"""Some columns of rows: where they are already."""

from isobit.backends.cuda.lowering import Lowering, anything
from isobit.backends.cuda.workspace import BufferView
from isobit.model.graph import Op
from isobit.numerics.ops import Columns

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """No launch."""
    assert isinstance(op.operation, Columns)
    (x,), (y,), width = op.inputs, op.outputs, op.operation.width
    whole = len(x.shape.row) == 1 or g.places[x].step == x.shape.row[-1]
    place = g.places[x] if whole else g.dense(x)
    g.put(y, BufferView(place.slot, place.stride, width, place.at + op.operation.first))
