"""q, k and v of a product: norm and RoPE for q and k, quantisation, the store to the cache."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from isobit import numerics
from isobit.backends.cuda.lowering import WARPS, Claimed, Lowering
from isobit.backends.cuda.ops import append
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
INNER = "q_heads", "q_normed", "k_heads", "k_normed", "k", "v"


@dataclass(frozen=True)
class HeadVectors:
    """What the operations of PATTERN say, if q, k and v lie side by side and are normed and
    rotated alike."""

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

    @classmethod
    def of(cls, g: Lowering, ops: Sequence[Op], v: Mapping[str, Value]) -> "HeadVectors | None":
        """Of operations that match; None if they are not so."""
        parts = [o.operation for o in ops[: len(PATTERN)]]
        q_heads, k_heads, v_heads = (o for o in parts if isinstance(o, Heads))
        q_norm, k_norm = (o for o in parts if isinstance(o, RmsNorm))
        q_rope, k_rope = (o for o in parts if isinstance(o, Rope))
        H, G, D = q_heads.count, k_heads.count, q_heads.size
        side_by_side = Heads(0, H, D), Heads(H * D, G, D), Heads((H + G) * D, G, D)
        if (
            append.supports(ops[7])
            or (q_heads, k_heads, v_heads) != side_by_side
            or v["qkv"].shape.width != (H + 2 * G) * D
            or (q_norm, q_rope, q_rope.table.size) != (k_norm, k_rope, D)
            or q_rope.neighbours
            or H % G
        ):
            return None
        norms = g.vector(ops[1].weights[0]), g.vector(ops[4].weights[0])
        attends = [o.operation for o in ops if isinstance(o.operation, Attention)]  # first, of q
        scale = float(numerics.attention_scale(D, attends[0].scale))
        return cls(
            H, G, D, q_norm.eps, *norms, g.rope_table(q_rope.table), g.cache(v["keys"]), scale
        )


def claim(g: Lowering, ops: Sequence[Op]) -> Claimed | None:
    """See :mod:`isobit.backends.cuda.fusions`."""
    v = g.match(ops, PATTERN, INNER)
    if v is None or (h := HeadVectors.of(g, ops, v)) is None:
        return None
    return len(PATTERN), partial(lower, g, h, v)


def lower(g: Lowering, h: HeadVectors, v: Mapping[str, Value]) -> None:
    """One launch for all head vectors."""
    qkv, (integers, scales) = g.dense(v["qkv"]), append.queries_of(g, v["q"])

    def make(p: Pass) -> None:
        at, vectors = p.inputs, p.tokens * (h.heads + 2 * h.kv_heads)
        g.launch(
            "fusions/head_vectors",
            (-(-vectors // WARPS),),
            (qkv.address, h.q_norm(), h.k_norm(), h.eps, *h.rope.parts)
            + (at.positions, at.sequence, at.pages, at.each, h.scale)
            + (integers.address, scales.address, *h.cache.parts, p.tokens),
            {"HEADS": h.heads, "KV_HEADS": h.kv_heads, "HEAD_DIM": h.head_dim},
        )

    g.emit(make)
