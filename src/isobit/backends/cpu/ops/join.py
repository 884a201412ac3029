"""Join: see join.cpp."""

from isobit.backends.cpu.lowering import Lowering
from isobit.model.graph import Op


def lower(to: Lowering, op: Op) -> None:
    """A head's two vectors."""
    (groups, a), (heads, b) = (v.shape.row for v in op.inputs)
    to.vectors(op, to.simple(op, integers=[a, b, heads // groups]), apart=True)
