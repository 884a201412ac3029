"""How an architecture's tensors are called and laid out in a checkpoint of transformers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isobit.config import Metadata
from isobit.gguf.header import Value

Array = NDArray[Any]


@dataclass(frozen=True)
class Source:
    """Where a tensor comes from.

    ``name`` may hold ``{e}``: then one matrix an expert, to be stacked. ``make`` rearranges a
    matrix, of whatever type; of a tensor that is kept in float32 it may change the values.
    """

    name: str
    make: Callable[[Array], Array] | None = None
    float32: bool = False


Sources = Mapping[str, tuple[Source, ...]]
"""By the tensor's name in GGUF: where it may come from, the first that is there."""


@dataclass(frozen=True)
class CheckpointFormat:
    """What a checkpoint of an architecture says, in GGUF's words."""

    architecture: str
    """As ``general.architecture`` has it."""
    metadata: Callable[[Metadata], dict[str, Value]]
    """From config.json to what follows ``general.architecture``; raises ModelRefused."""
    sources: Callable[[Metadata], Sources]


def float32(value: float) -> float:
    """A number as GGUF stores it."""
    return float(np.float32(value))


def transformer(c: Metadata) -> dict[str, Value]:
    """What every transformer's config.json says, without the architecture's prefix."""
    heads = c.count("num_attention_heads", 1, 4096)
    hidden = c.count("hidden_size", 1, 1 << 20)
    head_dim = c.count("head_dim", 2, 512, default=hidden // heads)
    c.only("hidden_act", "silu")
    found: dict[str, Value] = {
        "block_count": c.count("num_hidden_layers", 1, 4096),
        "context_length": c.count("max_position_embeddings", 1, 1 << 24),
        "embedding_length": hidden,
        "attention.head_count": heads,
        "attention.head_count_kv": c.count("num_key_value_heads", 1, heads, default=heads),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float32(c.number("rms_norm_eps", 1e-30, 1.0)),
        "rope.freq_base": float32(c.number("rope_theta", 1.0, 1e12)),
    }
    c.only("rope_type", "default")
    c.only("use_sliding_window", False)
    return found


def experts(c: Metadata) -> dict[str, Value]:
    """The numbers of a mixture of experts."""
    key = "num_experts" if "num_experts" in c.metadata else "num_local_experts"
    return {
        "expert_count": c.count(key, 1, 4096),
        "expert_used_count": c.count("num_experts_per_tok", 1, 64),
        "expert_feed_forward_length": c.count("moe_intermediate_size", 1, 1 << 20),
    }


def plain(name: str) -> tuple[Source, ...]:
    """A matrix as it is."""
    return (Source(f"{name}.weight"),)


def expert_stacks(at: str) -> dict[str, tuple[Source, ...]]:
    """gate, up and down of a layer's experts: a matrix each, or stacked, gate and up in one."""

    def half(second: bool) -> Callable[[Array], Array]:
        def take(stack: Array) -> Array:
            rows = stack.shape[-2] // 2
            return stack[..., rows:, :] if second else stack[..., :rows, :]

        return take

    return {
        f"ffn_{role}_exps.weight": (
            Source(f"{at}mlp.experts.{{e}}.{role}_proj.weight"),
            Source(f"{at}mlp.experts.gate_up_proj", half(role == "up"))
            if role != "down"
            else Source(f"{at}mlp.experts.down_proj"),
        )
        for role in ("gate", "up", "down")
    }
