"""DeepSeek V2, V3 and GLM-4.7-Flash: attention whose keys and values are made of one latent vector
a token, with a rotated part of the keys that all heads share; in the first layers a dense
feed-forward, then a mixture of experts beside a shared one.

What is kept of a token are the keys and values of all heads, not the latent vector. Files have one
eps for all norms, as llama.cpp has; transformers takes 1e-6 for those of latent vectors.
"""

from dataclasses import dataclass, replace
from decimal import Decimal, localcontext

import numpy as np

from isobit.config import Metadata, ModelConfig
from isobit.gguf.header import Value as Entry
from isobit.model.architectures import blocks
from isobit.model.architectures.architecture import Architecture
from isobit.model.architectures.blocks import LayerBuilder
from isobit.model.architectures.checks import check
from isobit.model.architectures.common import common
from isobit.model.architectures.glm4moe import FEED_FORWARD_KEYS, FEED_FORWARDS, feed_forward
from isobit.model.architectures.routing import ROUTING_KEYS, Routing, routing
from isobit.model.architectures.scaling import rope_scaling
from isobit.model.graph import Graph, Value
from isobit.model.huggingface import (
    KEYS,
    ONLY,
    HuggingFace,
    weights,
)
from isobit.model.tensors import Tensors
from isobit.numerics import RopeTable, Weight
from isobit.numerics.ops import Columns, Heads, Join, MatMul, RmsNorm, Rope, Scale


@dataclass(frozen=True)
class Config(ModelConfig):
    """What a file says besides what every transformer has. A head vector of queries and keys has
    ``head_dim`` values."""

    rope: RopeTable
    """Of the part of head vectors that RoPE rotates."""
    attention_scale: float | None
    """Of scores; None: the usual one."""
    value_dim: int
    """Values of a head vector of values."""
    q_rank: int
    """Width between the two matrices that make queries; 0: it is one."""
    kv_rank: int
    """Of the latent vector."""
    routing: Routing
    dense: int
    """Layers before the first with experts."""
    dense_ffn: int
    shared_ffn: int
    """Width of the shared expert; 0: none."""


def config(r: Metadata, vocab: int) -> Config:
    """The hyper-parameters. Raises ModelRefused naming the key for what is missing, malformed or
    not implemented."""
    arch = r.text("general.architecture")
    # Files whose matrices are as the latent vector wants them say with key_length and
    # head_count_kv what llama.cpp keeps of a token.
    of_heads = "_mla" if f"{arch}.attention.key_length_mla" in r.metadata else ""
    head_dim = r.count(f"{arch}.attention.key_length{of_heads}", 2, 512)
    value_dim = r.count(f"{arch}.attention.value_length{of_heads}", 1, head_dim)
    heads = r.count(f"{arch}.attention.head_count", 1, 4096)
    as_made: dict[str, object] = {
        f"{arch}.attention.head_count_kv": heads,
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
    }
    found = common(Metadata({**r.metadata, **as_made}, r.source), vocab, moe=True, normalise=False)
    drafts = r.count(f"{arch}.nextn_predict_layers", 0, found.n_layers - 1, default=0)
    found = replace(found, n_layers=found.n_layers - drafts)
    dense = r.count(f"{arch}.leading_dense_block_count", 0, found.n_layers, default=0)
    rotated = r.count(f"{arch}.rope.dimension_count", 2, head_dim - 1)
    kv_rank = r.count(f"{arch}.attention.kv_lora_rank", 1, 1 << 16)
    how = routing(r, arch, experts=found.n_experts, default=1)
    if head_dim - value_dim > kv_rank:
        raise r.refusal(f"{arch}.attention.value_length{of_heads}", f"near {head_dim}", value_dim)
    rope, scale = _scaling(r, arch, RopeTable(rotated, found.rope_base), head_dim)
    c = Config(
        **vars(found),
        rope=rope,
        attention_scale=scale,
        value_dim=value_dim,
        q_rank=r.count(f"{arch}.attention.q_lora_rank", 0, 1 << 16, default=0),
        kv_rank=kv_rank,
        routing=how,
        dense=dense,
        dense_ffn=r.count(f"{arch}.feed_forward_length", 1, 1 << 20) if dense else 0,
        shared_ffn=found.ffn * r.count(f"{arch}.expert_shared_count", 0, 64, default=0),
    )
    known = {*ROUTING_KEYS, "rope.scaling.yarn_log_multiplier"}
    made = Metadata({**r.metadata, **as_made}, r.source)
    check(made, c, known=known, scaled=True, routed=True)
    r.only(f"{arch}.attention.temperature_scale", 0.0)
    return c


