"""Rows of the embedding, which the host decodes for each pass."""

from isobit.backends.wgpu.lowering import Lowering, anything
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """No step: the backend writes them."""
    g.embeddings.append((op.weights[0], g.written(op.outputs[0])))
