"""Gemma 3 and Gemma 4: attention over a sliding window in most layers, over all tokens in the
others, with a norm of each head vector; GeGLU, beside a mixture of GeGLU experts or alone; norms
before and after both."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from isobit.config import MOST_POSITIONS, Metadata, ModelConfig
from isobit.model.architectures import blocks
from isobit.model.architectures.architecture import Architecture
from isobit.model.architectures.blocks import LayerBuilder
from isobit.model.architectures.checks import check
from isobit.model.architectures.common import common
from isobit.model.architectures.scaling import rope_scaling
from isobit.model.graph import Builder, Graph, Value
from isobit.model.huggingface import (
    ADD_ONE,
    ATTENTION,
    FEED_FORWARD,
    OUTSIDE,
    HuggingFace,
    ModuleValue,
    Source,
    Sources,
    rope_parameters,
    weights,
)
from isobit.model.tensors import Tensors
from isobit.numerics import RopeTable
from isobit.numerics.ops import Add, Combine, GeluGate, Heads, MatMul, RmsNorm, TopK


@dataclass(frozen=True)
class Layer:
    """What differs from layer to layer."""

    window: int | None
    """Positions that attention sees; None: all."""
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """Width of the dense feed-forward."""
    rope: RopeTable


@dataclass(frozen=True)
class Config(ModelConfig):
    """What a file says besides what every transformer has."""

    layers: tuple[Layer, ...]
    attention_scale: float
    softcap: float
    """Of the logits; 0: none."""

    @property
    def fourth(self) -> bool:
        """Whether it is Gemma 4."""
        return self.architecture == "gemma4"


def config(r: Metadata, vocab: int) -> Config:
    """The hyper-parameters. Raises ModelRefused naming the key for what is missing, malformed or
    not implemented."""
    arch = r.text("general.architecture")
    fourth = arch == "gemma4"
    moe = fourth and f"{arch}.expert_count" in r.metadata
    found = common(r, vocab, moe=moe, rope_base=None if fourth else 1e6, by_layer=fourth)
    n, size = found.n_layers, found.head_dim
    base = r.number(f"{arch}.rope.freq_base_swa", 1.0, 1e12, default=10000.0)
    local, local_size = RopeTable(size, base), size
    if fourth:
        local_size = r.count(f"{arch}.attention.key_length_swa", 2, 512)
        r.only(f"{arch}.attention.value_length_swa", local_size)
        r.only(f"{arch}.rope.dimension_count_swa", local_size)
        local = RopeTable(local_size, base)
        for key in ("attention.shared_kv_layers", "embedding_length_per_layer_input"):
            r.only(f"{arch}.{key}", 0)
    r.only(f"{arch}.rope.dimension_count", size)
    table = rope_scaling(r, arch, RopeTable(size, found.rope_base))
    window = r.count(f"{arch}.attention.sliding_window", 1, MOST_POSITIONS)
    heads, kv_heads = (
        r.each(f"{arch}.attention.{key}", n, 1, 4096, default=found.n_heads)
        for key in ("head_count", "head_count_kv")
    )
    widths = r.each(f"{arch}.feed_forward_length", n, 1, 1 << 20)
    layers = tuple(
        Layer(window, heads[i], kv_heads[i], local_size, widths[i], local)
        if slides
        else Layer(None, heads[i], kv_heads[i], size, widths[i], table)
        for i, slides in enumerate(_sliding(r, arch, n))
    )
    # The 27B model, of 62 layers, has its scale by the width of a head that it would have.
    usual = found.hidden // found.n_heads if n == 62 else size
    c = Config(
        **vars(found),
        layers=layers,
        attention_scale=1.0 if fourth else 1 / math.sqrt(usual),
        softcap=r.number(f"{arch}.final_logit_softcapping", 0.0, 1e6, default=0.0),
    )
    pattern = f"{arch}.attention.sliding_window_pattern"
    rest = Metadata({k: v for k, v in r.metadata.items() if k != pattern}, r.source)
    known = {"final_logit_softcapping", "rope.freq_base_swa", "rope.dimension_count_swa"}
    check(rest, c, known=known, scaled=True, windows=True)
    for i, layer in enumerate(layers):
        if layer.heads % layer.kv_heads:
            expected = f"a divisor of {layer.heads} in layer {i}"
            raise r.refusal(f"{arch}.attention.head_count_kv", expected, layer.kv_heads)
    r.only(f"{arch}.expert_weights_norm", True)
    return replace(c, normalise_experts=True)


def _sliding(r: Metadata, arch: str, layers: int) -> Sequence[bool]:
    """Which layers have the window: by list, or all but every n-th."""
    key = f"{arch}.attention.sliding_window_pattern"
    said = r.metadata.get(key)
    if isinstance(said, list) and len(said) == layers and set(map(type, said)) <= {bool}:
        return [s is True for s in said]
    if isinstance(said, list) or arch == "gemma4":
        raise r.refusal(key, f"true or false for each of {layers} layers", said)
    n = r.count(key, 1, 4096, default=6)
    return [(i + 1) % n != 0 for i in range(layers)]


def graph(c: ModelConfig, tensors: Tensors) -> Graph:
    """The graph of a file's model. Raises ModelRefused for a missing or misshapen tensor."""
    assert isinstance(c, Config)
    g, layers = Builder(tensors.source), c.layers
    if c.fourth and any(layer.window is None for layer in layers):
        divisors = tensors.take("rope_freqs.weight", c.head_dim // 2).float32()
        factors = tuple(divisors.tolist())
        layers = tuple(
            layer if layer.window else replace(layer, rope=replace(layer.rope, factors=factors))
            for layer in layers
        )
    x = blocks.embedding(g, c, tensors, float(np.sqrt(np.float32(c.hidden))))
    for i, layer in enumerate(layers):
        with g.layer(i):
            p = LayerBuilder(g, tensors, f"blk.{i}.")
            h = _attention(p, c, layer, p.norm("attn_norm", "attn_norm", c.eps, x))
            h = p.norm("post_attn_norm", "post_attention_norm", c.eps, h)
            x = g.one("post_attn_residual", Add(), x, h)
            h = _dense(p, layer.ffn, p.norm("ffn_norm", "ffn_norm", c.eps, x))
            if c.is_moe:
                h = p.norm("ffn_post_norm_1", "post_ffw_norm_1", c.eps, h)
                h = g.one("ffn_with_experts", Add(), h, _experts(p, c, x))
            h = p.norm("ffn_post_norm", "post_ffw_norm", c.eps, h)
            scales = f"{p.at}layer_output_scale.weight" in tensors
            x = g.one("ffn_added" if scales else "post_ffn_residual", Add(), x, h)
            if scales:
                (scale,) = p.take("layer_output_scale.weight", 1).float32().tolist()
                x = blocks.scaled(g, "post_ffn_residual", x, scale)
    return blocks.head(g, c, tensors, x, softcap=c.softcap)


def _attention(p: LayerBuilder, c: Config, layer: Layer, h: Value) -> Value:
    g, H, G, D = p.g, layer.heads, layer.kv_heads, layer.head_dim
    roles = [("attn_q", H * D), ("attn_k", G * D), ("attn_v", G * D)]
    if c.fourth and f"{p.at}attn_v.weight" not in p.tensors:
        roles.pop()  # the values are the keys, as they are before their norm
    qkv = p.product("qkv_matmul", h, *roles)
    heads, keys = Heads(0, H, D), Heads(H * D, G, D)
    q = blocks.rotated_heads(p, "q_post_rope", "attn_q_norm", c.eps, layer.rope, qkv, heads)
    k = blocks.rotated_heads(p, "k_post_rope", "attn_k_norm", c.eps, layer.rope, qkv, keys)
    v = g.one(None, Heads((H + G * (len(roles) - 2)) * D, G, D), qkv)
    if c.fourth:
        v = g.one("v_norm", RmsNorm(c.eps), v, weights=[blocks.vector(f"1 x {D}", np.ones(D))])
    y = blocks.attention(g, q, k, v, window=layer.window, scale=c.attention_scale)
    return p.product("attn_out", y, ("attn_output", c.hidden))


def _dense(p: LayerBuilder, width: int, h: Value) -> Value:
    gate = p.product("ffn_gate", h, ("ffn_gate", width))
    up = p.product("ffn_up", h, ("ffn_up", width))
    return p.product(
        "ffn_out", p.g.one("ffn_geglu", GeluGate(), gate, up), ("ffn_down", h.shape.width)
    )


def _experts(p: LayerBuilder, c: Config, x: Value) -> Value:
    """The router has a norm and a scale of its own before its matrix."""
    g, E, n = p.g, c.n_experts, c.hidden
    scale = p.take("ffn_gate_inp.scale", n).float32() * np.float32(1 / math.sqrt(n))
    weight = blocks.vector(f"{p.at}ffn_gate_inp.scale", scale)
    z = g.one("moe_router_norm", RmsNorm(c.eps), x, weights=[weight])
    z = g.one("moe_router_logits", MatMul(), z, weights=[p.matrix("ffn_gate_inp", E, n)])
    names = "moe_router", "moe_router_indices"
    weights, ids = g.add(names, TopK(c.n_experts_used, c.normalise_experts), z)
    h = p.norm("ffn_pre_norm_2", "pre_ffw_norm_2", c.eps, x)
    gate, up = blocks.expert_gate_up(p, c, h, ids)
    y = g.one("moe_expert_geglu", GeluGate(), gate, up)
    y = p.expert_product("moe_expert_out", y, ids, "ffn_down_exps", E, n, c.ffn)
    y = g.one("moe_ffn_out", Combine(), weights, y)
    return p.norm("ffn_post_norm_2", "post_ffw_norm_2", c.eps, y)


def _settings(c: ModelConfig, names: Collection[str]) -> dict[str, Any]:
    assert isinstance(c, Config)
    kinds = {layer.window is None: layer for layer in c.layers}
    local, whole = kinds.get(False, c.layers[0]), kinds.get(True, c.layers[0])
    found: dict[str, Any] = {
        "intermediate_size": c.layers[0].ffn,
        "sliding_window": local.window,
        "layer_types": [_TYPES[layer.window is None] for layer in c.layers],
        "final_logit_softcapping": c.softcap or None,
    }
    full = rope_parameters(whole.rope, whole.head_dim)
    if c.fourth:
        full |= {"rope_type": "proportional", "partial_rotary_factor": 0.25}
        at = next((i for i, layer in enumerate(c.layers) if layer.window is None), 0)
        found |= {
            "num_attention_heads": local.heads,
            "num_key_value_heads": local.kv_heads,
            "num_global_key_value_heads": whole.kv_heads,
            "head_dim": local.head_dim,
            "global_head_dim": whole.head_dim,
            "attention_k_eq_v": f"blk.{at}.attn_v.weight" not in names,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "enable_moe_block": c.is_moe,
            "top_k_experts": c.n_experts_used,
        }
    else:
        found["query_pre_attn_scalar"] = round(c.attention_scale**-2)
    ropes = rope_parameters(local.rope, local.head_dim), full
    return found | {"rope_parameters": dict(zip(_TYPES, ropes, strict=True))}


_TYPES = ("sliding_attention", "full_attention")
_NORMS = {
    "attn_norm": "input_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_THIRD: Sources = {
    **ATTENTION,
    **FEED_FORWARD,
    **{f"{r}.weight": Source(f"{n}.weight", change=ADD_ONE) for r, n in _NORMS.items()},
}
_FOURTH: Sources = {
    **ATTENTION,
    **FEED_FORWARD,
    **weights(
        **_NORMS,
        post_ffw_norm_1="post_feedforward_layernorm_1",
        pre_ffw_norm_2="pre_feedforward_layernorm_2",
        post_ffw_norm_2="post_feedforward_layernorm_2",
        ffn_gate_inp="router.proj",
    ),
    "layer_output_scale.weight": Source("layer_scalar"),
    "ffn_gate_inp.scale": Source("router.scale"),
    "ffn_down_exps.scale": Source("router.per_expert_scale"),
    "ffn_down_exps.weight": Source("experts.down_proj"),
}
HUGGING_FACE = {
    "gemma3_text": HuggingFace(
        "gemma3",
        "Gemma3ForCausalLM",
        {},
        lambda _: _THIRD,
        {**OUTSIDE, "output_norm.weight": Source("model.norm.weight", change=ADD_ONE)},
        settings=_settings,
        checkpoint=False,
    ),
    "gemma4_text": HuggingFace(
        "gemma4",
        "Gemma4ForCausalLM",
        {},
        lambda _: _FOURTH,
        settings=_settings,
        places=lambda _: {
            "v_norm": ModuleValue("self_attn.v_norm"),
            "moe_router_indices": ModuleValue("router", index=2),
        },
        experts="experts",
        checkpoint=False,
    ),
}
"""By config.json's ``model_type``."""
ARCHITECTURES = dict.fromkeys(("gemma3", "gemma4"), Architecture(config, graph))
"""By the name in ``general.architecture``."""
