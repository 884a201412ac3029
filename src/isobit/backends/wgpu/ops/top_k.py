"""The experts of each token, their weights, and the routing of the products with them."""

from collections.abc import Iterable
from dataclasses import dataclass

from isobit.backends.wgpu.device.gpu import Step
from isobit.backends.wgpu.lowering import BufferView, Lowering, Pass
from isobit.model.graph import Op, Value
from isobit.numerics.ops import TopK

CHUNK = 8
"""Pairs that share one read of the weights: CHUNK of sorted_pairs.wgsl."""
_MOST = 64  # chosen, in top_k.wgsl


@dataclass(frozen=True)
class SortedPairs:
    """The parts of a routing (sorted_pairs.wgsl), in words from the ids [tokens, k] that it begins
    with."""

    pairs: int
    sorted_pairs: int
    groups_at: int
    groups: int
    """Groups that a launch looks at."""
    counts: int

    @classmethod
    def of(cls, ids: Value, p: Pass) -> "SortedPairs":
        """Those of a pass."""
        pairs, experts = p.tokens * ids.shape.width, ids.shape.below or 0
        # One token's experts differ; else those of several tokens share a read of the weights.
        groups = pairs if p.tokens == 1 else min(pairs, experts + pairs // CHUNK)
        return cls(pairs, pairs, 2 * pairs, groups, 5 * pairs)


def supports(op: Op) -> str | None:
    """See :mod:`isobit.backends.wgpu.ops`."""
    k = op.outputs[1].shape.width
    return None if k <= _MOST else f"expected at most {_MOST} experts a token, got {k}"


def lower(g: Lowering, op: Op) -> None:
    """A token a workgroup; then, for several tokens, a launch that sorts their pairs."""
    assert isinstance(op.operation, TopK)
    how, k = op.operation, op.operation.k
    bias_at = g.vector(op.weights[0]) + 1 if op.weights else 0
    (z,), (weights, ids) = op.inputs, op.outputs
    experts = z.shape.width
    routing = g.slot("routing", 5 * k, more=experts)
    g.put(ids, BufferView(routing, k, k))
    scratch = g.scratch("probabilities", 2 * experts)
    buffers = g.dense(z), g.vectors, scratch, g.new(weights), routing
    choice = int(how.normalise), int(how.softmax), bias_at, how.groups, how.groups_used

    def steps(p: Pass) -> Iterable[Step]:
        at, files = SortedPairs.of(ids, p), ("reduce", "sorted_pairs")
        parameters = (
            experts,
            k,
            *choice,
            at.pairs,
            at.sorted_pairs,
            at.groups_at,
            at.groups,
            at.counts,
        )
        yield g.step("ops/top_k", buffers, parameters, (p.tokens,), files)
        if p.tokens > 1:
            yield g.step("ops/top_k.sort_pairs", buffers, parameters, (1,), files)

    g.emit(steps)
