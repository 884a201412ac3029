"""Gather of whole experts' outputs: a phase, see gather.cpp."""

from isobit.backends.cpu.lowering import Lowering
from isobit.backends.cpu.program import Phase, instruction
from isobit.model.graph import Op
from isobit.numerics.ops import GatherExperts


def lower(to: Lowering, op: Op) -> None:
    """Each output from the part that has its expert."""
    g = op.operation
    assert isinstance(g, GatherExperts)
    (x, ids), (y,) = op.inputs, op.outputs
    made = instruction(
        "gather_experts",
        in_=[to.place(x), to.place(ids)],
        out=[to.place(y)],
        integers=[*x.shape.row, *g.bounds[1:]],
    )
    to.phase(op, Phase("gather_experts", op.layer, y.shape.rows, op=made))
