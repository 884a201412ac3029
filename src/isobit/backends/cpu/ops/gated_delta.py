"""Gated delta rule: a phase, see phases/gated_delta.cpp."""

from isobit.backends.cpu.lower import Lowering, Phase, instruction
from isobit.model.graph import Op


def lower(to: Lowering, op: Op) -> None:
    """The delta net of all heads."""
    keys, (heads, size) = op.inputs[1].shape.row, op.inputs[2].shape.row
    made = instruction(
        "gated_delta",
        in_=[to.places[v] for v in op.inputs],
        out=[to.place(op.outputs[0])],
        integers=[to.state(op), keys[0], heads, keys[1], size],
    )
    to.phase(op, Phase("gated_delta", op.layer, op=made))
