"""RoPE of head vectors that were not rotated with their norm."""

from isobit.backends.cuda.lowering import Lowering, anything
from isobit.model.graph import Op
from isobit.numerics.ops import Rope

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A value a thread."""
    assert isinstance(op.operation, Rope)
    (x, _), (y,), n = op.inputs, op.outputs, op.outputs[0].shape.row[-1]
    to, rope_table = g.new(y), g.rope_table(op.operation.table)
    g.vectors(
        "ops/rope",
        y.shape,
        n,
        [g.view(x, n)],
        lambda p: (rope_table.table.size, *rope_table.parts, p.inputs.positions, to.address),
        y,
        defines={"NEIGHBOURS": 1} if op.operation.neighbours else None,
    )
