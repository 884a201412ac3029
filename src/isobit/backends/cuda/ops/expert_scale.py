"""Each output of an expert times its own number."""

from isobit.backends.cuda.lowering import Lowering, anything
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A value a thread."""
    (x, ids), (y,) = op.inputs, op.outputs
    n, chosen, scales, to = y.shape.row[-1], g.dense(ids), g.vector(op.weights[0]), g.new(y)
    g.vectors(
        "ops/expert_scale",
        y.shape,
        n,
        [g.view(x, n)],
        lambda _: (chosen.address, scales(), to.address),
        y,
    )
