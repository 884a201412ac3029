"""Vectors over their lengths."""

from collections.abc import Iterable

from isobit.backends.wgpu.device.gpu import Step
from isobit.backends.wgpu.device.layout import superblocks
from isobit.backends.wgpu.lowering import Lowering, Pass, anything, bits
from isobit.model.graph import Op
from isobit.numerics.ops import L2Norm

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """256 values of a vector a workgroup."""
    o = op.operation
    assert isinstance(o, L2Norm)
    (y,), n = op.outputs, op.outputs[0].shape.row[-1]
    x = g.rows(op.inputs[0], y.shape.width)
    heads = y.shape.width // n
    buffers, eps, scale = (x.slot, g.new(y)), bits(o.eps), bits(o.scale)

    def steps(p: Pass) -> Iterable[Step]:
        parameters = n, heads, x.first, x.stride, eps, scale
        grid = superblocks(n), p.tokens * heads
        yield g.step("ops/l2_norm", buffers, parameters, grid, ("reduce",))

    g.emit(steps, heads)
