"""Rows of the embedding table."""

from isobit.backends.cuda.device.memory import supers
from isobit.backends.cuda.lowering import Lowering, anything
from isobit.backends.cuda.workspace import Pass
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A superblock of a token a block."""
    table, y = g.matrix(op.weights[0]), g.new(op.outputs[0])

    def make(p: Pass) -> None:
        g.launch(
            "ops/embedding.embed",
            (p.tokens, supers(table.columns)),
            (table.address, p.inputs.tokens, table.columns, y.address),
            table.layout.embedding_defines,
        )

    g.emit(make, op.outputs[0])
