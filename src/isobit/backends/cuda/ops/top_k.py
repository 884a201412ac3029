"""The experts of each token, their weights, and the order of the products with them."""

from dataclasses import dataclass

from isobit.backends.cuda.lowering import Lowering
from isobit.backends.cuda.ops.groups import group_columns
from isobit.backends.cuda.slots import Pass, Slot
from isobit.model.graph import Op, Value
from isobit.numerics.ops import TopK

_MOST = 64  # chosen, in top_k.cu


@dataclass(frozen=True)
class Order:
    """Pairs (token, rank) by expert: ``order`` and ``offset`` of top_k.cu, and of a captured step
    their groups (items.cuh), whose number stands behind the offsets."""

    order: Slot
    offset: Slot
    groups: Slot | None
    experts: int
    each: int
    """Experts of a token."""

    @classmethod
    def of(cls, g: Lowering, ids: Value) -> "Order":
        """The order that was made of ids."""
        order, offset = g.formed(ids, "order"), g.formed(ids, "offset")
        assert order is not None
        assert offset is not None
        return cls(order, offset, g.formed(ids, "groups"), ids.shape.below or 0, ids.shape.width)

    def columns(self, tokens: int) -> int:
        """Pairs of a group, of so many tokens."""
        return group_columns(1.5 * tokens * self.each / max(self.experts, 1))

    @property
    def grouped(self) -> tuple[int, int]:
        """Addresses of the number of groups, and of the groups."""
        count = self.offset.address + 4 * (self.experts + 1)
        return (count, self.groups.address) if self.groups else (0, 0)


def supports(op: Op) -> str | None:
    """See :mod:`isobit.backends.cuda.ops`."""
    k = op.outputs[1].shape.width
    return None if k <= _MOST else f"expected at most {_MOST} experts a token, got {k}"


def lower(g: Lowering, op: Op) -> None:
    """A token a block; then one block sorts their pairs."""
    assert isinstance(op.operation, TopK)
    how, k = op.operation, op.operation.k
    flags = int(how.normalise), int(how.softmax)
    bias = g.vector(op.weights[0]) if op.weights else int
    (z,), (weights, ids) = op.inputs, op.outputs
    experts, x = z.shape.width, g.dense(z)
    to = g.new(weights)
    chosen = g.new_lasting(ids) if g.captured else g.new(ids)
    g.form(ids, "order", k)
    g.form(ids, "offset", more=experts + 2)
    if g.captured:
        g.form(ids, "groups", 4 * k, more=4 * experts)
    at = Order.of(g, ids)

    def make(p: Pass) -> None:
        arguments = (x.address, experts, k, *flags, bias(), how.groups, how.groups_used)
        results = chosen.address, to.address
        g.launch("ops/top_k.router_top_k", (p.tokens,), (*arguments, *results), shared=8 * experts)
        pairs = p.tokens * k
        parts = max(1, min(8, (40 << 10) // (4 * experts), -(-pairs // 32)))
        g.launch(
            "ops/top_k.sort_pairs",
            (1,),
            (chosen.address, pairs, experts, parts, at.order.address, at.offset.address)
            + at.grouped[::-1],
            {"COLUMNS": at.columns(p.tokens)} if at.groups else None,
            shared=4 * experts * parts,
        )

    g.emit(make, weights)
    g.mark(ids, lasting=g.captured)
