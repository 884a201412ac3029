"""Llama, Mistral and Mixtral (`llama`), Qwen2 and Qwen2-MoE: grouped-query attention without head
norms, biases where the file has them, then SwiGLU or a mixture of SwiGLU experts."""

from dataclasses import dataclass, replace

from isobit.config import Metadata, ModelConfig
from isobit.model.architectures import blocks
from isobit.model.architectures.blocks import Part
from isobit.model.architectures.checks import check
from isobit.model.architectures.common import common
from isobit.model.architectures.scaling import rope_scaling
from isobit.model.graph import Graph, Value
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

    def feed_forward(p: Part, _: int, h: Value) -> Value:
        y = blocks.feed_forward(p, c, h)
        return blocks.shared_expert(p, c.shared_ffn, h, y) if c.shared_ffn else y

    return blocks.transformer(c, tensors, lambda p, _, h: _attention(p, c, rope, h), feed_forward)


def _attention(p: Part, c: ModelConfig, rope: Rope, h: Value) -> Value:
    H, G, D = c.n_heads, c.n_kv_heads, c.head_dim
    roles = ("attn_q", H * D), ("attn_k", G * D), ("attn_v", G * D)
    p.split("attn_qkv", *roles)
    qkv = p.biased("qkv_matmul", h, *roles, always=c.architecture.startswith("qwen2"))
    q = blocks.heads_of(p, "q_post_rope", rope, qkv, Heads(0, H, D))
    k = blocks.heads_of(p, "k_post_rope", rope, qkv, Heads(H * D, G, D))
    v = p.g.one(None, Heads((H + G) * D, G, D), qkv)
    return p.biased("attn_out", blocks.attention(p.g, q, k, v), ("attn_output", c.hidden))
