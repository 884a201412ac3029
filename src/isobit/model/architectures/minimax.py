"""MiniMax-M2: attention with a norm of all query heads together and one of all key heads, of whose
head vectors RoPE rotates a part; a mixture of experts chosen by sigmoids and a bias."""

from dataclasses import dataclass

from isobit.config import Metadata, ModelConfig
from isobit.gguf.header import Value as Entry
from isobit.model.architectures import blocks
from isobit.model.architectures.architecture import Architecture
from isobit.model.architectures.checks import check
from isobit.model.architectures.common import common
from isobit.model.architectures.llama import MIXTRAL
from isobit.model.architectures.olmoe import attention
from isobit.model.architectures.routing import ROUTING_KEYS, Routing, routing
from isobit.model.architectures.scaling import huggingface_scaling, rope_scaling
from isobit.model.graph import Graph
from isobit.model.huggingface import (
    ATTENTION,
    EXPERT_KEYS,
    KEYS,
    UNRANKED,
    HuggingFace,
    Source,
    weights,
)
from isobit.model.tensors import Tensors
from isobit.numerics import RopeTable


@dataclass(frozen=True)
class Config(ModelConfig):
    """What a file says besides what every transformer has."""

    rope: RopeTable
    """It rotates the first values of a head vector."""
    routing: Routing


def config(r: Metadata, vocab: int) -> Config:
    """The hyper-parameters. Raises ModelRefused naming the key for what is missing, malformed or
    not implemented."""
    arch = r.text("general.architecture")
    found = common(r, vocab, moe=True)
    rotated = r.count(f"{arch}.rope.dimension_count", 2, found.head_dim)
    c = Config(
        **vars(found),
        rope=rope_scaling(r, arch, RopeTable(rotated, found.rope_base)),
        routing=routing(r, arch, experts=found.n_experts),
    )
    check(r, c, known=ROUTING_KEYS, scaled=True, routed=True)
    for key in ("leading_dense_block_count", "nextn_predict_layers", "expert_shared_count"):
        r.only(f"{arch}.{key}", 0)
    r.only(f"{arch}.expert_weights_norm", True)
    return c


def graph(c: ModelConfig, tensors: Tensors) -> Graph:
    """The graph of a file's model. Raises ModelRefused for a missing or misshapen tensor."""
    assert isinstance(c, Config)
    return blocks.transformer(
        c,
        tensors,
        lambda p, _, h: attention(p, c, c.rope, h),
        lambda p, _, h: blocks.experts(p, c, h, c.routing, biased=True),
    )


_LAYER = {
    **ATTENTION,
    **MIXTRAL,
    **weights(
        attn_q_norm="self_attn.q_norm",
        attn_k_norm="self_attn.k_norm",
        ffn_norm="post_attention_layernorm",
    ),
    "exp_probs_b.bias": tuple(
        Source(f"{at}.e_score_correction_bias") for at in ("block_sparse_moe", "mlp")
    ),
}


def _metadata(c: Metadata) -> dict[str, Entry]:
    """What config.json says in other words than a file's metadata."""
    c.only("qk_norm_type", "per_layer")
    size = c.count("head_dim", 2, 512)
    part = c.number("partial_rotary_factor", 0.0, 1.0, default=1.0)
    rotated = c.count("rotary_dim", 2, size, default=int(size * part))
    return {**huggingface_scaling(c), "rope.dimension_count": rotated, "expert_gating_func": 2}


HUGGING_FACE = {
    "minimax_m2": HuggingFace(
        "minimax-m2",
        "MiniMaxM2ForCausalLM",
        KEYS | EXPERT_KEYS | {"expert_feed_forward_length": "intermediate_size"},
        lambda _: _LAYER,
        only={"hidden_act": "silu", "use_qk_norm": True, "scoring_func": "sigmoid"},
        more=_metadata,
        settings=lambda c, _: {"num_local_experts": c.n_experts},
        places=lambda _: UNRANKED,
        experts=None,
    ),
}
"""By config.json's ``model_type``."""
ARCHITECTURES = {"minimax-m2": Architecture(config, graph)}
"""By the name in ``general.architecture``."""
