"""GLM-4.5, 4.6 and 4.7, big and Air: grouped-query attention, with RoPE on a part of head vectors;
in the first layers a dense feed-forward, then a mixture of experts, chosen by sigmoids and a bias,
beside a shared one."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from isobit.config import Metadata, ModelConfig
from isobit.gguf.header import Value as Entry
from isobit.model.architectures import blocks
from isobit.model.architectures.architecture import Architecture
from isobit.model.architectures.blocks import LayerBuilder
from isobit.model.architectures.checks import check
from isobit.model.architectures.common import common
from isobit.model.architectures.routing import ROUTING_KEYS, Routing, routing
from isobit.model.architectures.scaling import huggingface_scaling, rope_scaling
from isobit.model.graph import Graph, Value
from isobit.model.huggingface import (
    ATTENTION,
    BIASES,
    DENSE_KEYS,
    EXPERT_KEYS,
    EXPERTS,
    FEED_FORWARD,
    KEYS,
    UNRANKED,
    HuggingFace,
    ModuleValue,
    Source,
    weights,
)
from isobit.model.tensors import Tensors
from isobit.numerics import RopeTable
from isobit.numerics.ops import Add, Heads, Rope


@dataclass(frozen=True)
class Config(ModelConfig):
    """What a file says besides what every transformer has."""

    rope: RopeTable
    """It rotates the first values of a head vector."""
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
    found = common(r, vocab, moe=True, normalise=False)
    drafts = r.count(f"{arch}.nextn_predict_layers", 0, found.n_layers - 1, default=0)
    found = replace(found, n_layers=found.n_layers - drafts)
    dense = r.count(f"{arch}.leading_dense_block_count", 0, found.n_layers, default=0)
    rotated = r.count(f"{arch}.rope.dimension_count", 2, found.head_dim)
    c = Config(
        **vars(found),
        rope=rope_scaling(r, arch, RopeTable(rotated, found.rope_base)),
        routing=routing(r, arch, experts=found.n_experts, default=2),
        dense=dense,
        dense_ffn=r.count(f"{arch}.feed_forward_length", 1, 1 << 20) if dense else 0,
        shared_ffn=found.ffn * r.count(f"{arch}.expert_shared_count", 0, 64),
    )
    check(r, c, known=ROUTING_KEYS, scaled=True, routed=True)
    return c


def graph(c: ModelConfig, tensors: Tensors) -> Graph:
    """The graph of a file's model. Raises ModelRefused for a missing or misshapen tensor."""
    assert isinstance(c, Config)
    tensors.leave_out_layers(c.n_layers)  # they draft tokens ahead; no token depends on them
    return blocks.transformer(
        c,
        tensors,
        lambda p, _, h: _attention(p, c, h),
        lambda p, i, h: (
            blocks.dense(p, "ffn", "", c.dense_ffn, h)
            if i < c.dense
            else feed_forward(p, c, h, c.routing, c.shared_ffn, biased=True)
        ),
        ffn_norm="post_attention_norm",
    )


def _attention(p: LayerBuilder, c: Config, h: Value) -> Value:
    H, G, D = c.n_heads, c.n_kv_heads, c.head_dim
    roles = ("attn_q", H * D), ("attn_k", G * D), ("attn_v", G * D)
    p.split("attn_qkv", *roles)
    qkv = p.biased("qkv_matmul", h, *roles)

    def rotated(what: str, first: int, heads: int) -> Value:
        name, norm, of = f"{what}_post_rope", f"attn_{what}_norm", Heads(first, heads, D)
        if f"{p.at}{norm}.weight" in p.tensors:
            return blocks.rotated_heads(p, name, norm, c.eps, c.rope, qkv, of)
        return blocks.heads_of(p, name, Rope(c.rope), qkv, of)

    q, k = rotated("q", 0, H), rotated("k", H * D, G)
    v = p.g.one(None, Heads((H + G) * D, G, D), qkv)
    return p.product("attn_out", blocks.attention(p.g, q, k, v), ("attn_output", c.hidden))


def feed_forward(
    p: LayerBuilder, c: ModelConfig, h: Value, how: Routing, shared_ffn: int, *, biased: bool
) -> Value:
    """A mixture of experts beside a shared one of that width, 0: none."""
    y = blocks.experts(p, c, h, how, biased=biased)
    if not shared_ffn:
        return y
    shared = blocks.dense(p, "shared_expert", "_shexp", shared_ffn, h)
    return p.g.one("ffn_with_shared", Add(), y, shared)


FEED_FORWARDS = {
    **FEED_FORWARD,
    **EXPERTS,
    **weights(
        ffn_gate_shexp="mlp.shared_experts.gate_proj",
        ffn_up_shexp="mlp.shared_experts.up_proj",
        ffn_down_shexp="mlp.shared_experts.down_proj",
    ),
    "exp_probs_b.bias": Source("mlp.gate.e_score_correction_bias"),
}
FEED_FORWARD_KEYS = {
    **DENSE_KEYS,
    **EXPERT_KEYS,
    "expert_count": "n_routed_experts",
    "expert_shared_count": "n_shared_experts",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
}
_LAYER = {
    **ATTENTION,
    **BIASES,
    **FEED_FORWARDS,
    **weights(
        attn_q_norm="self_attn.q_norm",
        attn_k_norm="self_attn.k_norm",
        post_attention_norm="post_attention_layernorm",
    ),
}


def _metadata(c: Metadata) -> dict[str, Entry]:
    """What config.json says in other words than a file's metadata."""
    heads = c.count("num_attention_heads", 1, 4096)
    size = c.count("head_dim", 2, 512, default=c.count("hidden_size", 1, 1 << 20) // heads)
    return {
        **huggingface_scaling(c),
        "rope.dimension_count": int(size * c.number("partial_rotary_factor", 0.0, 1.0, 0.5)),
        "expert_weights_norm": c.flag("norm_topk_prob", default=True),
        "expert_gating_func": 2,
    }


def _settings(c: ModelConfig, names: Collection[str]) -> dict[str, Any]:
    assert isinstance(c, Config)
    return {
        "intermediate_size": c.dense_ffn or c.ffn,
        "n_routed_experts": c.n_experts,
        "n_shared_experts": c.shared_ffn // c.ffn,
        "n_group": c.routing.groups,
        "topk_group": c.routing.groups_used,
        "routed_scaling_factor": c.routing.scale,
        "first_k_dense_replace": c.dense,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in names,
    }


HUGGING_FACE = {
    "glm4_moe": HuggingFace(
        "glm4moe",
        "Glm4MoeForCausalLM",
        KEYS | FEED_FORWARD_KEYS | {"leading_dense_block_count": "first_k_dense_replace"},
        lambda _: _LAYER,
        only={"hidden_act": "silu"},
        more=_metadata,
        drafts="num_nextn_predict_layers",
        settings=_settings,
        # There the weights are scaled, not their sum.
        places=lambda _: (
            UNRANKED | {"moe_ffn_out": None, "moe_ffn_scaled": ModuleValue("mlp.experts")}
        ),
        experts=None,
    ),
}
"""By config.json's ``model_type``."""
ARCHITECTURES = {"glm4moe": Architecture(config, graph)}
"""By the name in ``general.architecture``."""
