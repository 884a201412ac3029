"""GeGLU, with the quantisation of what it gives."""

from isobit.backends.wgpu.lowering import Lowering, anything
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A superblock a workgroup."""
    g.gate(op)
