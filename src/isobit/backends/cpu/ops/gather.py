"""Gather: a phase, see gather.cpp."""

from isobit.backends.cpu.lowering import Lowering
from isobit.backends.cpu.program import Phase, instruction
from isobit.model.graph import Op
from isobit.numerics.ops import Gather


def lower(to: Lowering, op: Op) -> None:
    """Every part's piece, put together."""
    g = op.operation
    assert isinstance(g, Gather)
    (x,), (y,) = op.inputs, op.outputs
    integers = [x.shape.width // x.shape.row[-1], *map(g.columns, range(len(g.parts)))]
    for rank, ranges in enumerate(g.parts):
        at = 0
        for first, end in ranges:
            integers += [rank, at, first, end - first]
            at += end - first
    made = instruction("gather", in_=[to.place(x)], out=[to.place(y)], integers=integers)
    to.phase(op, Phase("gather", op.layer, y.shape.rows, op=made))
