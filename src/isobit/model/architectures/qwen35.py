"""Qwen3.5, Qwen3.5-MoE and Qwen3-Next: three layers of four are gated delta nets, the fourth is
attention with an output gate; a mixture of experts beside a gated shared expert, or a dense
feed-forward."""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from isobit.config import Metadata, ModelConfig
from isobit.errors import ModelRefused
from isobit.gguf.header import Value as Entry
from isobit.model.architectures import blocks
from isobit.model.architectures.architecture import Architecture
from isobit.model.architectures.blocks import LayerBuilder
from isobit.model.architectures.checks import check
from isobit.model.architectures.common import common
from isobit.model.graph import Builder, Graph, Value
from isobit.model.huggingface import (
    ADD_ONE,
    ATTENTION,
    DENSE_KEYS,
    EXPERT_KEYS,
    EXPERTS,
    FEED_FORWARD,
    KEYS,
    MINUS_EXP,
    MIXTURE,
    ONLY,
    OUTSIDE,
    SHARED_EXPERT,
    Drop,
    HuggingFace,
    ModuleValue,
    Pick,
    Reorder,
    Source,
    Sources,
    weights,
)
from isobit.model.tensors import Tensors
from isobit.numerics import RopeTable
from isobit.numerics.ops import (
    Add,
    CausalConv,
    Columns,
    Decay,
    Embedding,
    GatedDelta,
    Heads,
    L2Norm,
    MatMul,
    Receive,
    RmsNorm,
    SelectRows,
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
    """Values of a head vector that RoPE rotates."""
    key_heads: int
    value_heads: int
    """Of the delta net."""
    state_size: int
    """Values of its head vectors."""
    conv_kernel: int
    shared_ffn: int
    """Width of the shared expert."""
    drafts: int = 0
    """Draft blocks behind the layers."""


def config(r: Metadata, vocab: int) -> Config:
    """The hyper-parameters. Raises ModelRefused naming the key for what is missing, malformed or
    not implemented."""
    arch = r.text("general.architecture")
    moe = arch != "qwen35"
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
        drafts=drafts,
    )
    # The sections are of images; a text has one position everywhere.
    check(r, c, known={"rope.dimension_sections"})
    if value_heads % c.key_heads:
        raise r.refusal(f"{arch}.ssm.group_count", f"a divisor of {value_heads}", c.key_heads)
    r.only(f"{arch}.expert_weights_norm", True)
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


def draft(c: ModelConfig, tensors: Tensors) -> Graph:
    """The graph of the first draft block, whose logits are of the token after the next.

    The batch has at each position the token that follows it, and brings the model's ``final_norm``
    there (``Batch.received``); the block's own ``final_norm`` stands for that of the next position.
    Raises ModelRefused for a file without the block, or for a missing or misshapen tensor.
    """
    assert isinstance(c, Config)
    arch, role = c.architecture, f"blk.{c.n_layers}.nextn"
    if not c.drafts:
        expected = f"{tensors.source}: {arch}.nextn_predict_layers: expected 1 or more"
        raise ModelRefused(f"{expected}, got none (the file has no draft block)")

    def own(name: str, usual: str) -> str:
        return f"{role}.{name}.weight" if f"{role}.{name}.weight" in tensors else f"{usual}.weight"

    g, n = Builder(tensors.source), c.hidden
    received = g.one("received", Receive(n))
    table = tensors.take(own("embed_tokens", "token_embd"), c.vocab, n)
    embedded = g.one("embedding", Embedding(), g.tokens, weights=[table])
    # The matrix takes both one after the other; here it is two, whose products are added.
    whole, parts = tensors.take(f"{role}.eh_proj.weight", n, 2 * n), []
    if n % whole.format.block_size:
        expected = f"{whole.name}: expected halves of whole blocks of {whole.format.name}"
        raise ModelRefused(f"{tensors.source}: {expected}, got {n} columns each")
    for x, name, first in ((embedded, "enorm", 0), (received, "hnorm", n)):
        weight = tensors.take(f"{role}.{name}.weight", n)
        normed = g.one(f"draft_{name}", RmsNorm(c.eps), x, weights=[weight])
        columns = whole.columns(first, n)
        parts.append(g.one(f"draft_{name}_product", MatMul(), normed, weights=[columns]))
    x = g.one("draft_in", Add(), *parts)
    with g.layer(0):
        x = blocks.layer(
            LayerBuilder(g, tensors, f"blk.{c.n_layers}."),
            0,
            c,
            x,
            lambda p, _, h: _attention(p, c, h),
            lambda p, _, h: _feed_forward(p, c, h),
            ffn_norm="post_attention_norm",
        )
    norm = tensors.take(own("shared_head_norm", "output_norm"), n)
    x = g.one("final_norm", RmsNorm(c.eps), x, weights=[norm])
    usual = "output" if "output.weight" in tensors else "token_embd"
    matrix = tensors.take(own("shared_head_head", usual), c.vocab, n)
    wanted = g.one(None, SelectRows(), x, g.logit_rows)
    return g.graph(g.one("lm_head", MatMul(), wanted, weights=[matrix]))


