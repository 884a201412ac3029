"""Some columns as head vectors: where they are already, unless the gaps between them differ."""

from isobit.backends.wgpu.lowering import BufferView, Lowering, anything
from isobit.model.graph import Op
from isobit.numerics.ops import Heads

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """No step: what reads them knows that they are torn. Vectors with other gaps are copied."""
    o = op.operation
    assert isinstance(o, Heads)
    (y,), x = op.outputs, g.rows(op.inputs[0], op.inputs[0].shape.width)
    if o.step == o.size or o.count == 1:
        g.put(y, BufferView(x.slot, y.shape.width, x.stride, x.at + o.first, x.behind))
        return
    if o.count * o.step == x.stride:  # the same gap behind a row's last as behind every other
        g.put(y, BufferView(x.slot, o.size, o.step, x.at + o.first, x.behind))
        return
    g.rowwise(
        "ops/heads",
        y.shape,
        o.size,
        (x.slot, g.new(y)),
        lambda _: (o.size, o.count, x.first + o.first, x.stride, o.step),
    )
