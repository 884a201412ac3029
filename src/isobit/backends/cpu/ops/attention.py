"""Attention: a phase, see phases/attention.cpp."""

from isobit.backends.cpu.lower import Lowering, Phase, instruction
from isobit.model.graph import Op


def lower(to: Lowering, op: Op) -> None:
    """Attention of all heads."""
    q, keys, values, _ = op.inputs
    assert q.shape.row[1] == keys.shape.row[1] == values.shape.row[1]
    made = instruction(
        "attention",
        in_=[to.places[q]],
        out=[to.place(op.outputs[0])],
        integers=[to.cache_of[keys], q.shape.row[0]],
    )
    to.phase(op, Phase("attention", op.layer, op=made))
