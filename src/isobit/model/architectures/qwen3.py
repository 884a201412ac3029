"""Qwen3 and Qwen3-MoE: grouped-query attention with a norm of each head vector, then SwiGLU or a
mixture of SwiGLU experts."""

from isobit.config import MOST_POSITIONS, Metadata, ModelConfig
from isobit.model.architectures.checks import check
from isobit.model.graph import Builder, Graph, Value
from isobit.model.tensors import Tensors
from isobit.numerics import RopeTable
from isobit.numerics.ops import (
    Add,
    Append,
    Attention,
    AttentionScores,
    AttentionSoftmax,
    Combine,
    Embedding,
    ExpertMatMul,
    Heads,
    MatMul,
    RmsNorm,
    Rope,
    SelectRows,
    SiluGate,
    TopK,
)


def config(r: Metadata, vocab: int) -> ModelConfig:
    """The hyper-parameters. Raises ModelRefused naming the key for what is missing, malformed or
    not implemented."""
    arch = r.text("general.architecture")
    moe = arch == "qwen3moe"
    heads = r.count(f"{arch}.attention.head_count", 1, 4096)
    hidden = r.count(f"{arch}.embedding_length", 1, 1 << 20)
    head_dim = r.count(f"{arch}.attention.key_length", 2, 512, default=hidden // heads)
    c = ModelConfig(
        architecture=arch,
        n_layers=r.count(f"{arch}.block_count", 1, 4096),
        hidden=hidden,
        n_heads=heads,
        n_kv_heads=r.count(f"{arch}.attention.head_count_kv", 1, heads, default=heads),
        head_dim=head_dim,
        ffn=r.count(f"{arch}.{'expert_' if moe else ''}feed_forward_length", 1, 1 << 20),
        n_experts=r.count(f"{arch}.expert_count", 1, 4096) if moe else 0,
        n_experts_used=r.count(f"{arch}.expert_used_count", 1, 64) if moe else 0,
        vocab=vocab,
        rope_base=r.number(f"{arch}.rope.freq_base", 1.0, 1e12),
        eps=r.number(f"{arch}.attention.layer_norm_rms_epsilon", 1e-30, 1.0),
        context_length=r.count(f"{arch}.context_length", 1, MOST_POSITIONS),
        normalise_experts=r.flag(f"{arch}.expert_weights_norm", default=True),
    )
    check(r, c)
    r.only(f"{arch}.rope.dimension_count", c.head_dim)
    r.only(f"{arch}.expert_weights_scale", 1.0)
    r.only(f"{arch}.expert_shared_count", 0)
    return c


def graph(c: ModelConfig, tensors: Tensors) -> Graph:
    """The graph of a file's model. Raises ModelRefused for a missing or misshapen tensor."""
    g = Builder(tensors.source)
    table = tensors.take("token_embd.weight", c.vocab, c.hidden)
    x = g.one("embedding", Embedding(), g.tokens, weights=[table])
    for i in range(c.n_layers):
        with g.layer(i):
            at = f"blk.{i}."
            x = g.one("post_attn_residual", Add(), x, _attention(g, c, tensors, at, x))
            ffn = _experts if c.is_moe else _dense
            x = g.one("post_ffn_residual", Add(), x, ffn(g, c, tensors, at, x))
    norm = tensors.take("output_norm.weight", c.hidden)
    x = g.one("final_norm", RmsNorm(c.eps), x, weights=[norm])
    output = table
    if "output.weight" in tensors:
        output = tensors.take("output.weight", c.vocab, c.hidden)
    wanted = g.one(None, SelectRows(), x, g.logit_rows)
    return g.graph(g.one("lm_head", MatMul(), wanted, weights=[output]))


def _attention(g: Builder, c: ModelConfig, tensors: Tensors, at: str, x: Value) -> Value:
    H, G, D = c.n_heads, c.n_kv_heads, c.head_dim
    q_width, kv_width = H * D, G * D
    h = _norm(g, c, tensors, at, "attn_norm", x)
    matrices = [
        tensors.take(f"{at}attn_q.weight", q_width, c.hidden),
        tensors.take(f"{at}attn_k.weight", kv_width, c.hidden),
        tensors.take(f"{at}attn_v.weight", kv_width, c.hidden),
    ]
    qkv = g.one("qkv_matmul", MatMul(), h, weights=matrices)

    def rotated(name: str, norm: str, first: int, count: int) -> Value:
        heads = g.one(None, Heads(first, count, D), qkv)
        weight = tensors.take(f"{at}{norm}.weight", D)
        normed = g.one(None, RmsNorm(c.eps), heads, weights=[weight])
        return g.one(name, Rope(RopeTable(D, c.rope_base)), normed, g.positions)

    q = rotated("q_post_rope", "attn_q_norm", 0, H)
    k = rotated("k_post_rope", "attn_k_norm", q_width, G)
    v = g.one(None, Heads(q_width + kv_width, G, D), qkv)
    keys, values = g.add(None, Append(), k, v)
    scores = g.one("attn_scores", AttentionScores(), q, keys, g.positions, on_request=True)
    g.one("attn_softmax", AttentionSoftmax(), scores, g.positions, on_request=True)
    y = g.one("attention", Attention(), q, keys, values, g.positions)
    output = tensors.take(f"{at}attn_output.weight", c.hidden, q_width)
    return g.one("attn_out", MatMul(), y, weights=[output])


def _dense(g: Builder, c: ModelConfig, tensors: Tensors, at: str, x: Value) -> Value:
    h = _norm(g, c, tensors, at, "ffn_norm", x)

    def product(name: str, role: str, rows: int, of: Value) -> Value:
        weight = tensors.take(f"{at}ffn_{role}.weight", rows, of.shape.width)
        return g.one(f"ffn_{name}", MatMul(), of, weights=[weight])

    gate, up = product("gate", "gate", c.ffn, h), product("up", "up", c.ffn, h)
    return product("out", "down", c.hidden, g.one("ffn_swiglu", SiluGate(), gate, up))


def _experts(g: Builder, c: ModelConfig, tensors: Tensors, at: str, x: Value) -> Value:
    h = _norm(g, c, tensors, at, "ffn_norm", x)
    router = tensors.take(f"{at}ffn_gate_inp.weight", c.n_experts, c.hidden)
    z = g.one("moe_router_logits", MatMul(), h, weights=[router])
    names = "moe_router", "moe_router_indices"
    weights, ids = g.add(names, TopK(c.n_experts_used, c.normalise_experts), z)

    def product(name: str, role: str, rows: int, of: Value) -> Value:
        shape = (c.n_experts, rows, of.shape.row[-1])
        weight = tensors.take(f"{at}ffn_{role}_exps.weight", *shape)
        return g.one(f"moe_expert_{name}", ExpertMatMul(), of, ids, weights=[weight])

    gate, up = product("gate", "gate", c.ffn, h), product("up", "up", c.ffn, h)
    y = product("out", "down", c.hidden, g.one("moe_expert_swiglu", SiluGate(), gate, up))
    return g.one("moe_ffn_out", Combine(), weights, y)


def _norm(g: Builder, c: ModelConfig, tensors: Tensors, at: str, name: str, x: Value) -> Value:
    weight = tensors.take(f"{at}{name}.weight", c.hidden)
    return g.one(name, RmsNorm(c.eps), x, weights=[weight])
