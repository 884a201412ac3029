"""Gated delta rule: a phase, see gated_delta.simd.cpp."""

from isobit.backends.cpu.lowering import Lowering
from isobit.backends.cpu.program import Phase, instruction
from isobit.model.graph import Op
from isobit.numerics.ops import GatedDelta


def lower(to: Lowering, op: Op) -> None:
    """The delta net of all heads."""
    assert isinstance(op.operation, GatedDelta)
    (keys, rows), (heads, columns) = op.inputs[1].shape.row, op.inputs[2].shape.row
    how = op.operation.together(keys, heads), int(op.operation.corrects)
    made = instruction(
        "gated_delta",
        in_=[to.places[v] for v in op.inputs],
        out=[to.place(op.outputs[0])],
        integers=[to.state(op), keys, heads, rows, columns, *how],
    )
    to.phase(op, Phase("gated_delta", op.layer, op=made))
