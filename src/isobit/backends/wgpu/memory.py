"""What a model needs of the device's memory, and whether its limits allow it.

WebGPU limits a buffer that a kernel binds (128 MiB by default, more where the adapter has it).
Weights are divided into as many buffers as they need, the KV cache by heads, and a batch into as
many passes; what cannot be divided further is refused with the arithmetic.
"""

from dataclasses import dataclass

from isobit.backends.wgpu.device import MAX_GROUPS
from isobit.backends.wgpu.layout import superblocks
from isobit.config import EngineConfig, ModelConfig
from isobit.errors import BackendUnavailable
from isobit.numerics import TILE

ACT_BYTES = 592
"""One superblock of quantised activations (quantise.wgsl)."""
_PARTIAL_BYTES = 32 << 20
_LOGIT_ROWS = 64
_LIMIT = "maxStorageBufferBindingSize"


def words_of(head_dim: int) -> int:
    """32-bit words of one plane of a head vector."""
    return -(-head_dim // 4)


def record_bytes(head_dim: int) -> int:
    """One head of one page of the KV cache, K and V (cache.wgsl)."""
    return 4 * (256 * words_of(head_dim) + 2 * TILE)


@dataclass(frozen=True)
class Plan:
    """How a model's buffers are cut to a device's limit, and their bytes."""

    pages: int
    """Of the KV cache, as many as the runtime hands out."""
    head_bytes: int
    """One head of one layer's KV cache."""
    cache_heads: int
    """Key-value heads in one buffer of the KV cache."""
    tokens: int
    """In one pass; larger batches take several."""
    logit_rows: int
    """Rows of logits computed at once."""
    partial_tiles: int
    """Tokens times tiles that attention holds at once."""
    buffers: dict[str, int]
    """Bytes of each buffer of a pass."""

    @classmethod
    def of(cls, c: ModelConfig, engine: EngineConfig, binding: int) -> "Plan":
        """Fit a model to ``binding`` bytes a buffer; raises BackendUnavailable if it cannot be."""
        context = engine.context or c.context_length
        tiles = -(-context // TILE)
        pages = tiles * engine.max_sequences
        page = record_bytes(c.head_dim)
        if pages * page > binding:
            _check(
                pages * page,
                binding,
                f"one head's KV cache: {pages} pages of {TILE} positions × {page} bytes",
                "use a smaller context or fewer sequences",
            )
        each = _per_token(c)
        name = max(each, key=lambda n: each[n])
        _check(each[name], binding, f"one token's {name}", "the model is too wide")
        _check(4 * c.vocab, binding, f"logits: {c.vocab} × 4 bytes", "the vocabulary is too large")
        tile = 4 * c.n_heads * (c.head_dim + 2)  # o, m, l of every head
        _check(
            tiles * tile,
            binding,
            f"attention: {tiles} tiles × {c.n_heads} heads × {4 * (c.head_dim + 2)} bytes",
            "use a smaller context",
        )
        tokens = min(engine.chunk, binding // each[name], MAX_GROUPS // max(c.n_experts_used, 1))
        logit_rows = min(_LOGIT_ROWS, tokens, binding // (4 * c.vocab))
        room = max(min(tokens * tiles * tile, _PARTIAL_BYTES, binding) // tile, tiles)
        return cls(
            pages=pages,
            head_bytes=pages * page,
            cache_heads=min(c.n_kv_heads, binding // (pages * page)),
            tokens=tokens,
            logit_rows=logit_rows,
            partial_tiles=room,
            buffers={n: size * tokens for n, size in each.items()}
            | {
                "state_b": each["state"] * tokens,
                "batch": 1 << 16,
                "plan": 4 * plan_words(c, tokens),
                "partial": room * tile,
                "logits": 4 * c.vocab * logit_rows,
            },
        )


def plan_words(c: ModelConfig, tokens: int) -> int:
    """Words of the experts' plan (moe.wgsl): ids, order, groups of 3, room for sorting."""
    return 5 * tokens * max(c.n_experts_used, 1) + c.n_experts


def _per_token(c: ModelConfig) -> dict[str, int]:
    """Bytes that each buffer of a pass needs for one token."""
    k = max(c.n_experts_used, 1)  # a dense feed-forward is one expert
    heads = c.n_heads + 2 * c.n_kv_heads
    wide = max(superblocks(c.hidden), superblocks(c.n_heads * c.head_dim), k * superblocks(c.ffn))
    return {
        "state": 4 * 3 * c.hidden,  # of which there are two
        "acts": ACT_BYTES * wide,
        "qkv": 4 * heads * c.head_dim,
        "rope": 4 * (c.n_heads + c.n_kv_heads) * c.head_dim,
        "queries": 4 * c.n_heads * (2 * words_of(c.head_dim) + 1),
        "attention": 4 * c.n_heads * c.head_dim,
        "output": 4 * k * c.hidden,
        "router_logits": 4 * max(c.n_experts, 1),
        "probabilities": 4 * max(c.n_experts, 1),
        "router_weights": 4 * k,
        "gate_up": 4 * k * 2 * c.ffn,
        "swiglu": 4 * k * c.ffn,
    }


def _check(needed: int, binding: int, what: str, remedy: str) -> None:
    if needed > binding:
        raise BackendUnavailable(
            f"wgpu: {what} = {needed:,} bytes in one buffer, the device's {_LIMIT} is "
            f"{binding:,}: {remedy}"
        )
