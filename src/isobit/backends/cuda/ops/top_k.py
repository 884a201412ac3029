"""The experts of each token, their weights, and the order of the products with them."""

from dataclasses import dataclass

from isobit.backends.cuda.lowering import WARPS, Defines, Lowering
from isobit.backends.cuda.ops.groups import GROUPS, expert_columns
from isobit.backends.cuda.workspace import BufferView, Pass, Slot
from isobit.model.graph import Op, Value
from isobit.numerics.ops import ExpertMatMul, TopK

_MOST = 64  # chosen, in top_k.cu
_MOST_EXPERTS = 1024  # threads of a block that sorts
_OWN_PAIRS, _OWN_EXPERTS = 2048, 256
"""Pairs, and experts, up to which products of steps order the pairs themselves."""
_OWN = 8  # experts whose pairs a block sorts: OWN of top_k.cu


@dataclass(frozen=True)
class SortedPairs:
    """Pairs (token, rank) by expert: ``sorted_pairs`` and ``expert_offsets`` of top_k.cu, and
    their groups (sorted_pairs.cuh), whose number stands behind the offsets."""

    sorted_pairs: Slot
    expert_offsets: Slot
    groups: Slot
    part: tuple[int, int]
    """The experts that are here, all or of a part of a split model: first … end - 1."""
    each: int
    """Experts of a token."""
    value: Value
    ids: BufferView
    prompts: bool
    """Whether they are of a prompt, on Hopper."""

    @classmethod
    def of(cls, g: Lowering, ids: Value) -> "SortedPairs":
        """Those that were made of ids."""
        pairs, offsets, groups = (
            g.formed(ids, name) for name in ("sorted_pairs", "expert_offsets", "groups")
        )
        assert pairs is not None
        assert offsets is not None
        assert groups is not None
        readers = (op.operation for op in g.readers.get(ids, ()))
        parts = (made.part for made in readers if isinstance(made, ExpertMatMul))
        part = next(parts, None) or (0, ids.shape.below or 0)
        at = ids, g.places[ids], g.gpu.warpgroups and not g.captured
        return cls(pairs, offsets, groups, part, ids.shape.width, *at)

    @property
    def experts(self) -> int:
        """How many are here."""
        return self.part[1] - self.part[0]

    @property
    def of_all(self) -> int:
        """How many may be chosen."""
        return self.value.shape.below or 0

    def own(self, g: Lowering, p: Pass) -> bool:
        """Whether products order the pairs of a pass themselves (Order of own_order.cuh)."""
        few = p.tokens * self.each <= _OWN_PAIRS and self.experts <= _OWN_EXPERTS
        return few and self.experts == self.of_all and g.captured and self.value not in g.sorted

    @property
    def most_bytes(self) -> int:
        """Shared memory that it takes at most."""
        return ordering_bytes(_OWN_PAIRS // self.each, self.each, self.experts, GROUPS[0])

    def columns(self, tokens: int) -> int:
        """Pairs of a group, of so many tokens."""
        return expert_columns(tokens * self.each / max(self.of_all, 1), prompts=self.prompts)

    @property
    def grouped(self) -> tuple[int, int]:
        """Addresses of the number of groups, and of the groups."""
        count = self.expert_offsets.address + 4 * (self.experts + 1)
        return count, self.groups.address


def ordering_bytes(tokens: int, each: int, experts: int, columns: int) -> int:
    """Shared memory in which a block orders the pairs of so many tokens."""
    pairs = tokens * each
    words = experts * (1 + -(-tokens // 32)) + 1024 // 32 + 1 + pairs
    return 16 * min(pairs, experts + pairs // columns) + 4 * words


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


def lower(g: Lowering, op: Op) -> None:
    """A token a warp; then some experts a block."""
    assert isinstance(op.operation, TopK)
    how, k = op.operation, op.operation.k
    flags = int(how.normalise), int(how.softmax)
    bias = g.vector(op.weights[0]) if op.weights else int
    (z,), (weights, ids) = op.inputs, op.outputs
    experts, x = z.shape.width, g.dense(z)
    to = g.new(weights)
    chosen = g.new_lasting(ids) if g.captured else g.new(ids)
    g.form(ids, "sorted_pairs", k)
    g.form(ids, "expert_offsets", more=experts + 2)
    g.form(ids, "groups", 4 * k, more=4 * experts)
    at, grouped = SortedPairs.of(g, ids), how.groups_used < how.groups
    defines: Defines = {"PARTS": -(-experts // 32)} | ({"GROUPED": 1} if grouped else {})

    def make(p: Pass) -> None:
        tokens = p.tokens
        results = chosen.address, to.address
        of_all = x.address, tokens, experts, k, *flags, bias(), how.groups, how.groups_used
        router = *of_all, *results
        places = (
            at.sorted_pairs.address,
            at.expert_offsets.address,
            *at.grouped[::-1],
            at.columns(tokens),
        )
        blocks, words = -(-tokens // WARPS), WARPS * (experts + how.groups) if grouped else 0
        g.launch("ops/top_k.router_top_k", (blocks,), router, defines, shared=4 * words)
        if at.own(g, p):
            return
        pairs = chosen.address, tokens, k, at.part[0], at.experts
        blocks, words = sorting(tokens, at.experts)
        g.launch("ops/top_k.sort_pairs", (blocks,), (*pairs, *places), defines, shared=4 * words)

    g.emit(make, weights)
    g.mark(ids, lasting=g.captured)
