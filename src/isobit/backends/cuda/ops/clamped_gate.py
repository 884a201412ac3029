"""The clamped SwiGLU of gpt-oss."""

from isobit.backends.cuda.lowering import Lowering, anything
from isobit.model.graph import Op
from isobit.numerics.ops import ClampedGate

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A value a thread."""
    assert isinstance(op.operation, ClampedGate)
    g.valuewise(op, op.operation.limit, op.operation.factor)
