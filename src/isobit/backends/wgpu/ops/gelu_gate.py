"""GeGLU, with the quantisation of what it gives."""

from isobit.backends.wgpu.lowering import Lowering, anything
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A superblock a workgroup."""
    (y,), n = op.outputs, op.outputs[0].shape.row[-1]
    gate, up = (g.rows(v, n) for v in op.inputs)
    g.rowwise(
        "ops/gelu_gate",
        y.shape,
        n,
        (gate.slot, up.slot, g.new(y), g.acts_of(y, n)),
        lambda _: (n, gate.first, gate.stride, up.first, up.stride),
        quantise=True,
    )
