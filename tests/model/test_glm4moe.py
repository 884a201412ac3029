"""GLM-4.5 and its successors: random weights of odd shapes, against transformers' own model in
float64."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers import random_models as make
from tests.helpers.random_file import F32, RandomFile
from tests.helpers.synth import Geometry

SHAPES = {
    "Air": Geometry(3, 160, 5, 1, 64, experts=6, experts_used=3, ffn=96, vocab=300),
    "big": Geometry(2, 256, 2, 2, 128, experts=12, experts_used=4, ffn=64, vocab=300),
}
GROUPS = {"Air": (1, 1), "big": (4, 2)}
SHARED = {"Air": 1, "big": 2}
DENSE_FFN, SCALE = 224, 1.7
TOKENS = np.random.default_rng(12).integers(0, 300, 90).tolist()


def write(path: Path, kind: str, g: Geometry | None = None, **how: Any) -> dict[str, F32]:
    """The big one has norms of head vectors, groups of experts, and a draft block behind all."""
    g, big = g or SHAPES[kind], kind == "big"
    groups, used = GROUPS[kind]
    keys = make.common_keys(g) | {
        "block_count": g.layers + big,
        "nextn_predict_layers": int(big),
        "rope.dimension_count": g.head_dim // 2,
        "feed_forward_length": DENSE_FFN,
        "expert_feed_forward_length": g.ffn,
        "expert_shared_count": SHARED[kind],
        "expert_gating_func": 2,
        "expert_weights_norm": True,
        "expert_weights_scale": SCALE,
        "leading_dense_block_count": 1,
    }
    if big:
        keys |= {"expert_group_count": groups, "expert_group_used_count": used}
    f = RandomFile(path, "glm4moe", keys, **how)
    for i, at in enumerate(make.beginning(f, replace(g, layers=g.layers + big))):
        f.vector(at + "attn_norm.weight", g.hidden)
        make.attention(f, at, g)
        for role, heads in (("q", g.heads), ("k", g.kv_heads), ("v", g.kv_heads)):
            f.vector(f"{at}attn_{role}.bias", heads * g.head_dim, about=0, spread=0.3)
        if big:
            f.vector(at + "attn_q_norm.weight", g.head_dim)
            f.vector(at + "attn_k_norm.weight", g.head_dim)
        f.vector(at + "post_attention_norm.weight", g.hidden)
        if i == 0:
            make.feed_forward(f, at, "", g.hidden, DENSE_FFN)
        else:
            make.mixture(f, at, g)
            f.vector(at + "exp_probs_b.bias", g.experts, about=0, spread=0.3)
            make.feed_forward(f, at, "_shexp", g.hidden, SHARED[kind] * g.ffn)
    draft = f"blk.{g.layers}."
    if big:
        f.matrix(draft + "nextn.eh_proj.weight", g.hidden, 2 * g.hidden)
        f.vector(draft + "nextn.enorm.weight", g.hidden)
        f.vector(draft + "nextn.hnorm.weight", g.hidden)
    return {name: w for name, w in f.close().items() if not name.startswith(draft)}


made = make.made(SHAPES, write)


class TestGlm4moe(make.SameBits):
    tokens = TOKENS


def test_transformers_in_float64(made: make.Made) -> None:
    kind, file, values = made
    g = SHAPES[kind]
    names = make.NAMES | {
        "post_attention_norm": "post_attention_layernorm",
        "exp_probs_b": "mlp.gate.e_score_correction_bias!",
        "ffn_gate+ffn_up_exps": "mlp.experts.gate_up_proj!",
        "ffn_down_exps": "mlp.experts.down_proj!",
        **{
            f"ffn_{role}_shexp": f"mlp.shared_experts.{role}_proj"
            for role in ("gate", "up", "down")
        },
    }
    del names["ffn_norm"]
    rope = make.settings(g)["rope_parameters"]
    settings = make.settings(g) | {
        "intermediate_size": DENSE_FFN,
        "moe_intermediate_size": g.ffn,
        "n_routed_experts": g.experts,
        "n_shared_experts": SHARED[kind],
        "n_group": GROUPS[kind][0],
        "topk_group": GROUPS[kind][1],
        "first_k_dense_replace": 1,
        "routed_scaling_factor": float(np.float32(SCALE)),
        "attention_bias": True,
        "use_qk_norm": kind == "big",
        "rope_parameters": rope | {"partial_rotary_factor": 0.5},
    }
    model = make.loaded("Glm4Moe", settings, make.transformers_state(values, g, names))
    make.check_accuracy(file, TOKENS, make.logits_of(model, TOKENS))


def test_a_damaged_file_is_refused(made: make.Made) -> None:
    kind, file, _ = made
    wrong = {
        "expert_gating_func": 4,
        "expert_group_count": 65,
        "expert_weights_scale": -1.0,
        "leading_dense_block_count": 9,
        "nextn_predict_layers": 9,
        "rope.dimension_count": 300,
        "rope.dimension_sections": [8, 12, 12],
    }
    missing = ["expert_count", "expert_shared_count", "feed_forward_length", "block_count"]
    optional = "blk.2." if kind == "big" else "nextn", "attn_q_norm", "attn_k_norm", ".bias"
    make.check_refusals(file, wrong, missing, optional=optional)
    others = [name for name in file.tensors if name != "blk.1.exp_probs_b.bias"]
    make.check_refusals(file, {}, [], optional=others)
