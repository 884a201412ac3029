"""The clamped SwiGLU, with the quantisation of what it gives."""

from isobit.backends.wgpu.lowering import Lowering, anything, bits
from isobit.model.graph import Op
from isobit.numerics.ops import ClampedGate

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A superblock a workgroup."""
    o = op.operation
    assert isinstance(o, ClampedGate)
    (y,), n = op.outputs, op.outputs[0].shape.row[-1]
    gate, up = (g.rows(v, n) for v in op.inputs)
    limit, factor = bits(o.limit), bits(o.factor)
    g.rowwise(
        "ops/clamped_gate",
        y.shape,
        n,
        (gate.slot, up.slot, g.new(y), g.acts_of(y, n)),
        lambda _: (n, gate.first, gate.stride, up.first, up.stride, limit, factor),
        quantise=True,
    )
