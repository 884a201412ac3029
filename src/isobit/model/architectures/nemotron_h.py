"""Nemotron-H and Nemotron 3: each layer is one of a Mamba-2 scan, attention without positions, a
feed-forward with a squared ReLU, or a mixture of such experts beside a shared one, which the routed
ones may see through two narrow matrices."""

from dataclasses import dataclass, replace

import numpy as np

from isobit.config import Metadata, ModelConfig
from isobit.model.architectures import blocks
from isobit.model.architectures.architecture import Architecture
from isobit.model.architectures.blocks import LayerBuilder
from isobit.model.architectures.checks import check
from isobit.model.architectures.common import common
from isobit.model.architectures.routing import ROUTING_KEYS, Routing, routing
from isobit.model.graph import Builder, Graph, Value
from isobit.model.tensors import Tensors
from isobit.numerics.ops import (
    Add,
    Bias,
    CausalConv,
    Columns,
    Combine,
    Decay,
    GatedDelta,
    Heads,
    Join,
    ReluSquared,
    RmsNorm,
    Scale,
    Silu,
    SiluGate,
)

_SCAN, _ATTENTION, _FEED_FORWARD = range(3)


@dataclass(frozen=True)
class Config(ModelConfig):
    """What a file says besides what every transformer has."""

    kinds: tuple[int, ...]
    """What each layer is."""
    scan_heads: int
    scan_size: int
    """Values of a head vector of the scan."""
    groups: int
    """Of heads of the scan that share what is written to a state and what it is read with."""
    state_size: int
    """Values of either."""
    conv_kernel: int
    routing: Routing
    shared_ffn: int
    """Width of the shared expert."""
    latent: int
    """Width of what experts see; 0: the model's."""


def config(r: Metadata, vocab: int) -> Config:
    """The hyper-parameters. Raises ModelRefused naming the key for what is missing, malformed or
    not implemented."""
    arch = r.text("general.architecture")
    moe = arch.endswith("moe")
    n = r.count(f"{arch}.block_count", 1, 4096)
    heads_key, width_key = f"{arch}.attention.head_count_kv", f"{arch}.feed_forward_length"
    heads, widths = r.each(heads_key, n, 0, 4096), r.each(width_key, n, 0, 1 << 20)
    for key, values in ((heads_key, heads), (width_key, widths)):
        if any(v not in (0, max(values)) for v in values):
            expected = "0 or one and the same number in every layer"
            raise r.refusal(key, expected, list(values))
    eps, usual = (f"{arch}.attention.layer_norm{part}_epsilon" for part in ("", "_rms"))
    made = {heads_key: max(*heads, 1), width_key: max(*widths, 1)}
    if usual not in r.metadata and eps in r.metadata:
        made[usual] = r.number(eps, 1e-30, 1.0)  # type: ignore[assignment]
    as_made = Metadata({**r.metadata, **made}, r.source)
    found = common(as_made, vocab, moe=moe, rope_base=1.0)
    drafts = r.count(f"{arch}.nextn_predict_layers", 0, n - 1, default=0)
    inner = r.count(f"{arch}.ssm.inner_size", 1, 1 << 20)
    scan_heads = r.count(f"{arch}.ssm.time_step_rank", 1, 4096)
    groups = r.count(f"{arch}.ssm.group_count", 1, scan_heads)
    for key, count in (("time_step_rank", scan_heads), ("group_count", groups)):
        if inner % count:
            raise r.refusal(f"{arch}.ssm.{key}", f"a divisor of {inner}", count)
    c = Config(
        **vars(replace(found, n_layers=n - drafts)),
        kinds=tuple(
            _FEED_FORWARD if width else _ATTENTION if head else _SCAN
            for width, head in zip(widths[: n - drafts], heads, strict=False)
        ),
        scan_heads=scan_heads,
        scan_size=inner // scan_heads,
        groups=groups,
        state_size=r.count(f"{arch}.ssm.state_size", 2, 512),
        conv_kernel=r.count(f"{arch}.ssm.conv_kernel", 2, 16),
        routing=routing(r, arch, experts=found.n_experts, default=2) if moe else Routing(),
        shared_ffn=r.count(f"{arch}.expert_shared_feed_forward_length", 1, 1 << 20) if moe else 0,
        latent=r.count(f"{arch}.moe_latent_size", 0, 1 << 20, default=0),
    )
    check(as_made, c, known=ROUTING_KEYS, routed=True)
    return c


def graph(c: ModelConfig, tensors: Tensors) -> Graph:
    """The graph of a file's model. Raises ModelRefused for a missing or misshapen tensor."""
    assert isinstance(c, Config)
    tensors.leave_out_layers(c.n_layers)  # they draft tokens ahead; no token depends on them
    g = Builder(tensors.source)
    x = blocks.embedding(g, c, tensors)
    for i, kind in enumerate(c.kinds):
        with g.layer(i):
            p = LayerBuilder(g, tensors, f"blk.{i}.")
            name = "ffn" if kind == _FEED_FORWARD else "attn"
            h = p.norm(f"{name}_norm", "attn_norm", c.eps, x)
            y = (_scan, _attention, _feed_forward)[kind](p, c, h)
            x = g.one(f"post_{name}_residual", Add(), x, y)
    return blocks.head(g, c, tensors, x)