def _feed_forward(p: LayerBuilder, c: Config, h: Value) -> Value:
    y = blocks.feed_forward(p, c, h)
    return blocks.shared_expert(p, c.shared_ffn, h, y) if c.is_moe else y


def _attention(p: LayerBuilder, c: Config, h: Value) -> Value:
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


def _delta_net(p: LayerBuilder, c: Config, h: Value) -> Value:
    g, K, V, N = p.g, c.key_heads, c.value_heads, c.state_size
    keys, values = K * N, V * N
    channels = 2 * keys + values
    first = ("attn_qkv", channels), ("attn_gate", values)
    grouped = c.architecture == "qwen3next"
    if grouped:  # one matrix has beta of each key head's value heads, then alpha of them
        both = p.matrix("ssm_ba", 2 * V, c.hidden)
        rows = np.arange(2 * V).reshape(K, 2, V // K).swapaxes(0, 1).reshape(2, V)
        matrices = [p.matrix(role, n, c.hidden) for role, n in first]
        matrices += [both.row_order(order) for order in rows]
        made = g.one("delta_in", MatMul(), h, weights=matrices)
    else:
        made = p.product("delta_in", h, *first, ("ssm_beta", V), ("ssm_alpha", V))
    x = g.one(None, Columns(0, channels), made)
    taps = p.take("ssm_conv1d.weight", channels, c.conv_kernel)
    x = g.one("delta_conv", Silu(), g.one(None, CausalConv(), x, weights=[taps]))
    q = g.one("delta_q", L2Norm(c.eps, 1 / math.sqrt(N)), g.one(None, Heads(0, K, N), x))
    k = g.one("delta_k", L2Norm(c.eps), g.one(None, Heads(keys, K, N), x))
    v = g.one(None, Heads(2 * keys, V, N), x)
    beta = g.one("delta_beta", Sigmoid(), g.one(None, Columns(channels + values, V), made))
    alpha = g.one(None, Columns(channels + values + V, V), made)
    decay = g.one(
        "delta_decay", Decay(), alpha, weights=[p.take("ssm_dt.bias", V), p.take("ssm_a", V)]
    )
    y = g.one("delta_net", GatedDelta(grouped), q, k, v, beta, decay)
    normed = g.one(None, RmsNorm(c.eps), y, weights=[p.take("ssm_norm.weight", N)])
    z = g.one(None, Heads(channels, V, N), made)
    y = g.one("delta_gated", SiluGate(), z, normed)
    return p.product("attn_out", g.one(None, Columns(0, values), y), ("ssm_out", c.hidden))


def _delta_heads(c: Metadata) -> tuple[int, int, int]:
    """Key heads, value heads for each, values of a head vector, from config.json."""
    values = c.count("linear_num_value_heads", 1, 4096)
    keys = c.count("linear_num_key_heads", 1, values)
    if values % keys:
        raise c.refusal("linear_num_value_heads", f"a multiple of {keys}", values)
    return keys, values // keys, c.count("linear_value_head_dim", 2, 512)


def _layer(c: Metadata) -> Sources:
    """GGUF's delta net has value heads in another order: the heads that share key head 0 do not
    come one after the other, but the first of every key head, then the second of every key head,
    and so on."""
    keys, shared, size = _delta_heads(c)
    by_head = Reorder((keys, shared), (1, 0))
    by_value = Reorder((keys, shared, size), (1, 0, 2))
    after_keys = Reorder((keys, shared, size), (1, 0, 2), first=2 * keys * size)
    columns = Reorder((keys, shared, size), (1, 0, 2), axis=1)
    norms = {
        "attn_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
    }
    return {
        **ATTENTION,
        **{f"{role}.weight": _norm(name) for role, name in norms.items()},
        "attn_qkv.weight": Source("linear_attn.in_proj_qkv.weight", (after_keys,)),
        "attn_gate.weight": Source("linear_attn.in_proj_z.weight", (by_value,)),
        "ssm_beta.weight": Source("linear_attn.in_proj_b.weight", (by_head,)),
        "ssm_alpha.weight": Source("linear_attn.in_proj_a.weight", (by_head,)),
        "ssm_conv1d.weight": Source(
            "linear_attn.conv1d.weight", (Drop(1), after_keys), float32=True
        ),
        "ssm_dt.bias": Source("linear_attn.dt_bias", (by_head,)),
        "ssm_a": Source("linear_attn.A_log", (by_head,), float32=True, change=MINUS_EXP),
        "ssm_norm.weight": Source("linear_attn.norm.weight"),
        "ssm_out.weight": Source("linear_attn.out_proj.weight", (columns,)),
    }


def _norm(name: str) -> Source:
    return Source(f"{name}.weight", float32=True, change=ADD_ONE)


def _metadata(c: Metadata) -> dict[str, Entry]:
    """What config.json says in other words than a file's metadata."""
    keys, shared, size = _delta_heads(c)
    c.only("linear_key_head_dim", size)
    said = c.metadata.get("mrope_section")
    sections: list[Entry] = [s for s in said if type(s) is int] if isinstance(said, list) else []
    layers = c.count("num_hidden_layers", 1, 4096)
    interval = c.count("full_attention_interval", 1, 4096, default=4)
    known = ("linear_attention", "full_attention")
    kinds = c.metadata.get("layer_types")
    if kinds is None:
        kinds = [known[(i + 1) % interval == 0] for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or any(k not in known for k in kinds):
        raise c.refusal("layer_types", f"one of {', '.join(known)} for each layer", kinds)
    heads = c.count("num_attention_heads", 1, 4096)
    head_dim = c.count("head_dim", 2, 512, default=c.count("hidden_size", 1, 1 << 20) // heads)
    return {
        "rope.dimension_count": int(head_dim * c.number("partial_rotary_factor", 0.0, 1.0)),
        "rope.dimension_sections": [*sections, 0, 0, 0, 0][:4],
        "ssm.conv_kernel": c.count("linear_conv_kernel_dim", 2, 16),
        "ssm.state_size": size,
        "ssm.group_count": keys,
        "ssm.time_step_rank": keys * shared,
        "ssm.inner_size": keys * shared * size,
        "attention.recurrent_layers": [k == known[0] for k in kinds],
        "full_attention_interval": interval,
    }


def _settings(c: ModelConfig, _: Collection[str]) -> dict[str, Any]:
    """What transformers calls the delta nets."""
    assert isinstance(c, Config)
    return {
        "linear_num_key_heads": c.key_heads,
        "linear_num_value_heads": c.value_heads,
        "linear_key_head_dim": c.state_size,
        "linear_value_head_dim": c.state_size,
        "linear_conv_kernel_dim": c.conv_kernel,
        "layer_types": [("full_attention", "linear_attention")[r] for r in c.recurrent],
        "shared_expert_intermediate_size": c.shared_ffn,
    }


def _places(c: Metadata) -> dict[str, ModuleValue | None]:
    """The norm of what the delta rule gives takes head by head, in transformers' order of them."""
    keys, shared, size = _delta_heads(c)
    by_value = Reorder((keys, shared, size), (1, 0, 2), axis=-1)
    return {**MIXTURE, "delta_net": ModuleValue("linear_attn.norm", given=True, moves=(by_value,))}


_ONLY = ONLY | {"attn_output_gate": True}
_OUTSIDE: Sources = {**OUTSIDE, "output_norm.weight": _norm("model.norm")}
_DENSE = HuggingFace(
    "qwen35",
    "Qwen3_5ForCausalLM",
    KEYS | DENSE_KEYS,
    lambda c: {**_layer(c), **FEED_FORWARD},
    _OUTSIDE,
    _ONLY,
    _metadata,
    settings=_settings,
    places=_places,
)
_MIXTURE = HuggingFace(
    "qwen35moe",
    "Qwen3_5MoeForCausalLM",
    KEYS | EXPERT_KEYS | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
    lambda c: {**_layer(c), **EXPERTS, **SHARED_EXPERT},
    _OUTSIDE,
    _ONLY,
    _metadata,
    settings=_settings,
    places=_places,
)


def _next(c: Metadata) -> Sources:
    """One matrix has of each key head q, k, then v and the gate of its value heads."""
    keys, shared, size = _delta_heads(c)
    rows = np.arange(keys * (2 + 2 * shared) * size).reshape(keys, -1)
    q, k, v, z = np.split(rows, np.cumsum([1, 1, shared]) * size, axis=1)
    qkv = np.concatenate([x.reshape(-1) for x in (q, k, v)])
    layer = {role: s for role, s in _layer(c).items() if "ssm_alpha" not in role}
    for role, order in (("attn_qkv", qkv), ("attn_gate", z.reshape(-1))):
        moves = (Pick(tuple(order.tolist())),)
        layer[f"{role}.weight"] = Source("linear_attn.in_proj_qkvz.weight", moves)
    del layer["ssm_beta.weight"]
    return {
        **layer,
        **EXPERTS,
        **SHARED_EXPERT,
        **weights(ssm_ba="linear_attn.in_proj_ba", ssm_out="linear_attn.out_proj"),
        "ssm_conv1d.weight": Source("linear_attn.conv1d.weight", (Drop(1),), float32=True),
        "ssm_dt.bias": Source("linear_attn.dt_bias"),
        "ssm_a": Source("linear_attn.A_log", float32=True, change=MINUS_EXP),
    }


_NEXT = HuggingFace(
    "qwen3next",
    "Qwen3NextForCausalLM",
    {},
    _next,
    _OUTSIDE,
    settings=_settings,
    checkpoint=False,
)
HUGGING_FACE = {
    "qwen3_next": _NEXT,
    "qwen3_5": _DENSE,
    "qwen3_5_text": _DENSE,
    "qwen3_5_moe": _MIXTURE,
    "qwen3_5_moe_text": _MIXTURE,
}
"""By config.json's ``model_type``."""
ARCHITECTURES = dict.fromkeys(
    ("qwen3next", "qwen35", "qwen35moe"), Architecture(config, graph, draft)
)
"""By the name in ``general.architecture``."""
