"""Expert bias: see expert_bias.cpp."""

from isobit.backends.cpu.lowering import Lowering
from isobit.model.graph import Op


def lower(to: Lowering, op: Op) -> None:
    """The output of each of a token's experts plus its vector."""
    biases = op.weights[0].float32()
    made = to.simple(op, vectors=[biases.reshape(-1)], integers=[biases.shape[1]])
    to.vectors(op, made)