def _attention(p: LayerBuilder, c: Config, h: Value) -> Value:
    H, G, D = c.n_heads, c.n_kv_heads, c.head_dim
    roles = ("attn_q", H * D), ("attn_k", G * D), ("attn_v", G * D)
    p.split("attn_qkv", *roles)
    qkv = p.biased("qkv_matmul", h, *roles)
    k, v = (p.g.one(None, Heads(at * D, G, D), qkv) for at in (H, H + G))
    halves = (p.g.one(None, Heads(at, H, D // 2, D), qkv) for at in (0, D // 2))
    q = p.g.one("q_heads", Join(), *halves)  # nothing rotates them
    return p.biased("attn_out", blocks.attention(p.g, q, k, v), ("attn_output", c.hidden))


def _scan(p: LayerBuilder, c: Config, h: Value) -> Value:
    g, H, P, G, N = p.g, c.scan_heads, c.scan_size, c.groups, c.state_size
    inner, channels = H * P, H * P + 2 * G * N
    made = p.product("ssm_in", h, ("ssm_in", inner + channels + H))
    x = g.one(None, Columns(inner, channels), made)
    taps = p.take("ssm_conv1d.weight", channels, c.conv_kernel)
    x = g.one(None, CausalConv(), x, weights=[taps])
    if f"{p.at}ssm_conv1d.bias" in p.tensors:
        x = g.one(None, Bias(), x, weights=[p.take("ssm_conv1d.bias", channels)])
    x = g.one("ssm_conv", Silu(), x)
    written, read = (g.one(None, Heads(inner + i * G * N, G, N), x) for i in (0, 1))
    dt = g.one(None, Columns(inner + channels, H), made)
    bias, a = p.take("ssm_dt.bias", H), p.take("ssm_a", H, 1).float32().reshape(-1)
    one, a_ = blocks.vector(f"1 x {H}", np.ones(H)), blocks.vector(f"{p.at}ssm_a", a)
    step = g.one("ssm_step", Decay(), dt, weights=[bias, one])
    decay = g.one("ssm_decay", Decay(), dt, weights=[bias, a_])
    scan = GatedDelta(grouped=True, corrects=False)
    values = g.one(None, Heads(0, H, P), x)
    y = g.one("ssm_scan", scan, read, written, values, step, decay)
    d = p.take("ssm_d", H, 1).float32().reshape(-1)
    past = g.one(
        None,
        Scale(),
        g.one(None, Columns(0, inner), x),
        weights=[blocks.vector(f"{p.at}ssm_d x {P}", d.repeat(P))],
    )
    y = g.one("ssm_skip", Add(), g.one(None, Columns(0, inner), y), past)
    y = g.one("ssm_gated", SiluGate(), g.one(None, Columns(0, inner), made), y)
    size = inner // G
    ones = blocks.vector(f"1 x {size}", np.ones(size))
    y = g.one(None, RmsNorm(c.eps), g.one(None, Heads(0, G, size), y), weights=[ones])
    norm = blocks.vector(f"{p.at}ssm_norm", p.take("ssm_norm.weight", G, size).float32().ravel())
    y = g.one("ssm_norm", Scale(), g.one(None, Columns(0, inner), y), weights=[norm])
    return p.product("attn_out", y, ("ssm_out", c.hidden))


def _feed_forward(p: LayerBuilder, c: Config, h: Value) -> Value:
    return _mixture(p, c, h) if c.is_moe else _dense(p, "ffn", "", c.ffn, h)


def _dense(p: LayerBuilder, name: str, tail: str, width: int, h: Value) -> Value:
    up = p.biased(f"{name}_up", h, (f"ffn_up{tail}", width))
    squared = p.g.one(f"{name}_relu", ReluSquared(), up)
    return p.biased(f"{name}_out", squared, (f"ffn_down{tail}", h.shape.width))


def _mixture(p: LayerBuilder, c: Config, h: Value) -> Value:
    g, seen, width = p.g, h, c.latent or c.hidden
    weights, ids = blocks.route(p, c, h, c.routing, biased=True)
    if c.latent:
        seen = p.product("moe_latent", h, ("ffn_latent_down", c.latent))
    y = p.expert_product("moe_expert_up", seen, ids, "ffn_up_exps", c.n_experts, c.ffn, width)
    y = g.one("moe_expert_relu", ReluSquared(), y)
    y = p.expert_product("moe_expert_out", y, ids, "ffn_down_exps", c.n_experts, width, c.ffn)
    y = g.one("moe_ffn_out", Combine(), weights, y)
    y = blocks.scaled(g, "moe_ffn_scaled", y, c.routing.scale)
    if c.latent:
        y = p.product("moe_latent_out", y, ("ffn_latent_up", c.hidden))
    return g.one("ffn_with_shared", Add(), y, _dense(p, "shared_expert", "_shexp", c.shared_ffn, h))


ARCHITECTURES = dict.fromkeys(("nemotron_h", "nemotron_h_moe"), Architecture(config, graph))
"""By the name in ``general.architecture``."""
