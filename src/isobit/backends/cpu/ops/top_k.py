"""Top-k: see top_k.cpp. Its phase ends with the pairs grouped by expert."""

from isobit.backends.cpu.lower import Lowering, instruction
from isobit.model.graph import Op
from isobit.numerics.ops import TopK


def lower(to: Lowering, op: Op) -> None:
    """The experts of a token."""
    assert isinstance(op.operation, TopK)
    experts, k = op.inputs[0].shape.width, op.operation.k
    made = to.simple(op, integers=[experts, k, int(op.operation.normalise), to.router(k)])
    made["out"].append(to.scratch_vector(0, experts))
    phase = to.vectors(op, made)
    group = instruction("group", in_=[to.place(op.outputs[1])], integers=[experts, k])
    phase.after.append(group)
