"""The stages of a forward pass, in graph order: the names every trace uses.

Shapes are for a batch of T tokens; H query heads, G key-value heads, D head_dim, N keys (the last
position + 1), E experts, k chosen experts in rank order, F feed-forward width.
"""

EMBEDDING = "embedding"  # [T, hidden]

ATTENTION_STAGES = (
    "attn_norm",  # [T, hidden]
    "qkv_matmul",  # [T, (H + 2G) * D]: q, then k, then v
    "q_post_rope",  # [T, H, D], after q norm and RoPE, before quantisation
    "k_post_rope",  # [T, G, D]
    "attn_scores",  # [T, H, N]: s of section 6 of docs/numerics.md, +0 beyond a token's position
    "attn_softmax",  # [T, H, N]: their softmax, +0 beyond a token's position
    "attention",  # [T, H * D]
    "attn_out",  # [T, hidden]
    "post_attn_residual",  # [T, hidden]
    "ffn_norm",  # [T, hidden]
)
MOE_STAGES = (
    "moe_router_logits",  # [T, E]
    "moe_router",  # [T, k], the weights
    "moe_router_indices",  # int32 [T, k]
    "moe_expert_gate",  # [T, k, F]
    "moe_expert_up",  # [T, k, F]
    "moe_expert_swiglu",  # [T, k, F]
    "moe_expert_out",  # [T, k, hidden]
    "moe_ffn_out",  # [T, hidden]
)
DENSE_STAGES = (
    "ffn_gate",  # [T, F]
    "ffn_up",  # [T, F]
    "ffn_swiglu",  # [T, F]
    "ffn_out",  # [T, hidden]
)
ON_REQUEST = frozenset({"attn_scores", "attn_softmax"})
"""Stages that are given only when they are named: they grow with the square of T, no later stage
needs them, and a backend that never holds them (fused attention) leaves them out."""

POST_FFN_RESIDUAL = "post_ffn_residual"  # [T, hidden]
FINAL_STAGES = (
    "final_norm",  # [T, hidden]
    "lm_head",  # [R, vocabulary]
)


def layer_stages(*, moe: bool) -> tuple[str, ...]:
    """The stages of one layer, in graph order."""
    return (*ATTENTION_STAGES, *(MOE_STAGES if moe else DENSE_STAGES), POST_FFN_RESIDUAL)


def all_stages(*, moe: bool) -> tuple[str, ...]:
    """Every stage name, in graph order."""
    return (EMBEDDING, *layer_stages(moe=moe), *FINAL_STAGES)
