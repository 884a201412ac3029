"""The experts of each token, their weights, and the order of the products with them."""

from dataclasses import dataclass

from isobit.backends.cuda.lowering import WARPS, Lowering
from isobit.backends.cuda.ops.groups import expert_columns
from isobit.backends.cuda.slots import Pass, Slot
from isobit.model.graph import Op, Value
from isobit.numerics.ops import TopK

_MOST = 64  # chosen, in top_k.cu
_MOST_EXPERTS = 1024  # threads of a block that sorts
_OWN = 8  # experts whose pairs a block sorts: OWN of top_k.cu
_FEW_TOKENS, _PAIRS = 32, 256  # whose experts routed_gate_up.cu chooses


@dataclass(frozen=True)
class Order:
    """Pairs (token, rank) by expert: ``order`` and ``offset`` of top_k.cu, and
    their groups (items.cuh), whose number stands behind the offsets."""

    order: Slot
    offset: Slot
    groups: Slot
    experts: int
    each: int
    """Experts of a token."""
    planned: Slot | None
    """Says that groups are known, if the kernel that multiplies first makes them of few tokens."""

    @classmethod
    def of(cls, g: Lowering, ids: Value) -> "Order":
        """The order that was made of ids."""
        order, offset, groups = (g.formed(ids, name) for name in ("order", "offset", "groups"))
        assert order is not None
        assert offset is not None
        assert groups is not None
        planned = g.formed(ids, "planned")
        return cls(order, offset, groups, ids.shape.below or 0, ids.shape.width, planned)

    def columns(self, tokens: int) -> int:
        """Pairs of a group, of so many tokens."""
        return expert_columns(tokens * self.each / max(self.experts, 1))

    def early(self, tokens: int) -> int:
        """Where the kernel that makes groups of so many tokens says that it has; null if they are
        known before it begins."""
        few = tokens <= _FEW_TOKENS and tokens * self.each <= _PAIRS
        return self.planned.address if self.planned and few else 0

    @property
    def grouped(self) -> tuple[int, int]:
        """Addresses of the number of groups, and of the groups."""
        count = self.offset.address + 4 * (self.experts + 1)
        return count, self.groups.address


def supports(op: Op) -> str | None:
    """See :mod:`isobit.backends.cuda.ops`."""
    (z,), k = op.inputs, op.outputs[1].shape.width
    if k > _MOST:
        return f"expected at most {_MOST} experts a token, got {k}"
    if z.shape.width > _MOST_EXPERTS:
        return f"expected at most {_MOST_EXPERTS} experts, got {z.shape.width}"
    return None


def sorting(tokens: int, experts: int) -> tuple[int, int]:
    """Blocks that sort the pairs of so many tokens, and words of shared memory of each."""
    return -(-experts // _OWN), experts + 2 * _OWN * (-(-tokens // 32) | 1)


def grouped(op: Op) -> bool:
    """Whether not all groups of experts are used."""
    assert isinstance(op.operation, TopK)
    return op.operation.groups_used < op.operation.groups


def choice_bytes(experts: int) -> int:
    """Shared memory for Choice of routed_gate_up.cu."""
    return 28 * _PAIRS + 8 * 32 * -(-experts // 32) + 16


class Router:
    """Chooses experts: a token a warp, then their order, some experts a block."""

    def __init__(self, g: Lowering, op: Op) -> None:
        assert isinstance(op.operation, TopK)
        self.g, self.how = g, op.operation
        self.bias = g.vector(op.weights[0]) if op.weights else int
        (z,), (self.weights, self.ids) = op.inputs, op.outputs
        self.experts, self.logits = z.shape.width, g.dense(z)
        self.to, k = g.new(self.weights), self.how.k
        self.chosen = g.new_lasting(self.ids) if g.captured else g.new(self.ids)
        g.form(self.ids, "order", k)
        g.form(self.ids, "offset", more=self.experts + 2)
        g.form(self.ids, "groups", 4 * k, more=4 * self.experts)
        self.order, self.grouped = Order.of(g, self.ids), grouped(op)

    @property
    def defines(self) -> dict[str, str | int]:
        """Those of router.cuh."""
        of_groups: dict[str, str | int] = {"GROUPED": 1} if self.grouped else {}
        return of_groups | {"PARTS": -(-self.experts // 32)}

    def logits_of(self, p: Pass) -> tuple[int, ...]:
        """The logits, and how many experts they choose: arguments of router.cuh."""
        flags = int(self.how.normalise), int(self.how.softmax)
        return self.logits.address, p.tokens, self.experts, self.how.k, *flags, self.bias()

    @property
    def results(self) -> tuple[int, int]:
        """Where ids and weights lie."""
        return self.chosen.address, self.to.address

    def launch(self, p: Pass) -> None:
        """Queue the choice, and its order."""
        tokens, at, k = p.tokens, self.order, self.how.k
        router = *self.logits_of(p), self.how.groups, self.how.groups_used
        places = at.order.address, at.offset.address, *at.grouped[::-1], at.columns(tokens)
        blocks = -(-tokens // WARPS)
        words = WARPS * (self.experts + self.how.groups) if self.grouped else 0
        arguments = *router, *self.results
        self.g.launch(
            "ops/top_k.router_top_k", (blocks,), arguments, self.defines, shared=4 * words
        )
        pairs = self.chosen.address, tokens, k, self.experts
        blocks, words = sorting(tokens, self.experts)
        self.g.launch(
            "ops/top_k.sort_pairs", (blocks,), (*pairs, *places), self.defines, shared=4 * words
        )

    def mark(self) -> None:
        """Weights and ids can be read now."""
        self.g.mark(self.weights)
        self.g.mark(self.ids, lasting=self.g.captured)


def lower(g: Lowering, op: Op) -> None:
    """Two launches."""
    router = Router(g, op)
    g.emit(router.launch)
    router.mark()
