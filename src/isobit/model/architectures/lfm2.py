"""LFM2 and LFM2-MoE: short convolutions between two gates in most layers, attention with a norm of
each head vector in the others; SwiGLU, or after the first layers a mixture of SwiGLU experts that
sigmoids and a bias choose."""

from dataclasses import dataclass

from isobit.config import Metadata, ModelConfig
from isobit.gguf.header import Value as Entry
from isobit.model.architectures import blocks
from isobit.model.architectures.architecture import Architecture
from isobit.model.architectures.blocks import LayerBuilder
from isobit.model.architectures.checks import check
from isobit.model.architectures.common import common
from isobit.model.architectures.qwen3 import attention
from isobit.model.architectures.routing import ROUTING_KEYS, Routing, routing
from isobit.model.architectures.scaling import huggingface_scaling, rope_scaling
from isobit.model.graph import Graph, Value
from isobit.model.huggingface import (
    DENSE_KEYS,
    EXPERT_KEYS,
    KEYS,
    Drop,
    HuggingFace,
    Share,
    Source,
    Sources,
    weights,
)
from isobit.model.tensors import Tensors
from isobit.numerics import RopeTable
from isobit.numerics.ops import CausalConv, Columns, Multiply


@dataclass(frozen=True)
class Config(ModelConfig):
    """What a file says besides what every transformer has."""

    rope: RopeTable
    convolves: tuple[bool, ...]
    """Whether a layer is a short convolution, for each; else it is attention."""
    taps: int
    routing: Routing
    dense: int
    """Layers before the first with experts."""
    dense_ffn: int


def config(r: Metadata, vocab: int) -> Config:
    """The hyper-parameters. Raises ModelRefused naming the key for what is missing, malformed or
    not implemented."""
    arch = r.text("general.architecture")
    moe = arch == "lfm2moe"
    n, key = r.count(f"{arch}.block_count", 1, 4096), f"{arch}.attention.head_count_kv"
    heads = r.each(key, n, 0, 4096)  # 0 in layers without attention
    most = max(heads)
    if not most or any(h not in (0, most) for h in heads):
        raise r.refusal(key, "0 or one and the same number in every layer", list(heads))
    found = common(Metadata({**r.metadata, key: most}, r.source), vocab, moe=moe)
    dense = r.count(f"{arch}.leading_dense_block_count", 0, n, default=0) if moe else n
    c = Config(
        **vars(found),
        rope=rope_scaling(r, arch, RopeTable(found.head_dim, found.rope_base)),
        convolves=tuple(not h for h in heads),
        taps=r.count(f"{arch}.shortconv.l_cache", 2, 16),
        routing=routing(r, arch, experts=found.n_experts) if moe else Routing(),
        dense=dense,
        dense_ffn=r.count(f"{arch}.feed_forward_length", 1, 1 << 20) if dense else 0,
    )
    check(r, c, known=ROUTING_KEYS, scaled=True, routed=True)
    r.only(f"{arch}.rope.dimension_count", c.head_dim)
    r.only(f"{arch}.expert_weights_norm", True)
    return c


def graph(c: ModelConfig, tensors: Tensors) -> Graph:
    """The graph of a file's model. Raises ModelRefused for a missing or misshapen tensor."""
    assert isinstance(c, Config)
    # What its writers call the last norm, though it is not the embedding's.
    tensors.split("token_embd_norm.weight", [("output_norm.weight", c.hidden)])

    def mixer(p: LayerBuilder, i: int, h: Value) -> Value:
        return _convolution(p, c, h) if c.convolves[i] else attention(p, c, c.rope, h)

    def feed_forward(p: LayerBuilder, i: int, h: Value) -> Value:
        if i < c.dense:
            return blocks.dense(p, "ffn", "", c.dense_ffn, h)
        return blocks.experts(p, c, h, c.routing, biased=f"{p.at}exp_probs_b.bias" in p.tensors)

    return blocks.transformer(c, tensors, mixer, feed_forward)


def _convolution(p: LayerBuilder, c: Config, h: Value) -> Value:
    """What is convolved is gated before and after."""
    g, n = p.g, c.hidden
    made = p.product("conv_in", h, ("shortconv.in_proj", 3 * n))
    before, behind, x = (g.one(None, Columns(i * n, n), made) for i in range(3))
    taps = p.take("shortconv.conv.weight", n, c.taps)
    x = g.one("conv_gated", Multiply(), before, x)
    x = g.one("conv", CausalConv(), x, weights=[taps])
    return p.product(
        "attn_out", g.one("conv_out", Multiply(), behind, x), ("shortconv.out_proj", n)
    )


