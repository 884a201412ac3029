"""Some columns as head vectors: where they are already."""

from isobit.backends.cuda.lowering import Lowering, anything
from isobit.backends.cuda.workspace import BufferView
from isobit.model.graph import Op
from isobit.numerics.ops import Heads

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """No launch: what reads them knows that they may have gaps."""
    assert isinstance(op.operation, Heads)
    (x,), (y,) = op.inputs, op.outputs
    whole = len(x.shape.row) == 1 or g.places[x].step == x.shape.row[-1]
    place = g.places[x] if whole else g.dense(x)
    g.put(y, BufferView(place.slot, place.stride, op.operation.step, place.at + op.operation.first))
