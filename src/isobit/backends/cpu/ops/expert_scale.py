"""Expert scale: see scale.cpp."""

from isobit.backends.cpu.lowering import Lowering
from isobit.backends.cpu.program import instruction
from isobit.model.graph import Op


def lower(to: Lowering, op: Op) -> None:
    """Each of a token's vectors times its expert's number."""
    weight, length = op.weights[0].float32(), op.outputs[0].shape.row[-1]
    ins, y = [to.read(v, op) for v in op.inputs], to.place(op.outputs[0])
    made = instruction("expert_scale", in_=ins, out=[y], vectors=[weight], integers=[length])
    to.vectors(op, made)