def _scaling(
    r: Metadata, arch: str, table: RopeTable, head_dim: int
) -> tuple[RopeTable, float | None]:
    """RoPE's table and the scale of scores. With YaRN it is the scores that are scaled, by the
    square of 1 + m ln(factor), m the file's, and not cosines and sines."""
    table = rope_scaling(r, arch, table)
    if (yarn := table.yarn) is None:
        r.only(f"{arch}.rope.scaling.yarn_log_multiplier", 0.0)
        return table, None
    r.only(f"{arch}.rope.scaling.attn_factor", 1.0)
    m = r.number(f"{arch}.rope.scaling.yarn_log_multiplier", 0.0, 1.0)
    with localcontext() as context:  # correctly rounded, whatever the platform's logarithm is
        context.prec = 60
        log = Decimal(yarn.factor).ln()
        scale = float((1 + Decimal(m) * log) ** 2 / Decimal(head_dim).sqrt())
        yarn = replace(yarn, attention_factor=float(1 / (1 + log / 10)))
    return replace(table, yarn=yarn), scale


def graph(c: ModelConfig, tensors: Tensors) -> Graph:
    """The graph of a file's model. Raises ModelRefused for a missing or misshapen tensor."""
    assert isinstance(c, Config)
    tensors.leave_out_layers(c.n_layers)  # they draft tokens ahead; no token depends on them

    def mixture(p: LayerBuilder, i: int, h: Value) -> Value:
        if i < c.dense:
            return blocks.dense(p, "ffn", "", c.dense_ffn, h)
        biased = f"{p.at}exp_probs_b.bias" in p.tensors
        return feed_forward(p, c, h, c.routing, c.shared_ffn, biased=biased)

    return blocks.transformer(c, tensors, lambda p, _, h: _attention(p, c, h), mixture)


def _attention(p: LayerBuilder, c: Config, h: Value) -> Value:
    g, H, D, V, R = p.g, c.n_heads, c.head_dim, c.value_dim, c.kv_rank
    rotated, rope = c.rope.size, Rope(c.rope, neighbours=True)
    plain = D - rotated
    if c.q_rank:
        q = p.product("q_latent", h, ("attn_q_a", c.q_rank))
        q = p.norm("q_latent_norm", "attn_q_a_norm", c.eps, q)
        q = p.product("q_matmul", q, ("attn_q_b", H * D))
    else:
        q = p.product("q_matmul", h, ("attn_q", H * D))
    with_rope = blocks.heads_of(p, "q_rope", rope, q, Heads(plain, H, rotated, D))
    q = g.one("q_post_rope", Join(), with_rope, g.one(None, Heads(0, H, plain, D), q))

    made = p.product("kv_latent", h, ("attn_kv_a_mqa", R + rotated))
    with_rope = blocks.heads_of(p, "k_rope", rope, made, Heads(R, 1, rotated))
    latent = g.one(None, Columns(0, R), made)
    weight = p.take("attn_kv_a_norm.weight", R)
    latent = g.one("kv_latent_norm", RmsNorm(c.eps), latent, weights=[weight])
    if f"{p.at}attn_kv_b.weight" in p.tensors:
        kv = p.product("kv_matmul", latent, ("attn_kv_b", H * (plain + V)))
        k, v = (g.one(None, Heads(at, H, n, plain + V), kv) for at, n in ((0, plain), (plain, V)))
    else:
        by_latent = p.matrix("attn_k_b", H, R, plain)  # for queries, the other way around
        rows = by_latent.float32().swapaxes(1, 2).reshape(H * plain, R)
        k = g.one("k_matmul", MatMul(), latent, weights=[blocks.vector(by_latent.name, rows)])
        k = g.one(None, Heads(0, H, plain), k)
        w = p.matrix("attn_v_b", H, V, R)
        w = Weight(w.name, w.format, (H * V, R), w.data)
        v = g.one(None, Heads(0, H, V), g.one("v_matmul", MatMul(), latent, weights=[w]))
    k = g.one("k_post_rope", Join(), with_rope, k)
    if V < D:  # zeros before the values
        zeros = g.one(None, Columns(0, D - V), made)
        none = blocks.vector(f"0 x {D - V}", np.zeros(D - V))
        zeros = g.one(None, Scale(), zeros, weights=[none])
        v = g.one("v_padded", Join(), g.one(None, Heads(0, 1, D - V), zeros), v)
    y = blocks.attention(g, q, k, v, scale=c.attention_scale)
    if V < D:
        first, second = D - V, D - V // 2
        halves = (Heads(first, H, second - first, D), Heads(second, H, D - second, D))
        y = g.one("attn_values", Join(), *(g.one(None, half, y) for half in halves))
        y = g.one(None, Columns(0, H * V), y)
    return p.product("attn_out", y, ("attn_output", c.hidden))


