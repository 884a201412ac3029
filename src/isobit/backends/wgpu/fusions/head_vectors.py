"""q, k and v of a product: norm and RoPE for q and k, quantisation, the store to the cache."""

from collections.abc import Iterable, Sequence

from isobit import numerics
from isobit.backends.wgpu.device.gpu import Step
from isobit.backends.wgpu.lowering import BufferView, Lowering, Pass, bits
from isobit.backends.wgpu.ops import append
from isobit.model.graph import Op, match
from isobit.numerics.ops import Attention, Heads, RmsNorm, Rope

_PATTERN = (
    "q_heads = heads qkv",
    "q_normed = rms_norm q_heads",
    "q = rope q_normed positions",
    "k_heads = heads qkv",
    "k_normed = rms_norm k_heads",
    "k = rope k_normed positions",
    "v = heads qkv",
    "keys values = append k v",
)
_INNER = "q_heads", "q_normed", "k_heads", "k_normed", "v"


def claim(g: Lowering, ops: Sequence[Op]) -> int:
    """See :mod:`isobit.backends.wgpu.fusions`."""
    v = match(ops, _PATTERN, _INNER)
    if v is None or append.supports(ops[7]):
        return 0
    parts = [o.operation for o in ops[: len(_PATTERN)]]
    q_heads, k_heads, v_heads = (o for o in parts if isinstance(o, Heads))
    q_norm, k_norm = (o for o in parts if isinstance(o, RmsNorm))
    q_rope, k_rope = (o for o in parts if isinstance(o, Rope))
    H, G, D = q_heads.count, k_heads.count, q_heads.size
    side_by_side = Heads(0, H, D), Heads(H * D, G, D), Heads((H + G) * D, G, D)
    if (
        (q_heads, k_heads, v_heads) != side_by_side
        or v["qkv"].shape.width != (H + 2 * G) * D
        or (q_norm, q_rope, q_rope.table.size) != (k_norm, k_rope, D)
        or H % G
    ):
        return 0
    table, rotated = g.rope(q_rope.table), g.slot("rope", (H + G) * D)
    g.put(v["q"], BufferView(rotated, H * D, H * D))
    g.put(v["k"], BufferView(rotated, G * D, G * D, behind=H * D))
    qkv, queries = g.dense(v["qkv"]), append.queries_of(g, v["q"])
    cache = append.cache_of(g, ops[7])
    norms = g.vector(ops[1].weights[0]), g.vector(ops[4].weights[0])
    attends = [o.operation for o in ops if isinstance(o.operation, Attention)]  # next, that of q
    eps, scale = bits(q_norm.eps), bits(numerics.attention_scale(D, attends[0].scale))

    def steps(p: Pass) -> Iterable[Step]:
        at = g.at(p)
        for part in cache.parts:
            yield g.step(
                "fusions/head_vectors",
                (qkv, g.vectors, g.batch, rotated, queries, part.buffer),
                (
                    *(H, G, D, part.first, part.heads, *norms, eps, scale),
                    *(at.slots, at.rope[table], g.places[v["k"]].first),
                ),
                (part.heads * (H // G + 2), p.tokens),
                ("reduce", "cache", "head_store"),
            )

    g.emit(steps)
    return len(_PATTERN)
