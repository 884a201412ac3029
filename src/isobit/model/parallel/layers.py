"""A graph cut by layers: stages of a pipeline, each a graph of its own. A pass from graph to graph.

What crosses a cut is one row a token, the residual. Each operation runs as in the whole graph, so
no cut changes a bit.
"""

from isobit.errors import UsageError
from isobit.model.graph import Graph, Op, Value
from isobit.numerics.ops import LOGIT_ROWS, Receive, SelectRows, Shape


def layers(graph: Graph, first: int, end: int) -> Graph:
    """The graph of layers ``first`` … ``end`` - 1.

    With layer 0 comes what stands before it, with the last layer what stands behind. Of a stage
    that is not the last, the "logits" are the rows that the next receives (of the tokens that
    ``logit_rows`` names: all of them). Raises UsageError for a range that is empty or not there.
    """
    n = graph.n_layers
    if not 0 <= first < end <= n:
        raise UsageError(f"layers: expected a range within 0:{n}, got {first}:{end}")
    ops = _between(graph, first, end)
    made = {v for op in ops for v in op.outputs} | set(graph.given)
    taken = list(dict.fromkeys(v for op in ops for v in op.inputs if v not in made))
    if taken:
        (x,) = taken
        ops.insert(0, Op(Receive(x.shape.width), (), (x,), (), None))
    logits = graph.logits
    if end < n:
        later = {v for op in _between(graph, end, n) for v in op.inputs}
        (x,) = (v for op in ops for v in op.outputs if v in later)
        logits = Value(None, None, Shape(x.shape.row, LOGIT_ROWS))
        ops.append(Op(SelectRows(), (x, graph.logit_rows), (logits,), (), None))
    return Graph(graph.tokens, graph.positions, graph.logit_rows, tuple(ops), logits)


def _between(graph: Graph, first: int, end: int) -> list[Op]:
    """The operations of layers, with those before layer 0 and behind the last."""
    out, begun = [], False
    for op in graph.ops:
        begun = begun or op.layer is not None
        layer = op.layer
        if layer is None:
            layer = graph.n_layers - 1 if begun else 0
        if first <= layer < end:
            out.append(op)
    return out
