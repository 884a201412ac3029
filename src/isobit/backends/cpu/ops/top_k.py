"""Top-k: see top_k.simd.cpp."""

from isobit.backends.cpu.lowering import Lowering
from isobit.model.graph import Op
from isobit.numerics.ops import TopK


def lower(to: Lowering, op: Op) -> None:
    """The experts of a token."""
    assert isinstance(op.operation, TopK)
    how, experts, k = op.operation, op.inputs[0].shape.width, op.operation.k
    integers = [experts, k, int(how.normalise), to.router(k), int(how.softmax)]
    integers += [how.groups, how.groups_used]
    made = to.simple(op, integers=integers, vectors=[w.float32() for w in op.weights])
    made["out"].append(to.scratch_vector(0, 2 * experts))
    to.vectors(op, made)
