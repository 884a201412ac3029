"""Qwen3 and Qwen3-MoE, also as the text of Qwen3-VL: grouped-query attention with a norm of each
head vector, then SwiGLU or a mixture of SwiGLU experts."""

from dataclasses import dataclass

from isobit.config import Metadata, ModelConfig
from isobit.model.architectures import blocks
from isobit.model.architectures.architecture import Architecture
from isobit.model.architectures.blocks import LayerBuilder
from isobit.model.architectures.checks import check
from isobit.model.architectures.common import common
from isobit.model.architectures.scaling import rope_scaling
from isobit.model.graph import Graph, Value
from isobit.model.huggingface import (
    ATTENTION,
    DENSE_KEYS,
    EXPERT_KEYS,
    EXPERTS,
    FEED_FORWARD,
    KEYS,
    ONLY,
    HuggingFace,
    usual,
    weights,
)
from isobit.model.tensors import Tensors
from isobit.numerics import RopeTable
from isobit.numerics.ops import Heads


@dataclass(frozen=True)
class Config(ModelConfig):
    """What a file says besides what every transformer has."""

    rope: RopeTable


def config(r: Metadata, vocab: int) -> Config:
    """The hyper-parameters. Raises ModelRefused naming the key for what is missing, malformed or
    not implemented."""
    arch = r.text("general.architecture")
    found = common(r, vocab, moe=arch.endswith("moe"))
    table = RopeTable(found.head_dim, found.rope_base)
    c = Config(**vars(found), rope=rope_scaling(r, arch, table))
    images = arch.startswith("qwen3vl")
    # The sections are of images; a text has one position everywhere.
    check(r, c, known={"rope.dimension_sections"} if images else (), scaled=True)
    r.only(f"{arch}.rope.dimension_count", c.head_dim)
    r.only(f"{arch}.expert_weights_scale", 1.0)
    r.only(f"{arch}.expert_shared_count", 0)
    return c


def graph(c: ModelConfig, tensors: Tensors) -> Graph:
    """The graph of a file's model. Raises ModelRefused for a missing or misshapen tensor."""
    table = c.rope if isinstance(c, Config) else RopeTable(c.head_dim, c.rope_base)
    return blocks.transformer(
        c,
        tensors,
        lambda p, _, h: attention(p, c, table, h),
        lambda p, _, h: blocks.feed_forward(p, c, h),
    )


def attention(p: LayerBuilder, c: ModelConfig, table: RopeTable, h: Value) -> Value:
    """Attention with a norm of each head vector."""
    H, G, D = c.n_heads, c.n_kv_heads, c.head_dim
    roles = ("attn_q", H * D), ("attn_k", G * D), ("attn_v", G * D)
    p.split("attn_qkv", *roles)
    qkv = p.product("qkv_matmul", h, *roles)
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
        "qwen3",
        "Qwen3ForCausalLM",
        KEYS | DENSE_KEYS,
        lambda _: {**_LAYER, **FEED_FORWARD},
        settings=usual,
    ),
    "qwen3_moe": HuggingFace(
        "qwen3moe",
        "Qwen3MoeForCausalLM",
        KEYS | EXPERT_KEYS,
        lambda _: {**_LAYER, **EXPERTS},
        only=ONLY | {"decoder_sparse_step": 1, "mlp_only_layers": []},
        more=lambda c: {"expert_weights_norm": c.flag("norm_topk_prob", default=False)},
        settings=usual,
    ),
}
"""By config.json's ``model_type``."""
ARCHITECTURES = dict.fromkeys(
    ("qwen3", "qwen3moe", "qwen3vl", "qwen3vlmoe"), Architecture(config, graph)
)
"""By the name in ``general.architecture``."""
