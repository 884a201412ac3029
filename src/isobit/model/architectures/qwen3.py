"""Qwen3 and Qwen3-MoE, also as the text of Qwen3-VL: grouped-query attention with a norm of each
head vector, then SwiGLU or a mixture of SwiGLU experts."""

from dataclasses import dataclass

from isobit.config import MOST_POSITIONS, Metadata, ModelConfig
from isobit.model.architectures import blocks
from isobit.model.architectures.blocks import Part
from isobit.model.architectures.checks import check
from isobit.model.architectures.scaling import rope_scaling
from isobit.model.graph import Builder, Graph, Value
from isobit.model.huggingface import (
    ATTENTION,
    DENSE_KEYS,
    EXPERT_KEYS,
    EXPERTS,
    FEED_FORWARD,
    KEYS,
    ONLY,
    HuggingFace,
    weights,
)
from isobit.model.tensors import Tensors
from isobit.numerics import RopeTable
from isobit.numerics.ops import Add, Heads


@dataclass(frozen=True)
class Config(ModelConfig):
    """What a file says besides what every transformer has."""

    rope: RopeTable


def config(r: Metadata, vocab: int) -> Config:
    """The hyper-parameters. Raises ModelRefused naming the key for what is missing, malformed or
    not implemented."""
    arch = r.text("general.architecture")
    moe, images = arch.endswith("moe"), arch.startswith("qwen3vl")
    heads = r.count(f"{arch}.attention.head_count", 1, 4096)
    hidden = r.count(f"{arch}.embedding_length", 1, 1 << 20)
    head_dim = r.count(f"{arch}.attention.key_length", 2, 512, default=hidden // heads)
    base = r.number(f"{arch}.rope.freq_base", 1.0, 1e12)
    c = Config(
        architecture=arch,
        n_layers=r.count(f"{arch}.block_count", 1, 4096),
        hidden=hidden,
        n_heads=heads,
        n_kv_heads=r.count(f"{arch}.attention.head_count_kv", 1, heads, default=heads),
        head_dim=head_dim,
        ffn=r.count(f"{arch}.{'expert_' if moe else ''}feed_forward_length", 1, 1 << 20),
        n_experts=r.count(f"{arch}.expert_count", 1, 4096) if moe else 0,
        n_experts_used=r.count(f"{arch}.expert_used_count", 1, 64) if moe else 0,
        vocab=vocab,
        rope_base=base,
        eps=r.number(f"{arch}.attention.layer_norm_rms_epsilon", 1e-30, 1.0),
        context_length=r.count(f"{arch}.context_length", 1, MOST_POSITIONS),
        normalise_experts=r.flag(f"{arch}.expert_weights_norm", default=True),
        rope=rope_scaling(r, arch, RopeTable(head_dim, base)),
    )
    # The sections are of images; a text has one position everywhere.
    check(r, c, rope_keys=frozenset({"dimension_sections"} if images else ()), scaled=True)
    r.only(f"{arch}.rope.dimension_count", c.head_dim)
    r.only(f"{arch}.expert_weights_scale", 1.0)
    r.only(f"{arch}.expert_shared_count", 0)
    return c


def graph(c: ModelConfig, tensors: Tensors) -> Graph:
    """The graph of a file's model. Raises ModelRefused for a missing or misshapen tensor."""
    g = Builder(tensors.source)
    x = blocks.embedding(g, c, tensors)
    for i in range(c.n_layers):
        with g.layer(i):
            p = Part(g, tensors, f"blk.{i}.")
            h = p.norm("attn_norm", "attn_norm", c.eps, x)
            x = g.one("post_attn_residual", Add(), x, _attention(p, c, h))
            h = p.norm("ffn_norm", "ffn_norm", c.eps, x)
            y = blocks.experts(p, c, h) if c.is_moe else blocks.dense(p, "ffn", "", c.ffn, h)
            x = g.one("post_ffn_residual", Add(), x, y)
    return blocks.head(g, c, tensors, x)


def _attention(p: Part, c: ModelConfig, h: Value) -> Value:
    H, G, D = c.n_heads, c.n_kv_heads, c.head_dim
    roles = ("attn_q", H * D), ("attn_k", G * D), ("attn_v", G * D)
    p.split("attn_qkv", *roles)
    qkv = p.product("qkv_matmul", h, *roles)
    table = c.rope if isinstance(c, Config) else RopeTable(D, c.rope_base)
    q = blocks.rotated_heads(p, "q_post_rope", "attn_q_norm", c.eps, table, qkv, Heads(0, H, D))
    keys = Heads(H * D, G, D)
    k = blocks.rotated_heads(p, "k_post_rope", "attn_k_norm", c.eps, table, qkv, keys)
    v = p.g.one(None, Heads((H + G) * D, G, D), qkv)
    return p.product("attn_out", blocks.attention(p.g, q, k, v), ("attn_output", c.hidden))


_LAYER = {
    **ATTENTION,
    **weights(
        attn_q_norm="self_attn.q_norm",
        attn_k_norm="self_attn.k_norm",
        ffn_norm="post_attention_layernorm",
    ),
}
HUGGING_FACE = {
    "qwen3": HuggingFace(
        "qwen3", "Qwen3ForCausalLM", KEYS | DENSE_KEYS, lambda _: {**_LAYER, **FEED_FORWARD}
    ),
    "qwen3_moe": HuggingFace(
        "qwen3moe",
        "Qwen3MoeForCausalLM",
        KEYS | EXPERT_KEYS,
        lambda _: {**_LAYER, **EXPERTS},
        only=ONLY | {"decoder_sparse_step": 1, "mlp_only_layers": []},
        more=lambda c: {"expert_weights_norm": c.flag("norm_topk_prob", default=False)},
    ),
}
"""By config.json's ``model_type``."""
