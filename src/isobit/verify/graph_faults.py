"""Faults of the graph itself: every backend that is given it computes the same wrong thing.

Comparing backends with each other cannot see such a fault; a run on the right graph does, and so
does an oracle that was written without the graph.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from isobit.errors import UsageError
from isobit.model.graph import Graph, Op
from isobit.model.weights import Weights
from isobit.numerics import Weight
from isobit.numerics.ops import Array, Arrays, Context, RmsNorm, Rope

Rewrite = Callable[[Graph, int], Graph]
"""A graph with a fault in a layer."""
WRONG_BASE = 1e4
"""What the angles of other models start from."""


def rewritten(weights: Weights, name: str, layer: int) -> Weights:
    """Weights with a fault of GRAPH_FAULTS in their graph. Raises UsageError where it has none."""
    rewrite, _ = GRAPH_FAULTS[name]
    return replace(weights, graph=rewrite(weights.graph, layer))


def partner(layer: int) -> int:
    """The layer that one's tensors are exchanged with."""
    return layer - 1 if layer else 1


def _swapped_layers(graph: Graph, layer: int) -> Graph:
    def tensors(index: int) -> dict[str, Weight]:
        named = ((w.name, w) for op in graph.ops if op.layer == index for w in op.weights)
        return {name.removeprefix(f"blk.{index}."): w for name, w in named}

    mine, theirs = tensors(layer), tensors(partner(layer))
    if {n: w.shape for n, w in mine.items()} != {n: w.shape for n, w in theirs.items()}:
        raise UsageError(f"swapped-layers: expected layers {layer} and {partner(layer)} alike")
    changed = {w.name: theirs[name] for name, w in mine.items()}
    return graph.with_weights(changed | {w.name: mine[name] for name, w in theirs.items()})


def _norm_after_rope(graph: Graph, layer: int) -> Graph:
    """Queries and keys are rotated first and normalised after."""
    made_by = {v: op for op in graph.ops for v in op.outputs}
    changed: dict[Op, Op] = {}
    for rope in _ropes(graph, layer):
        norm = made_by.get(rope.inputs[0])
        if norm is None or not isinstance(norm.operation, RmsNorm):
            raise UsageError("norm-after-rope: expected normalised queries and keys")
        first = (*norm.inputs, *rope.inputs[1:])
        changed[norm] = replace(norm, operation=rope.operation, inputs=first, weights=())
        after = norm.outputs
        changed[rope] = replace(rope, operation=norm.operation, inputs=after, weights=norm.weights)
    return _with(graph, changed)


def _parallel_ffn(graph: Graph, layer: int) -> Graph:
    """The feed-forward reads what attention read, as in models whose two halves are parallel."""
    entry = next(op.inputs[0] for op in graph.layer(layer))
    if ("ffn_norm", layer) not in graph.stages:
        raise UsageError(f"parallel-ffn: expected a model with ffn_norm in layer {layer}")
    norm = graph.stages["ffn_norm", layer].ops[-1]
    return _with(graph, {norm: replace(norm, inputs=(entry,))})


def _rope_base(graph: Graph, layer: int) -> Graph:
    return _with(graph, {op: _turned(op, Rope, WRONG_BASE) for op in _ropes(graph, layer)})


def _rope_pairs(graph: Graph, layer: int) -> Graph:
    return _with(graph, {op: _turned(op, NeighbourRope) for op in _ropes(graph, layer)})


@dataclass(frozen=True)
class NeighbourRope(Rope):
    """Rotates the pairs (2i, 2i + 1) in place of (i, i + half)."""

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        return self._of_neighbours(super().specification, run, weights, inputs)

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        return self._of_neighbours(super().float64, run, weights, inputs)

    def _of_neighbours(
        self,
        rotate: Callable[..., Arrays],
        run: Context,
        weights: Sequence[Weight],
        inputs: Sequence[Array],
    ) -> Arrays:
        x, n = inputs[0], self.table.size
        order = np.concatenate([np.arange(0, n, 2), np.arange(1, n, 2), np.arange(n, x.shape[-1])])
        (rotated,) = rotate(run, weights, x[..., order], *inputs[1:])
        out = np.empty_like(rotated)
        out[..., order] = rotated
        return (out,)


def _ropes(graph: Graph, layer: int) -> list[Op]:
    found = [op for op in graph.layer(layer) if isinstance(op.operation, Rope)]
    if not found:
        raise UsageError(f"expected a rotation in layer {layer}, found none")
    return found


def _turned(op: Op, kind: type[Rope], base: float | None = None) -> Op:
    assert isinstance(op.operation, Rope)
    table = op.operation.table
    table = table if base is None else replace(table, base=base)
    return replace(op, operation=kind(table))


def _with(graph: Graph, changed: dict[Op, Op]) -> Graph:
    return replace(graph, ops=tuple(changed.get(op, op) for op in graph.ops))


GRAPH_FAULTS: dict[str, tuple[Rewrite, str]] = {
    "swapped-layers": (_swapped_layers, "attn_norm"),
    "norm-after-rope": (_norm_after_rope, "q_post_rope"),
    "parallel-ffn": (_parallel_ffn, "ffn_norm"),
    "rope-base": (_rope_base, "q_post_rope"),
    "rope-pairs": (_rope_pairs, "q_post_rope"),
}
"""What each does to a graph, and the stage where a run on the right graph must see it first."""
