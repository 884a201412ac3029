"""Softcap."""

from isobit.backends.wgpu.lowering import Lowering, anything, bits
from isobit.model.graph import Op
from isobit.numerics.ops import Softcap

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A value an invocation."""
    assert isinstance(op.operation, Softcap)
    cap = bits(op.operation.cap)
    (y,), n = op.outputs, op.outputs[0].shape.row[-1]
    x = g.rows(op.inputs[0], n)
    g.rowwise("ops/softcap", y.shape, n, (x.slot, g.new(y)), lambda _: (n, x.first, x.stride, cap))
