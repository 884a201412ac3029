"""What every architecture refuses: keys that would make another computation of its graph."""

from collections.abc import Collection, Sequence

from isobit.config import Metadata, ModelConfig

_ROPE_KEYS = (
    *("rope.freq_base", "rope.dimension_count", "rope.scale_linear"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor"),
    *("rope.scaling.original_context_length", "rope.scaling.finetuned"),  # say nothing alone
)
_NOT_IMPLEMENTED = (
    *("attention.scale", "attention.clamp_kqv", "attention.max_alibi_bias"),
    *("attn_logit_softcapping", "final_logit_softcapping", "router_logit_softcapping"),
    *("logit_scale", "residual_scale", "embedding_scale", "expert_group_count"),
)
"""Keys of other architectures that would make another computation of the graph."""


def check(
    r: Metadata,
    c: ModelConfig,
    *,
    known: Collection[str] = (),
    scaled: bool = False,
    windows: bool = False,
    gating: int = 1,
    routed: bool = False,
) -> None:
    """Refuse hyper-parameters that do not fit together, and keys that are not implemented.

    ``known``: keys that an architecture reads besides those that all do, without its name.
    ``scaled``, ``windows``: it has read the scaling of RoPE, the sliding window. ``gating``: the
    router's function as the key has it, softmax by default; ``routed``: it has read that, the
    scale of experts and which layers have none.
    """
    arch = c.architecture
    if c.n_heads % c.n_kv_heads:
        raise r.refusal(
            f"{arch}.attention.head_count_kv", f"a divisor of {c.n_heads}", c.n_kv_heads
        )
    if c.head_dim % 2:
        raise r.refusal(f"{arch}.attention.key_length", "an even number", c.head_dim)
    if c.is_moe and c.n_experts_used > c.n_experts:
        raise r.refusal(f"{arch}.expert_used_count", f"at most {c.n_experts}", c.n_experts_used)
    r.only(f"{arch}.attention.value_length", c.head_dim)
    r.only(f"{arch}.vocab_size", c.vocab)
    if scaled:
        known = {*known, "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"}
    else:
        r.only(f"{arch}.rope.scaling.type", "none")
        r.only(f"{arch}.rope.scaling.factor", 1.0)
        r.only(f"{arch}.rope.scaling.attn_factor", 1.0)
    r.only(f"{arch}.rope.scale_linear", 1.0)
    for key, value in r.metadata.items():
        name = key.removeprefix(f"{arch}.")
        unknown = name.startswith("rope.") and name not in _ROPE_KEYS
        if (unknown or name in _NOT_IMPLEMENTED) and name not in known:
            raise r.refusal(key, "no such key (it is not implemented)", value)
    tokens = r.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, Sequence) and len(tokens) != c.vocab:
        expected = f"{c.vocab} tokens, as many as token_embd.weight has rows"
        raise r.refusal("tokenizer.ggml.tokens", expected, len(tokens))
    r.only(f"{arch}.attention.causal", True)
    if not windows:
        r.only(f"{arch}.attention.sliding_window", 0)
    r.only(f"{arch}.attention.sliding_window_pattern", 2)
    if not routed:
        r.only(f"{arch}.expert_gating_func", gating)
        r.only(f"{arch}.leading_dense_block_count", 0)
