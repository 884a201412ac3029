"""gpt-oss: grouped-query attention with biases and sinks, in every second layer over a sliding
window; then a mixture of experts with biases and a clamped SwiGLU."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from isobit.config import MOST_POSITIONS, Metadata, ModelConfig
from isobit.model.architectures import blocks
from isobit.model.architectures.architecture import Architecture
from isobit.model.architectures.blocks import LayerBuilder
from isobit.model.architectures.checks import check
from isobit.model.architectures.common import common
from isobit.model.architectures.scaling import rope_scaling
from isobit.model.graph import Graph, Value
from isobit.model.huggingface import (
    ATTENTION,
    HuggingFace,
    ModuleValue,
    Pick,
    Source,
    Sources,
    transposed,
    weights,
)
from isobit.model.tensors import Tensors
from isobit.numerics import RopeTable
from isobit.numerics.ops import (
    ClampedGate,
    Combine,
    ExpertBias,
    Heads,
    Rope,
    TopK,
)

_LIMIT, _FACTOR = 7.0, 1.702
"""Of the clamped SwiGLU; no key of the file says them."""


@dataclass(frozen=True)
class Config(ModelConfig):
    """What a file says besides what every transformer has."""

    rope: RopeTable
    windows: tuple[int | None, ...]
    """How many positions a layer's attention sees, for each layer; None: all."""


def config(r: Metadata, vocab: int) -> Config:
    """The hyper-parameters. Raises ModelRefused naming the key for what is missing, malformed or
    not implemented."""
    arch = r.text("general.architecture")
    found = common(r, vocab, moe=True)
    window = r.count(f"{arch}.attention.sliding_window", 1, MOST_POSITIONS)
    c = Config(
        **vars(found),
        rope=rope_scaling(r, arch, RopeTable(found.head_dim, found.rope_base)),
        windows=tuple(None if i % 2 else window for i in range(found.n_layers)),
    )
    # Gating 3: a softmax of the chosen logits, which is that of all of them, normalised.
    check(r, c, scaled=True, windows=True, gating=3)
    r.only(f"{arch}.rope.dimension_count", c.head_dim)
    r.only(f"{arch}.expert_weights_norm", True)
    return c


def graph(c: ModelConfig, tensors: Tensors) -> Graph:
    """The graph of a file's model. Raises ModelRefused for a missing or misshapen tensor."""
    assert isinstance(c, Config)
    tensors.take("output.weight", c.vocab, c.hidden)  # never the embedding table
    return blocks.transformer(
        c,
        tensors,
        lambda p, i, h: _attention(p, c, c.windows[i], h),
        lambda p, _, h: _experts(p, c, h),
        ffn_norm="post_attention_norm",
    )


def _attention(p: LayerBuilder, c: Config, window: int | None, h: Value) -> Value:
    H, G, D = c.n_heads, c.n_kv_heads, c.head_dim
    roles = ("attn_q", H * D), ("attn_k", G * D), ("attn_v", G * D)
    p.split("attn_qkv", *roles)
    qkv = p.biased("qkv_matmul", h, *roles, always=True)
    rope = Rope(c.rope)
    q = blocks.heads_of(p, "q_post_rope", rope, qkv, Heads(0, H, D))
    k = blocks.heads_of(p, "k_post_rope", rope, qkv, Heads(H * D, G, D))
    v = p.g.one(None, Heads((H + G) * D, G, D), qkv)
    sinks = [p.take("attn_sinks.weight", H)]
    y = blocks.attention(p.g, q, k, v, window=window, sinks=sinks)
    return p.biased("attn_out", y, ("attn_output", c.hidden), always=True)


def _experts(p: LayerBuilder, c: Config, h: Value) -> Value:
    g, E = p.g, c.n_experts
    z = p.biased("moe_router_logits", h, ("ffn_gate_inp", E), always=True)
    weights, ids = g.add(
        ("moe_router", "moe_router_indices"), TopK(c.n_experts_used, c.normalise_experts), z
    )

    def product(name: str, role: str, rows: int, x: Value) -> Value:
        y = p.expert_product(None, x, ids, f"ffn_{role}_exps", E, rows, x.shape.row[-1])
        bias = p.take(f"ffn_{role}_exps.bias", E, rows)
        return g.one(f"moe_expert_{name}", ExpertBias(), y, ids, weights=[bias])

    gate, up = product("gate", "gate", c.ffn, h), product("up", "up", c.ffn, h)
    y = g.one("moe_expert_swiglu", ClampedGate(_LIMIT, _FACTOR), gate, up)
    return g.one("moe_ffn_out", Combine(), weights, product("out", "down", c.hidden, y))


def _settings(c: ModelConfig, _: Collection[str]) -> dict[str, Any]:
    assert isinstance(c, Config)
    return {
        "num_local_experts": c.n_experts,
        "sliding_window": max(w or 1 for w in c.windows),
        "layer_types": ["sliding_attention" if w else "full_attention" for w in c.windows],
    }


def _layer(c: Metadata) -> Sources:
    """gate and up in one, their columns in turn; matrices of experts are transposed there."""
    both = "mlp.experts.gate_up_proj"
    rows = range(2 * c.count("intermediate_size", 1, 1 << 20))
    biases = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj"}
    biases |= {"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj"}
    biases |= {"ffn_gate_inp": "mlp.router"}
    found: dict[str, Source] = {
        **ATTENTION,
        **weights(post_attention_norm="post_attention_layernorm", ffn_gate_inp="mlp.router"),
        **{f"{role}.bias": Source(f"{name}.bias") for role, name in biases.items()},
        "attn_sinks.weight": Source("self_attn.sinks"),
        "ffn_down_exps.weight": Source("mlp.experts.down_proj", (transposed,)),
        "ffn_down_exps.bias": Source("mlp.experts.down_proj_bias"),
    }
    for i, role in enumerate(("ffn_gate_exps", "ffn_up_exps")):
        own = Pick(rows[i::2], axis=-1)
        found[f"{role}.weight"] = Source(both, (own, transposed))
        found[f"{role}.bias"] = Source(f"{both}_bias", (own,))
    return found


HUGGING_FACE = {
    "gpt_oss": HuggingFace(
        "gpt-oss",
        "GptOssForCausalLM",
        {},
        _layer,
        settings=_settings,
        places=lambda _: {
            "moe_router": ModuleValue("mlp.router", index=1),
            "moe_router_indices": ModuleValue("mlp.router", index=2),
            "moe_ffn_out": ModuleValue("mlp.experts"),
        },
        experts=None,
        checkpoint=False,
    )
}
"""By config.json's ``model_type``."""
ARCHITECTURES = {"gpt-oss": Architecture(config, graph)}
"""By the name in ``general.architecture``."""
