"""The hyper-parameters that every architecture has, under the keys that all share."""

from isobit.config import MOST_POSITIONS, Metadata, ModelConfig


def common(
    r: Metadata,
    vocab: int,
    *,
    moe: bool,
    width: str | None = None,
    rope_base: float | None = None,
    normalise: bool = True,
) -> ModelConfig:
    """What an architecture's own configuration begins with: ``Config(**vars(common(…)), …)``.

    ``width``: the key of the feed-forward's, if not the usual one; ``rope_base``, ``normalise``:
    what a file means that does not say it (None: it must). Raises ModelRefused naming the key.
    """
    arch = r.text("general.architecture")
    heads = r.count(f"{arch}.attention.head_count", 1, 4096)
    hidden = r.count(f"{arch}.embedding_length", 1, 1 << 20)
    width = width or ("expert_feed_forward_length" if moe else "feed_forward_length")
    return ModelConfig(
        architecture=arch,
        n_layers=r.count(f"{arch}.block_count", 1, 4096),
        hidden=hidden,
        n_heads=heads,
        n_kv_heads=r.count(f"{arch}.attention.head_count_kv", 1, heads, default=heads),
        head_dim=r.count(f"{arch}.attention.key_length", 2, 512, default=hidden // heads),
        ffn=r.count(f"{arch}.{width}", 1, 1 << 20),
        n_experts=r.count(f"{arch}.expert_count", 1, 4096) if moe else 0,
        n_experts_used=r.count(f"{arch}.expert_used_count", 1, 64) if moe else 0,
        vocab=vocab,
        rope_base=r.number(f"{arch}.rope.freq_base", 1.0, 1e12, default=rope_base),
        eps=r.number(f"{arch}.attention.layer_norm_rms_epsilon", 1e-30, 1.0),
        context_length=r.count(f"{arch}.context_length", 1, MOST_POSITIONS),
        normalise_experts=r.flag(f"{arch}.expert_weights_norm", default=normalise),
    )
