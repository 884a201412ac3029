"""Llama, Mistral and Mixtral (`llama`), Qwen2 and Qwen2-MoE: grouped-query attention without head
norms, biases where the file has them, then SwiGLU or a mixture of SwiGLU experts."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from isobit.config import Metadata, ModelConfig
from isobit.gguf.header import Value as Entry
from isobit.model.architectures import blocks
from isobit.model.architectures.architecture import Architecture
from isobit.model.architectures.blocks import LayerBuilder
from isobit.model.architectures.checks import check
from isobit.model.architectures.common import common
from isobit.model.architectures.scaling import huggingface_scaling, llama3_divisors, rope_scaling
from isobit.model.graph import Graph, Value
from isobit.model.huggingface import (
    ATTENTION,
    BIASES,
    DENSE_KEYS,
    EXPERT_KEYS,
    EXPERTS,
    FEED_FORWARD,
    KEYS,
    ONLY,
    SHARED_EXPERT,
    HuggingFace,
    Source,
    Sources,
    each,
    neighbouring_pairs,
    weights,
)
from isobit.model.tensors import Tensors
from isobit.numerics import RopeTable
from isobit.numerics.ops import Heads, Rope


@dataclass(frozen=True)
class Config(ModelConfig):
    """What a file says besides what every transformer has."""

    rope: RopeTable
    shared_ffn: int
    """Width of the shared expert of Qwen2-MoE; 0: none."""


def config(r: Metadata, vocab: int) -> Config:
    """The hyper-parameters. Raises ModelRefused naming the key for what is missing, malformed or
    not implemented."""
    arch = r.text("general.architecture")
    qwen = arch == "qwen2moe"
    found = common(
        r,
        vocab,
        moe=qwen or r.count(f"{arch}.expert_count", 0, 4096, default=0) > 0,
        width=None if qwen else "feed_forward_length",
        rope_base=10000.0,
        normalise=not qwen,
    )
    rotated = r.count(f"{arch}.rope.dimension_count", 2, found.head_dim, default=found.head_dim)
    c = Config(
        **vars(found),
        rope=rope_scaling(r, arch, RopeTable(rotated, found.rope_base)),
        shared_ffn=r.count(f"{arch}.expert_shared_feed_forward_length", 1, 1 << 20) if qwen else 0,
    )
    check(r, c, scaled=True)
    return c


def graph(c: ModelConfig, tensors: Tensors) -> Graph:
    """The graph of a file's model. Raises ModelRefused for a missing or misshapen tensor."""
    assert isinstance(c, Config)
    table = c.rope
    if "rope_freqs.weight" in tensors:
        divisors = tensors.take("rope_freqs.weight", table.size // 2).float32()
        table = replace(table, factors=tuple(divisors.tolist()))
    # A llama file's rows of q and k are in the order of Meta's pairs, (0, 1), (2, 3), …
    rope = Rope(table, neighbours=c.architecture == "llama")

    def feed_forward(p: LayerBuilder, _: int, h: Value) -> Value:
        y = blocks.feed_forward(p, c, h)
        return blocks.shared_expert(p, c.shared_ffn, h, y) if c.shared_ffn else y

    return blocks.transformer(c, tensors, lambda p, _, h: _attention(p, c, rope, h), feed_forward)


def _attention(p: LayerBuilder, c: ModelConfig, rope: Rope, h: Value) -> Value:
    H, G, D = c.n_heads, c.n_kv_heads, c.head_dim
    roles = ("attn_q", H * D), ("attn_k", G * D), ("attn_v", G * D)
    p.split("attn_qkv", *roles)
    qkv = p.biased("qkv_matmul", h, *roles, always=c.architecture.startswith("qwen2"))
    q = blocks.heads_of(p, "q_post_rope", rope, qkv, Heads(0, H, D))
    k = blocks.heads_of(p, "k_post_rope", rope, qkv, Heads(H * D, G, D))
    v = p.g.one(None, Heads((H + G) * D, G, D), qkv)
    return p.biased("attn_out", blocks.attention(p.g, q, k, v), ("attn_output", c.hidden))


_LAYER = {**ATTENTION, **BIASES, **weights(ffn_norm="post_attention_layernorm")}


def _llama(c: Metadata) -> dict[str, Source | Sequence[Source]]:
    layer: dict[str, Source | Sequence[Source]] = dict(_LAYER)
    for role, move in neighbouring_pairs(c).items():
        for what in ("weight", "bias"):
            layer[f"{role}.{what}"] = Source(f"self_attn.{role[-1]}_proj.{what}", (move,))
    return layer


MIXTRAL: Sources = {
    "ffn_gate_inp.weight": (
        Source("block_sparse_moe.gate.weight", float32=True),
        Source("mlp.gate.weight", float32=True),
    ),
    **{
        f"ffn_{role}_exps.weight": (
            Source(f"block_sparse_moe.experts.{{e}}.{theirs}.weight"),
            *each(EXPERTS[f"ffn_{role}_exps.weight"]),
        )
        for role, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    },
}
_ANY_ROPE = {key: value for key, value in ONLY.items() if key != "rope_type"}
_ALL_SEEN = _ANY_ROPE | {"sliding_window": None}


def _qwen2moe(c: Metadata) -> dict[str, Entry]:
    normalised = c.flag("norm_topk_prob", default=False)
    return {**huggingface_scaling(c), "expert_weights_norm": normalised}


def _shared_width(c: ModelConfig, _: Collection[str]) -> dict[str, Any]:
    assert isinstance(c, Config)
    return {"shared_expert_intermediate_size": c.shared_ffn}


_DENSE = HuggingFace(
    "llama",
    "LlamaForCausalLM",
    KEYS | DENSE_KEYS,
    lambda c: {**_llama(c), **FEED_FORWARD},
    only=_ALL_SEEN,
    more=huggingface_scaling,
    computed=llama3_divisors,
    settings=lambda c, _: None if c.is_moe else {},
)
HUGGING_FACE = {
    "llama": _DENSE,
    "mistral": replace(_DENSE, model="MistralForCausalLM"),
    "mixtral": replace(
        _DENSE,
        model="MixtralForCausalLM",
        keys=KEYS | DENSE_KEYS | {k: v for k, v in EXPERT_KEYS.items() if "length" not in k},
        layer=lambda c: {**_llama(c), **MIXTRAL},
        settings=lambda c, _: {} if c.is_moe else None,
    ),
    "qwen2": replace(
        _DENSE,
        architecture="qwen2",
        model="Qwen2ForCausalLM",
        layer=lambda _: {**_LAYER, **FEED_FORWARD},
        only=_ANY_ROPE,
    ),
    "qwen2_moe": replace(
        _DENSE,
        architecture="qwen2moe",
        model="Qwen2MoeForCausalLM",
        keys=KEYS
        | EXPERT_KEYS
        | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        layer=lambda _: {**_LAYER, **EXPERTS, **SHARED_EXPERT},
        only=_ANY_ROPE | {"decoder_sparse_step": 1, "mlp_only_layers": []},
        more=_qwen2moe,
        settings=_shared_width,
    ),
}
"""By config.json's ``model_type``."""
ARCHITECTURES = dict.fromkeys(("llama", "qwen2", "qwen2moe"), Architecture(config, graph))
"""By the name in ``general.architecture``."""
