"""OLMoE: attention with a norm of all query heads together and one of all key heads, then a mixture
of SwiGLU experts whose weights are not normalised."""

from dataclasses import dataclass

from isobit.config import Metadata, ModelConfig
from isobit.model.architectures import blocks
from isobit.model.architectures.architecture import Architecture
from isobit.model.architectures.blocks import LayerBuilder
from isobit.model.architectures.checks import check
from isobit.model.architectures.common import common
from isobit.model.architectures.scaling import rope_scaling
from isobit.model.graph import Graph, Value
from isobit.model.huggingface import ATTENTION, EXPERTS, HuggingFace, usual, weights
from isobit.model.tensors import Tensors
from isobit.numerics import RopeTable
from isobit.numerics.ops import Columns, Heads, RmsNorm, Rope


@dataclass(frozen=True)
class Config(ModelConfig):
    """What a file says besides what every transformer has."""

    rope: RopeTable


def config(r: Metadata, vocab: int) -> Config:
    """The hyper-parameters. Raises ModelRefused naming the key for what is missing, malformed or
    not implemented."""
    arch = r.text("general.architecture")
    found = common(
        r, vocab, moe=True, width="feed_forward_length", rope_base=10000.0, normalise=False
    )
    table = RopeTable(found.head_dim, found.rope_base)
    c = Config(**vars(found), rope=rope_scaling(r, arch, table))
    check(r, c, scaled=True)
    r.only(f"{arch}.rope.dimension_count", c.head_dim)
    r.only(f"{arch}.expert_weights_scale", 1.0)
    return c


def graph(c: ModelConfig, tensors: Tensors) -> Graph:
    """The graph of a file's model. Raises ModelRefused for a missing or misshapen tensor."""
    assert isinstance(c, Config)
    return blocks.transformer(
        c,
        tensors,
        lambda p, _, h: attention(p, c, c.rope, h),
        lambda p, _, h: blocks.experts(p, c, h),
    )


def attention(p: LayerBuilder, c: ModelConfig, table: RopeTable, h: Value) -> Value:
    """Attention with a norm of all query heads together and one of all key heads."""
    g, H, G, D = p.g, c.n_heads, c.n_kv_heads, c.head_dim
    roles = ("attn_q", H * D), ("attn_k", G * D), ("attn_v", G * D)
    p.split("attn_qkv", *roles)
    qkv = p.product("qkv_matmul", h, *roles)

    def rotated(name: str, norm: str, first: int, heads: int) -> Value:
        columns = g.one(None, Columns(first, heads * D), qkv)
        weight = p.take(f"{norm}.weight", heads * D)
        normed = g.one(None, RmsNorm(c.eps), columns, weights=[weight])
        return blocks.heads_of(p, name, Rope(table), normed, Heads(0, heads, D))

    q = rotated("q_post_rope", "attn_q_norm", 0, H)
    k = rotated("k_post_rope", "attn_k_norm", H * D, G)
    v = g.one(None, Heads((H + G) * D, G, D), qkv)
    return p.product("attn_out", blocks.attention(g, q, k, v), ("attn_output", c.hidden))


_LAYER = {
    **ATTENTION,
    **EXPERTS,
    **weights(
        attn_q_norm="self_attn.q_norm",
        attn_k_norm="self_attn.k_norm",
        ffn_norm="post_attention_layernorm",
    ),
}
HUGGING_FACE = {
    "olmoe": HuggingFace(
        "olmoe", "OlmoeForCausalLM", {}, lambda _: _LAYER, settings=usual, checkpoint=False
    )
}
"""By config.json's ``model_type``."""
ARCHITECTURES = {"olmoe": Architecture(config, graph)}
"""By the name in ``general.architecture``."""