def _experts(role: str, theirs: str, share: int) -> tuple[Source, ...]:
    stacked = "gate_up_proj" if role != "down" else "down_proj"
    return (
        Source(f"feed_forward.experts.{{e}}.{theirs}.weight"),
        Source(f"feed_forward.experts.{stacked}", (Share(share, 2),) if role != "down" else ()),
    )


_LAYER: Sources = {
    **weights(
        attn_norm="operator_norm",
        attn_q="self_attn.q_proj",
        attn_k="self_attn.k_proj",
        attn_v="self_attn.v_proj",
        attn_output="self_attn.out_proj",
        attn_q_norm="self_attn.q_layernorm",
        attn_k_norm="self_attn.k_layernorm",
        ffn_norm="ffn_norm",
        ffn_gate="feed_forward.w1",
        ffn_up="feed_forward.w3",
        ffn_down="feed_forward.w2",
    ),
    "shortconv.in_proj.weight": Source("conv.in_proj.weight"),
    "shortconv.conv.weight": Source("conv.conv.weight", (Drop(1),), float32=True),
    "shortconv.out_proj.weight": Source("conv.out_proj.weight"),
}
_EXPERTS: Sources = {
    "ffn_gate_inp.weight": Source("feed_forward.gate.weight", float32=True),
    "exp_probs_b.bias": Source("feed_forward.expert_bias"),
    "ffn_gate_exps.weight": _experts("gate", "w1", 0),
    "ffn_up_exps.weight": _experts("up", "w3", 1),
    "ffn_down_exps.weight": _experts("down", "w2", 0),
}
_OUTSIDE: Sources = weights(
    token_embd="model.embed_tokens", token_embd_norm="model.embedding_norm", output="lm_head"
)


def _metadata(c: Metadata) -> dict[str, Entry]:
    """What config.json says in other words than a file's metadata."""
    layers = c.count("num_hidden_layers", 1, 4096)
    kinds, known = c.metadata.get("layer_types"), ("conv", "full_attention")
    if kinds is None:
        attends = c.metadata.get("full_attn_idxs")
        if not isinstance(attends, list):
            raise c.refusal("layer_types", f"one of {', '.join(known)} for each layer", None)
        kinds = [known[i in attends] for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or any(k not in known for k in kinds):
        raise c.refusal("layer_types", f"one of {', '.join(known)} for each layer", kinds)
    heads = c.count("num_key_value_heads", 1, 4096)
    found: dict[str, Entry] = {
        **huggingface_scaling(c),
        "attention.head_count_kv": [heads * (k == "full_attention") for k in kinds],
    }
    return found


def _dense(c: Metadata) -> dict[str, Entry]:
    """The width of the feed-forward is two thirds of what is said, rounded up."""
    name = "block_ff_dim" if "block_ff_dim" in c.metadata else "intermediate_size"
    width = c.count(name, 1, 1 << 20)
    if c.flag("block_auto_adjust_ff_dim", default=True):
        multiple = c.count("block_multiple_of", 1, 1 << 20, default=256)
        width = int(c.number("block_ffn_dim_multiplier", 0.0, 1e3, default=1.0) * (2 * width // 3))
        width = -(-width // multiple) * multiple
    return {**_metadata(c), "feed_forward_length": width}


def _mixture(c: Metadata) -> dict[str, Entry]:
    return {**_metadata(c), "expert_gating_func": 2}


_KEYS = {
    **{key: name for key, name in KEYS.items() if key != "attention.head_count_kv"},
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "shortconv.l_cache": "conv_L_cache",
}
_ONLY = {"conv_bias": False}
HUGGING_FACE = {
    "lfm2": HuggingFace(
        "lfm2", "Lfm2ForCausalLM", _KEYS, lambda _: _LAYER, _OUTSIDE, _ONLY, _dense
    ),
    "lfm2_moe": HuggingFace(
        "lfm2moe",
        "Lfm2MoeForCausalLM",
        _KEYS
        | DENSE_KEYS
        | EXPERT_KEYS
        | {
            "leading_dense_block_count": "num_dense_layers",
            "expert_weights_scale": "routed_scaling_factor",
        },
        lambda _: {**_LAYER, **_EXPERTS},
        _OUTSIDE,
        _ONLY | {"norm_topk_prob": True},
        _mixture,
    ),
}
"""By config.json's ``model_type``."""
ARCHITECTURES = dict.fromkeys(("lfm2", "lfm2moe"), Architecture(config, graph))
"""By the name in ``general.architecture``."""
