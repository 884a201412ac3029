"""The clamped SwiGLU, with the quantisation of what it gives."""

from isobit.backends.wgpu.lowering import Lowering, anything, bits
from isobit.model.graph import Op
from isobit.numerics.ops import ClampedGate

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A superblock a workgroup."""
    o = op.operation
    assert isinstance(o, ClampedGate)
    g.gate(op, bits(o.limit), bits(o.factor))
