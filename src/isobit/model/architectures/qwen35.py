"""Qwen3.5 and Qwen3.5-MoE: three layers of four are gated delta nets, the fourth is attention with
an output gate; a mixture of experts beside a gated shared expert, or a dense feed-forward."""

from dataclasses import dataclass, replace

from isobit.config import Metadata, ModelConfig
from isobit.model.architectures import blocks
from isobit.model.architectures.blocks import Part
from isobit.model.architectures.checks import check
from isobit.model.architectures.common import common
from isobit.model.graph import Graph, Value
from isobit.model.tensors import Tensors
from isobit.numerics import RopeTable
from isobit.numerics.ops import (
    CausalConv,
    Columns,
    Decay,
    GatedDelta,
    Heads,
    L2Norm,
    RmsNorm,
    Sigmoid,
    SigmoidGate,
    Silu,
    SiluGate,
)


@dataclass(frozen=True)
class Config(ModelConfig):
    """What a file says besides what every transformer has."""

    recurrent: tuple[bool, ...]
    """Whether a layer is a delta net, for each."""
    rotated: int
    """Values of a head vector that RoPE turns."""
    key_heads: int
    value_heads: int
    """Of the delta net."""
    state_size: int
    """Values of its head vectors."""
    conv_kernel: int
    shared_ffn: int
    """Width of the shared expert."""


def config(r: Metadata, vocab: int) -> Config:
    """The hyper-parameters. Raises ModelRefused naming the key for what is missing, malformed or
    not implemented."""
    arch = r.text("general.architecture")
    moe = arch == "qwen35moe"
    found = common(r, vocab, moe=moe)
    drafts = r.count(f"{arch}.nextn_predict_layers", 0, found.n_layers - 1, default=0)
    layers, value_heads = found.n_layers - drafts, r.count(f"{arch}.ssm.time_step_rank", 1, 4096)
    c = Config(
        **vars(replace(found, n_layers=layers, normalise_experts=True)),
        recurrent=_recurrent(r, arch, found.n_layers)[:layers],
        rotated=r.count(f"{arch}.rope.dimension_count", 2, 512),
        key_heads=r.count(f"{arch}.ssm.group_count", 1, value_heads),
        value_heads=value_heads,
        state_size=r.count(f"{arch}.ssm.state_size", 2, 512),
        conv_kernel=r.count(f"{arch}.ssm.conv_kernel", 2, 16),
        shared_ffn=r.count(f"{arch}.expert_shared_feed_forward_length", 1, 1 << 20) if moe else 0,
    )
    # The sections are of images; a text has one position everywhere.
    check(r, c, known={"rope.dimension_sections"})
    r.only(f"{arch}.ssm.inner_size", value_heads * c.state_size)
    return c


def _recurrent(r: Metadata, arch: str, layers: int) -> tuple[bool, ...]:
    """Which layers are delta nets: by list, or all but every n-th."""
    key = f"{arch}.attention.recurrent_layers"
    said = r.metadata.get(key)
    if said is None:
        n = r.count(f"{arch}.full_attention_interval", 1, 4096, default=4)
        return tuple((i + 1) % n != 0 for i in range(layers))
    if isinstance(said, list) and len(said) == layers and set(map(type, said)) <= {bool}:
        return tuple(said)
    raise r.refusal(key, f"true or false for each of {layers} layers", said)


def graph(c: ModelConfig, tensors: Tensors) -> Graph:
    """The graph of a file's model. Raises ModelRefused for a missing or misshapen tensor."""
    assert isinstance(c, Config)
    tensors.leave_out_layers(c.n_layers)  # they draft tokens ahead; no token depends on them
    return blocks.transformer(
        c,
        tensors,
        lambda p, i, h: (_delta_net if c.recurrent[i] else _attention)(p, c, h),
        lambda p, _, h: _feed_forward(p, c, h),
        ffn_norm="post_attention_norm",
    )


def _feed_forward(p: Part, c: Config, h: Value) -> Value:
    y = blocks.feed_forward(p, c, h)
    return blocks.shared_expert(p, c.shared_ffn, h, y) if c.is_moe else y


def _attention(p: Part, c: Config, h: Value) -> Value:
    g, H, G, D = p.g, c.n_heads, c.n_kv_heads, c.head_dim
    qkv = p.product("qkv_matmul", h, ("attn_q", 2 * H * D), ("attn_k", G * D), ("attn_v", G * D))
    table = RopeTable(c.rotated, c.rope_base)
    q = blocks.rotated_heads(
        p, "q_post_rope", "attn_q_norm", c.eps, table, qkv, Heads(0, H, D, 2 * D)
    )
    keys = Heads(2 * H * D, G, D)
    k = blocks.rotated_heads(p, "k_post_rope", "attn_k_norm", c.eps, table, qkv, keys)
    v = g.one(None, Heads((2 * H + G) * D, G, D), qkv)
    gate = g.one(None, Heads(D, H, D, 2 * D), qkv)
    y = g.one("attn_gated", SigmoidGate(), blocks.attention(g, q, k, v), gate)
    return p.product("attn_out", y, ("attn_output", c.hidden))


def _delta_net(p: Part, c: Config, h: Value) -> Value:
    g, K, V, N = p.g, c.key_heads, c.value_heads, c.state_size
    keys, values = K * N, V * N
    channels = 2 * keys + values
    made = p.product(
        "delta_in",
        h,
        ("attn_qkv", channels),
        ("attn_gate", values),
        ("ssm_beta", V),
        ("ssm_alpha", V),
    )
    x = g.one(None, Columns(0, channels), made)
    taps = p.take("ssm_conv1d.weight", channels, c.conv_kernel)
    x = g.one("delta_conv", Silu(), g.one(None, CausalConv(), x, weights=[taps]))
    q = g.one("delta_q", L2Norm(c.eps, N**-0.5), g.one(None, Heads(0, K, N), x))
    k = g.one("delta_k", L2Norm(c.eps), g.one(None, Heads(keys, K, N), x))
    v = g.one(None, Heads(2 * keys, V, N), x)
    beta = g.one("delta_beta", Sigmoid(), g.one(None, Columns(channels + values, V), made))
    alpha = g.one(None, Columns(channels + values + V, V), made)
    decay = g.one(
        "delta_decay", Decay(), alpha, weights=[p.take("ssm_dt.bias", V), p.take("ssm_a", V)]
    )
    y = g.one("delta_net", GatedDelta(), q, k, v, beta, decay)
    normed = g.one(None, RmsNorm(c.eps), y, weights=[p.take("ssm_norm.weight", N)])
    z = g.one(None, Heads(channels, V, N), made)
    y = g.one("delta_gated", SiluGate(), z, normed)
    return p.product("attn_out", g.one(None, Columns(0, values), y), ("ssm_out", c.hidden))
