"""Rows that each part of a split model has of its own experts, put together on every part."""

from collections.abc import Mapping

from isobit.backends.cuda.lowering import Lowering, anything
from isobit.backends.cuda.workspace import Pass
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """Where this part's rows are; by blocks that all run at once, as they wait for others'."""
    (x, ids), (y,) = op.inputs, op.outputs
    exchange, rows, of, most = g.exchange_of_experts(op), g.dense(x), g.dense(ids), g.blocks_at_once
    g.put(y, rows)
    (k, n) = y.shape.row
    moved = 4 if n % 4 == 0 else 1
    defines: Mapping[str, str | int] = {**exchange.defines, "BLOCKS": most, "MOVED": moved}

    def make(p: Pass) -> None:
        arguments = rows.address, of.address, p.tokens * k, n // moved, *exchange.arguments
        g.launch("ops/gather_experts", (min(p.tokens * k, most),), arguments, defines)

    g.emit(make, y)
