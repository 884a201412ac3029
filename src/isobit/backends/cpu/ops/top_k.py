"""Top-k: see top_k.simd.cpp. Its phase ends with the pairs grouped by expert."""

from isobit.backends.cpu.lowering import Lowering, instruction
from isobit.model.graph import Op
from isobit.numerics.ops import ExpertMatMul, TopK


def lower(to: Lowering, op: Op) -> None:
    """The experts of a token."""
    assert isinstance(op.operation, TopK)
    how, experts, k = op.operation, op.inputs[0].shape.width, op.operation.k
    integers = [experts, k, int(how.normalise), to.router(k), int(how.softmax)]
    integers += [how.groups, how.groups_used]
    made = to.simple(op, integers=integers, vectors=[w.float32() for w in op.weights])
    made["out"].append(to.scratch_vector(0, 2 * experts))
    phase = to.vectors(op, made)
    ids = op.outputs[1]
    here = (0, experts)  # of a part with whole experts: those that it has
    for reader in to.graph.ops:
        if isinstance(reader.operation, ExpertMatMul) and ids in reader.inputs:
            here = reader.operation.part or here
    group = instruction("group", in_=[to.place(ids)], integers=[*here, k])
    phase.after.append(group)
