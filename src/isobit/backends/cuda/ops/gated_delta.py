"""The gated delta rule."""

from isobit.backends.cuda.lowering import WARPS, Lowering
from isobit.backends.cuda.slots import Pass
from isobit.model.graph import Op
from isobit.numerics.ops import GatedDelta


def supports(op: Op) -> str | None:
    """See :mod:`isobit.backends.cuda.ops`."""
    assert isinstance(op.operation, GatedDelta)
    return "value heads of a key head, one behind the other" if op.operation.grouped else None


def lower(g: Lowering, op: Op) -> None:
    """A column of a head's state a warp."""
    (y,), (q, k, v, beta, decay) = op.outputs, op.inputs
    (key_heads, rows), (heads, columns) = k.shape.row, v.shape.row
    vectors = [g.view(x, x.shape.row[-1]) for x in (q, k, v)]
    scalars = [g.view(x, heads) for x in (beta, decay)]
    state, to = g.state(op), g.new(y)

    def make(p: Pass) -> None:
        views = [word for view in vectors for word in view()]
        views += [word for view in scalars for word in view()[:2]]
        g.launch(
            "ops/gated_delta",
            (-(-columns // WARPS), heads, p.runs),
            (*views, key_heads, heads, columns, p.inputs.runs, p.inputs.positions)
            + (state.address, to.address),
            {"ROWS": rows},
        )

    g.emit(make, y)
