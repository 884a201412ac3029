"""What a model takes of the GPU's memory: planned and refused before anything is loaded."""

from dataclasses import dataclass

from isobit.backends.cuda.layout import ACT_BYTES
from isobit.backends.pool import Room
from isobit.config import EngineConfig, ModelConfig
from isobit.errors import BackendUnavailable
from isobit.model.weights import Weights
from isobit.numerics import TILE, Weight

ALIGNMENT = 256
STAGING_BYTES = 128 << 20
"""Where tensors arrive before they are repacked, in parts."""
STAGING_SLOTS = 16
"""Parts on their way at once."""
LOGIT_ROWS = 64
"""Rows of logits computed at once."""
MOST_IN_STEP = 64
"""Sequences that take a decode step together (decode_batch.py)."""
_CONTEXT_BYTES = 500 << 20
"""What the driver and the compiled kernels take, about."""


def aligned(nbytes: int) -> int:
    """Round up to the alignment of every buffer."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def supers(columns: int) -> int:
    """Superblocks of a row."""
    return -(-columns // 256)


def in_step(engine: EngineConfig) -> int:
    """Sequences that a step of decode_batch.py can have; 0 if there is never more than one."""
    return min(engine.max_sequences, MOST_IN_STEP) if engine.max_sequences > 1 else 0


@dataclass(frozen=True)
class CacheShape:
    """The KV cache of one layer: pages of 64 positions, with every head's planes and scales."""

    pages: int
    heads: int
    padded: int
    """head_dim rounded up to 16."""

    @classmethod
    def of(cls, c: ModelConfig, engine: EngineConfig) -> "CacheShape":
        """As many pages as the runtime hands out."""
        context = engine.context or c.context_length
        pages = engine.pages or -(-context // TILE) * engine.max_sequences
        return cls(pages, c.n_kv_heads, -(-c.head_dim // 16) * 16)

    @property
    def plane_bytes(self) -> int:
        """Both planes of K, or of V."""
        return 2 * self.pages * self.heads * TILE * self.padded

    @property
    def scale_bytes(self) -> int:
        """The scales of K, or of V."""
        return 4 * self.pages * self.heads * TILE

    @property
    def nbytes(self) -> int:
        """All of one layer."""
        return 2 * (aligned(self.plane_bytes) + aligned(self.scale_bytes))


def workspace(c: ModelConfig, tokens: int) -> dict[str, int]:
    """Bytes of each buffer that a pass over ``tokens`` tokens writes."""
    heads = c.n_heads + 2 * c.n_kv_heads
    padded = -(-c.head_dim // 16) * 16
    k = max(c.n_experts_used, 1)  # a dense feed-forward is one expert
    wide = max(supers(c.hidden), supers(c.n_heads * c.head_dim), k * supers(c.ffn))
    per_token = {
        "tokens": 4,
        "positions": 4,
        "sequence": 4,
        "span_first": 4,
        "span_count": 4,
        "x": 4 * c.hidden,
        "h": 4 * c.hidden,
        "acts": ACT_BYTES * wide,
        "qkv": 4 * heads * c.head_dim,
        "q_rope": 4 * c.n_heads * c.head_dim,
        "k_rope": 4 * c.n_kv_heads * c.head_dim,
        "q_int": 2 * c.n_heads * padded,
        "dq": 4 * c.n_heads,
        "attention": 4 * c.n_heads * c.head_dim,
        "out": 4 * c.hidden,
        "router_logits": 4 * c.n_experts,
        "router_ids": 4 * k,
        "router_weights": 4 * k,
        "order": 4 * k,
        "gate": 4 * k * c.ffn,
        "up": 4 * k * c.ffn,
        "swiglu": 4 * k * c.ffn,
        "expert_out": 4 * k * c.hidden,
    }
    sizes = {name: n * tokens for name, n in per_token.items()}
    rows = min(tokens, LOGIT_ROWS)
    sizes["offset"] = 4 * (c.n_experts + 1)
    sizes["logit_rows"] = 4 * rows
    sizes["final"] = 4 * c.hidden * rows
    sizes["logits"] = 4 * c.vocab * rows
    return sizes


def step_buffers(c: ModelConfig, context: int) -> dict[str, int]:
    """Bytes of each buffer that a decode step of one sequence writes (decode.py)."""
    tiles, k = -(-context // TILE), max(c.n_experts_used, 1)
    return {
        "step": 20,
        "pages": 4 * tiles,
        "generated": 4 * (context + 1),
        "x": 4 * c.hidden,
        "qkv": 4 * (c.n_heads + 2 * c.n_kv_heads) * c.head_dim,
        "max_and_sum": 8 * tiles * c.n_heads,
        "tile_out": 4 * tiles * c.n_heads * c.head_dim,
        "attention": 4 * c.n_heads * c.head_dim,
        "router_logits": 4 * c.n_experts,
        "acts": ACT_BYTES * supers(c.hidden),
        "chosen": 8 * k * c.n_layers,
        "guess": 8 * (1 + c.n_experts) * c.n_layers,
        "swiglu": 4 * k * c.ffn,
        "logits": 4 * c.vocab,
        "best": 8 * 1024,
    }


def batch_buffers(c: ModelConfig, context: int, sequences: int) -> dict[str, int]:
    """Bytes of each buffer that a decode step of that many sequences writes (decode_batch.py)."""
    tiles, k = -(-context // TILE), max(c.n_experts_used, 1)
    wide = max(supers(c.hidden), supers(c.n_heads * c.head_dim))
    each = {
        "tokens": 4,
        "positions": 4,
        "pages": 4 * tiles,
        "generated": 4 * (context + 1),
        "x": 4 * c.hidden,
        "h": 4 * c.hidden,
        "acts": ACT_BYTES * wide,
        "ffn_acts": ACT_BYTES * k * supers(c.ffn),
        "qkv": 4 * (c.n_heads + 2 * c.n_kv_heads) * c.head_dim,
        "max_and_sum": 8 * tiles * c.n_heads,
        "tile_out": 4 * tiles * c.n_heads * c.head_dim,
        "out": 4 * c.hidden,
        "router_logits": 4 * c.n_experts,
        "router_ids": 4 * k,
        "router_weights": 4 * k,
        "order": 4 * k,
        "swiglu": 4 * k * c.ffn,
        "experts": 4 * k * c.hidden,
        "logits": 4 * c.vocab,
    }
    sizes = {name: n * sequences for name, n in each.items()}
    sizes["not_finite"] = 4
    sizes["offset"] = 4 * (c.n_experts + 1)
    sizes["groups"] = 16 * (c.n_experts + k * sequences)
    sizes["n_groups"] = 4
    return sizes


@dataclass(frozen=True)
class Plan:
    """Bytes of device memory by purpose."""

    weights: int
    cache: int
    rope: int
    workspace: int

    @classmethod
    def of(cls, weights: Weights, engine: EngineConfig) -> "Plan":
        """What this model needs with these settings."""
        c = weights.config
        context = engine.context or c.context_length
        return cls(
            weights=sum(aligned(w.data.nbytes) for w in matrices(weights).values())
            + sum(aligned(4 * n) for n in (c.hidden, c.head_dim) for _ in range(2 * c.n_layers))
            + aligned(4 * c.hidden),
            cache=c.n_layers * CacheShape.of(c, engine).nbytes,
            rope=2 * aligned(4 * context * (c.head_dim // 2)),
            workspace=STAGING_BYTES
            + sum(map(aligned, workspace(c, engine.chunk).values()))
            + sum(map(aligned, step_buffers(c, context).values()))
            + sum(map(aligned, batch_buffers(c, context, in_step(engine)).values())),
        )

    @property
    def total(self) -> int:
        """All of it, with what the driver takes."""
        return self.weights + self.cache + self.rope + self.workspace + _CONTEXT_BYTES

    def __str__(self) -> str:
        """One line for people."""
        parts = (
            ("weights", self.weights),
            ("KV cache", self.cache),
            ("RoPE tables", self.rope),
            ("workspace", self.workspace),
            ("driver", _CONTEXT_BYTES),
        )
        terms = " + ".join(f"{name} {n / 1e9:.2f}" for name, n in parts)
        return f"{terms} = {self.total / 1e9:.2f} GB"

    def check(self, free: int, total: int) -> None:
        """Raise BackendUnavailable with the arithmetic if it does not fit."""
        needed = self.total - _CONTEXT_BYTES  # the driver has taken its part already
        if needed > free:
            raise BackendUnavailable(
                f"cuda: the model needs {self}; {free / 1e9:.2f} of {total / 1e9:.2f} GB are "
                "free (a smaller --context or fewer sequences make the KV cache smaller)"
            )


def room(weights: Weights, engine: EngineConfig, free: int) -> Room:
    """What is left of free memory for the KV cache."""
    plan, shape = Plan.of(weights, engine), CacheShape.of(weights.config, engine)
    # The driver has taken its part already; alignment takes some of every layer.
    others = plan.total - _CONTEXT_BYTES - plan.cache + 4 * ALIGNMENT * weights.config.n_layers
    return Room(free - others, -(-plan.cache // shape.pages))


def matrices(weights: Weights) -> dict[str, Weight]:
    """Every matrix by name, once (a tied output is the embedding)."""
    found = [weights.token_embd, weights.output]
    for layer in weights.layers:
        found += [layer.q, layer.k, layer.v, layer.attn_output, layer.gate, layer.up, layer.down]
        if layer.router is not None:
            found.append(layer.router)
    return {w.name: w for w in found}
