"""q, k and v of a product: norm and RoPE for q and k, quantisation, the store to the cache. A
gate of attention's output may stand behind each q."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from isobit import numerics
from isobit.backends.cuda.lowering import WARPS, Claimed, Lowering
from isobit.backends.cuda.ops import append, heads
from isobit.backends.cuda.resident import DeviceRopeTable, KvCache
from isobit.backends.cuda.workspace import Pass
from isobit.model.graph import Op, Value
from isobit.numerics.ops import Attention, Heads, RmsNorm, Rope

PATTERN = (
    "q_heads = heads qkv",
    "q_normed = rms_norm q_heads",
    "q = rope q_normed positions",
    "k_heads = heads qkv",
    "k_normed = rms_norm k_heads",
    "k = rope k_normed positions",
    "v = heads qkv",
    "keys values = append k v",
)
GATED_PATTERN = (*PATTERN[:7], "gate = heads qkv", PATTERN[7])
INNER = "q_heads", "q_normed", "k_heads", "k_normed", "k", "v"


@dataclass(frozen=True)
class HeadVectors:
    """What the operations of PATTERN, or of GATED_PATTERN, say, if q, k and v lie side by side and
    are normed and rotated alike."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    q_norm: Callable[[], int]
    k_norm: Callable[[], int]
    rope: DeviceRopeTable
    cache: KvCache
    scale: float
    """Of the scores."""
    gated: bool
    """Whether a gate stands behind each q."""

    @classmethod
    def of(cls, g: Lowering, ops: Sequence[Op], v: Mapping[str, Value]) -> "HeadVectors | None":
        """Of operations that match; None if they are not so."""
        gated = "gate" in v
        count = len(GATED_PATTERN if gated else PATTERN)
        parts = [o.operation for o in ops[:count]]
        q_heads, k_heads, v_heads, *gate = (o for o in parts if isinstance(o, Heads))
        q_norm, k_norm = (o for o in parts if isinstance(o, RmsNorm))
        q_rope, k_rope = (o for o in parts if isinstance(o, Rope))
        H, G, D = q_heads.count, k_heads.count, q_heads.size
        step, width = (2 * D, 2 * H * D) if gated else (None, H * D)
        side_by_side = [Heads(0, H, D, step), Heads(width, G, D), Heads(width + G * D, G, D)]
        side_by_side += [Heads(D, H, D, step)] if gated else []
        if (
            append.supports(ops[count - 1])
            or [q_heads, k_heads, v_heads, *gate] != side_by_side
            or v["qkv"].shape.width != width + 2 * G * D
            or (q_norm, q_rope) != (k_norm, k_rope)
            or q_rope.neighbours
            or H % G
        ):
            return None
        norms = g.vector(ops[1].weights[0]), g.vector(ops[4].weights[0])
        attends = [o.operation for o in ops if isinstance(o.operation, Attention)]  # first, of q
        scale = float(numerics.attention_scale(D, attends[0].scale))
        table, cache = g.rope_table(q_rope.table), g.cache(v["keys"])
        return cls(H, G, D, q_norm.eps, *norms, table, cache, scale, gated)

    @property
    def rotated(self) -> int:
        """Values that RoPE rotates, the first of a head vector."""
        return self.rope.table.size

    @property
    def defines(self) -> dict[str, str | int]:
        """The definitions that the kernels of head vectors ask for."""
        found: dict[str, str | int] = {"HEADS": self.heads, "KV_HEADS": self.kv_heads}
        found |= {"HEAD_DIM": self.head_dim} | ({"Q_STEP": 2} if self.gated else {})
        return found | ({"ROTATED": self.rotated} if self.rotated < self.head_dim else {})


def claim(g: Lowering, ops: Sequence[Op]) -> Claimed | None:
    """See :mod:`isobit.backends.cuda.fusions`."""
    for pattern in (PATTERN, GATED_PATTERN):
        v = g.match(ops, pattern, INNER)
        if v is not None and (h := HeadVectors.of(g, ops, v)) is not None:
            gate = next((o for o in ops[: len(pattern)] if v.get("gate") in o.outputs), None)
            return len(pattern), partial(lower, g, h, v, gate)
    return None


def lower(g: Lowering, h: HeadVectors, v: Mapping[str, Value], gate: Op | None = None) -> None:
    """One launch for all head vectors; ``gate``: what takes the output gate out of the product."""
    if gate is not None:
        heads.lower(g, gate)
    qkv, (integers, scales) = g.dense(v["qkv"]), append.queries_of(g, v["q"])

    def make(p: Pass) -> None:
        at, vectors = p.inputs, p.tokens * (h.heads + 2 * h.kv_heads)
        g.launch(
            "fusions/head_vectors",
            (-(-vectors // WARPS),),
            (qkv.address, h.q_norm(), h.k_norm(), h.eps, *h.rope.parts)
            + (at.positions, at.sequence, at.pages, at.each, h.scale)
            + (integers.address, scales.address, *h.cache.parts, p.tokens),
            h.defines,
        )

    g.emit(make)