_LAYER = {
    **FEED_FORWARDS,
    **weights(
        attn_norm="input_layernorm",
        attn_q="self_attn.q_proj",
        attn_q_a="self_attn.q_a_proj",
        attn_q_a_norm="self_attn.q_a_layernorm",
        attn_q_b="self_attn.q_b_proj",
        attn_kv_a_mqa="self_attn.kv_a_proj_with_mqa",
        attn_kv_a_norm="self_attn.kv_a_layernorm",
        attn_kv_b="self_attn.kv_b_proj",
        attn_output="self_attn.o_proj",
        ffn_norm="post_attention_layernorm",
    ),
}


def _metadata(c: Metadata) -> dict[str, Entry]:
    """What config.json says in other words than a file's metadata."""
    rotated = c.count("qk_rope_head_dim", 2, 512)
    layers = c.count("num_hidden_layers", 1, 4096)
    kinds = c.metadata.get("mlp_layer_types")
    dense = c.count("first_k_dense_replace", 0, layers, default=1)
    if isinstance(kinds, list):
        dense = sum(k == "dense" for k in kinds)
        if kinds != ["dense"] * dense + ["sparse"] * (layers - dense):
            raise c.refusal("mlp_layer_types", "dense layers, then sparse ones", kinds)
    return {
        "attention.key_length": c.count("qk_nope_head_dim", 1, 512) + rotated,
        "rope.dimension_count": rotated,
        "expert_weights_norm": c.flag("norm_topk_prob", default=True),
        "expert_gating_func": 2,
        "leading_dense_block_count": dense,
    }


_SIGMOIDS = HuggingFace(
    "deepseek2",
    "Glm4MoeLiteForCausalLM",
    KEYS
    | FEED_FORWARD_KEYS
    | {
        "attention.value_length": "v_head_dim",
        "attention.q_lora_rank": "q_lora_rank",
        "attention.kv_lora_rank": "kv_lora_rank",
    },
    lambda _: _LAYER,
    only={**ONLY, "attention_bias": False, "rope_interleave": True},
    more=_metadata,
    drafts="num_nextn_predict_layers",
)
HUGGING_FACE = {
    "glm4_moe_lite": _SIGMOIDS,
    "deepseek_v3": replace(_SIGMOIDS, model="DeepseekV3ForCausalLM"),
}
"""By config.json's ``model_type``."""
ARCHITECTURES = {"deepseek2": Architecture(config, graph)}
"""By the name in ``general.architecture``."""
