"""The gated delta rule."""

from isobit.backends.cuda.lowering import WARPS, Lowering, anything
from isobit.backends.cuda.workspace import Pass
from isobit.model.graph import Op
from isobit.numerics.ops import GatedDelta

supports = anything

_COLUMNS, _LANES = 4, 32
"""Columns of a warp, if all lanes have rows."""


def lower(g: Lowering, op: Op) -> None:
    """Some columns of a head's state a warp."""
    assert isinstance(op.operation, GatedDelta)
    (y,), (q, k, v, beta, decay) = op.outputs, op.inputs
    (key_heads, rows), (heads, columns) = k.shape.row, v.shape.row
    together = op.operation.together(key_heads, heads)
    each = _COLUMNS if rows >= _LANES and columns % (_COLUMNS * WARPS) == 0 else 1
    defines = {"ROWS": rows, "CORRECTS": int(op.operation.corrects), "COLUMNS": each}
    vectors = [g.view(x, x.shape.row[-1]) for x in (q, k, v)]
    scalars = [g.view(x, heads) for x in (beta, decay)]
    state, to = g.state(op), g.new(y)

    def make(p: Pass) -> None:
        views = [word for view in vectors for word in view()]
        views += [word for view in scalars for word in view()[:2]]
        g.launch(
            "ops/gated_delta",
            (-(-columns // (each * WARPS)), heads, p.sequences),
            (*views, key_heads, together, heads, columns, p.inputs.chunks, p.inputs.positions)
            + (state.address, to.address),
            defines,
        )

    g.emit(make, y)
