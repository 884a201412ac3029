"""SiLU gate: see silu_gate.cpp; within a gated feed-forward, expert_matmul.cpp."""

from isobit.backends.cpu.lowering import Lowering
from isobit.model.graph import Op


def lower(to: Lowering, op: Op) -> None:
    """SwiGLU of two vectors."""
    to.vectors(op, to.simple(op, integers=[op.outputs[0].shape.row[-1]]))
