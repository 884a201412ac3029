"""Granite and Granite-MoE: Llama's layers with numbers of the model for the embedding, the scores,
what a layer adds and the logits; a mixture of experts beside a shared one, or a dense
feed-forward."""

from dataclasses import dataclass, replace
from typing import Any

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
    FEED_FORWARD,
    HuggingFace,
    ModuleValue,
    Share,
    Source,
    Sources,
    neighbouring_pairs,
    weights,
)
from isobit.model.tensors import Tensors
from isobit.numerics import RopeTable
from isobit.numerics.ops import Add, Heads, Rope


@dataclass(frozen=True)
class Config(ModelConfig):
    """What a file says besides what every transformer has."""

    rope: RopeTable
    shared_ffn: int
    """Width of the shared expert; 0: none."""
    embedding_scale: float
    attention_scale: float | None
    residual_scale: float
    logit_scale: float
    """What logits are divided by."""


def config(r: Metadata, vocab: int) -> Config:
    """The hyper-parameters. Raises ModelRefused naming the key for what is missing, malformed or
    not implemented."""
    arch = r.text("general.architecture")
    moe = arch == "granitemoe"
    found = common(r, vocab, moe=moe, width="feed_forward_length", rope_base=10000.0)
    shared = r.count(f"{arch}.expert_shared_feed_forward_length", 0, 1 << 20, default=0)
    # Of the first three, 0 means the same as no key.
    c = Config(
        **vars(found),
        rope=rope_scaling(r, arch, RopeTable(found.head_dim, found.rope_base)),
        shared_ffn=shared if moe else 0,
        embedding_scale=r.number(f"{arch}.embedding_scale", 0.0, 1e6, default=0.0) or 1.0,
        attention_scale=r.number(f"{arch}.attention.scale", 0.0, 1e6, default=0.0) or None,
        residual_scale=r.number(f"{arch}.residual_scale", 0.0, 1e6, default=0.0) or 1.0,
        logit_scale=r.number(f"{arch}.logit_scale", 1e-6, 1e6),
    )
    scales = {"embedding_scale", "attention.scale", "residual_scale", "logit_scale"}
    check(r, c, scaled=True, known=scales)
    r.only(f"{arch}.rope.dimension_count", c.head_dim)
    r.only(f"{arch}.rope.scaling.finetuned", True)  # false: no RoPE
    r.only(f"{arch}.expert_weights_norm", True)
    return c


def graph(c: ModelConfig, tensors: Tensors) -> Graph:
    """The graph of a file's model. Raises ModelRefused for a missing or misshapen tensor."""
    assert isinstance(c, Config)

    def feed_forward(p: LayerBuilder, _: int, h: Value) -> Value:
        y = blocks.feed_forward(p, c, h)
        if c.shared_ffn:
            shared = blocks.dense(p, "shared_expert", "_shexp", c.shared_ffn, h)
            y = p.g.one("ffn_with_shared", Add(), y, shared)
        return blocks.scaled(p.g, "ffn_scaled", y, c.residual_scale)

    return blocks.transformer(
        c,
        tensors,
        lambda p, _, h: _attention(p, c, h),
        feed_forward,
        scale=c.embedding_scale,
        logit_scale=c.logit_scale,
    )


def _attention(p: LayerBuilder, c: Config, h: Value) -> Value:
    H, G, D = c.n_heads, c.n_kv_heads, c.head_dim
    roles = ("attn_q", H * D), ("attn_k", G * D), ("attn_v", G * D)
    p.split("attn_qkv", *roles)
    qkv = p.biased("qkv_matmul", h, *roles)
    rope = Rope(c.rope, neighbours=True)  # rows in the order of Meta's pairs, as llama's
    q = blocks.heads_of(p, "q_post_rope", rope, qkv, Heads(0, H, D))
    k = blocks.heads_of(p, "k_post_rope", rope, qkv, Heads(H * D, G, D))
    v = p.g.one(None, Heads((H + G) * D, G, D), qkv)
    y = blocks.attention(p.g, q, k, v, scale=c.attention_scale)
    y = p.biased("attn_out", y, ("attn_output", c.hidden))
    return blocks.scaled(p.g, "attn_scaled", y, c.residual_scale)


def _settings(c: ModelConfig, shared: bool | None) -> dict[str, Any] | None:
    """``shared``: whether the class has a shared expert beside a mixture; None: no mixture."""
    assert isinstance(c, Config)
    if (shared is None) == c.is_moe or (c.is_moe and bool(c.shared_ffn) != shared):
        return None
    return {
        "embedding_multiplier": c.embedding_scale,
        "attention_multiplier": c.attention_scale or c.head_dim**-0.5,
        "residual_multiplier": c.residual_scale,
        "logits_scaling": c.logit_scale,
        "num_local_experts": c.n_experts,
        "shared_intermediate_size": c.shared_ffn,
    }


def _layer(c: Metadata) -> dict[str, Source]:
    of_pairs = {
        f"{role}.weight": Source(f"self_attn.{role[-1]}_proj.weight", (move,))
        for role, move in neighbouring_pairs(c).items()
    }
    return {**ATTENTION, **of_pairs, **weights(ffn_norm="post_attention_layernorm")}


def _both(name: str, roles: tuple[str, str]) -> dict[str, Source]:
    """Gate and up in one."""
    return {f"ffn_{r}.weight": Source(name, (Share(i, 2),)) for i, r in enumerate(roles)}


_EXPERTS: Sources = {
    **weights(ffn_gate_inp="block_sparse_moe.router", ffn_down_shexp="shared_mlp.output_linear"),
    **_both("block_sparse_moe.experts.gate_up_proj", ("gate_exps", "up_exps")),
    **_both("shared_mlp.input_linear.weight", ("gate_shexp", "up_shexp")),
    "ffn_down_exps.weight": Source("block_sparse_moe.experts.down_proj"),
}
# What logits are divided by, the graph has in the last norm.
_PLACES: dict[str, ModuleValue | None] = {
    "final_norm": None,
    "moe_router": ModuleValue("block_sparse_moe.router", index=1),
    "moe_router_indices": ModuleValue("block_sparse_moe.router", index=2),
    "moe_ffn_out": ModuleValue("block_sparse_moe.experts"),
}
_MIXTURE = HuggingFace(
    "granitemoe",
    "GraniteMoeForCausalLM",
    {},
    lambda c: {**_layer(c), **_EXPERTS},
    settings=lambda c, _: _settings(c, shared=False),
    places=lambda _: _PLACES,
    experts="block_sparse_moe.experts",
    checkpoint=False,
)
HUGGING_FACE = {
    "granite": replace(
        _MIXTURE,
        architecture="granite",
        model="GraniteForCausalLM",
        layer=lambda c: {**_layer(c), **FEED_FORWARD},
        settings=lambda c, _: _settings(c, None),
    ),
    "granitemoe": _MIXTURE,
    "granitemoeshared": replace(
        _MIXTURE,
        model="GraniteMoeSharedForCausalLM",
        settings=lambda c, _: _settings(c, shared=True),
    ),
}
"""By config.json's ``model_type``."""
ARCHITECTURES = dict.fromkeys(("granite", "granitemoe"), Architecture(config, graph))
"""By the name in ``general.architecture``."""
