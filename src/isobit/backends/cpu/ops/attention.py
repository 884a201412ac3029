"""Attention: a phase, see attention.simd.cpp."""

from isobit.backends.cpu.lowering import Lowering
from isobit.backends.cpu.program import Phase, instruction
from isobit.model.graph import Op
from isobit.numerics.ops import Attention


def lower(to: Lowering, op: Op) -> None:
    """Attention of all heads."""
    assert isinstance(op.operation, Attention)
    q, keys, values, _ = op.inputs
    if not to.slots[to.places[q].slot].get("query"):
        to.copy(q, op)  # makes them what attention reads
    assert q.shape.row[1] == keys.shape.row[1] == values.shape.row[1]
    made = instruction(
        "attention",
        in_=[to.places[q]],
        out=[to.place(op.outputs[0])],
        integers=[to.cache_of[keys], q.shape.row[0], op.operation.window or 0],
        vectors=[w.float32() for w in op.weights],
    )
    to.phase(op, Phase("attention", op.layer, op=made))
