"""Some columns as head vectors: where they are already."""

from isobit.backends.wgpu.lowering import Lowering, Place
from isobit.model.graph import Op
from isobit.numerics.ops import Heads


def supports(op: Op) -> str | None:
    """See :mod:`isobit.backends.wgpu.ops`."""
    o = op.operation
    assert isinstance(o, Heads)
    return None if o.step == o.size else "expected heads one behind the other, got gaps"


def lower(g: Lowering, op: Op) -> None:
    """No step: what reads them knows that they are torn."""
    assert isinstance(op.operation, Heads)
    (y,), x = op.outputs, g.rows(op.inputs[0], op.inputs[0].shape.width)
    at = x.at + op.operation.first
    g.put(y, Place(x.slot, y.shape.width, x.stride, at, x.behind))
