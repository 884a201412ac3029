"""Latent attention as GLM-4.7-Flash, DeepSeek V3 and V2 have it: random weights of odd shapes,
against transformers' own models in float64."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import random_models as make
from tests.helpers.random_file import F32, RandomFile
from tests.helpers.synth import Geometry

SHAPES = {
    "Glm4MoeLite": Geometry(2, 160, 3, 1, 96, experts=6, experts_used=3, ffn=96, vocab=300),
    "DeepseekV3": Geometry(3, 128, 4, 1, 64, experts=8, experts_used=2, ffn=64, vocab=300),
    "DeepseekV2": Geometry(2, 128, 4, 1, 64, experts=12, experts_used=4, ffn=64, vocab=300),
}
Q_RANK = {"Glm4MoeLite": 96, "DeepseekV3": 0, "DeepseekV2": 96}
YARN = {
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "mscale": 0.75,
    "mscale_all_dim": 0.75,
}
GROUPS = {"Glm4MoeLite": (1, 1), "DeepseekV3": (4, 2), "DeepseekV2": (3, 2)}
ROTATED, KV_RANK, DENSE_FFN, SCALE = 32, 64, 224, 1.8
TOKENS = np.random.default_rng(15).integers(0, 300, 90).tolist()


def values_of(kind: str, g: Geometry) -> int:
    """The length of a head vector of values."""
    return g.head_dim if kind == "Glm4MoeLite" else g.head_dim - 24


def write(path: Path, kind: str, g: Geometry | None = None, **how: Any) -> dict[str, F32]:
    """GLM-4.7-Flash's with the matrices that the latent vector wants; the other as old files are,
    with one for keys and values, values shorter than keys and one matrix for queries."""
    g, new = g or SHAPES[kind], kind == "Glm4MoeLite"
    H, D, V, plain = g.heads, g.head_dim, values_of(kind, g), g.head_dim - ROTATED
    keys = make.common_keys(g) | {
        "rope.dimension_count": ROTATED,
        "feed_forward_length": DENSE_FFN,
        "expert_feed_forward_length": g.ffn,
        "expert_shared_count": 2,
        "expert_gating_func": 1 if kind == "DeepseekV2" else 2,
        "expert_weights_norm": kind != "DeepseekV2",
        "expert_weights_scale": SCALE,
        "expert_group_count": GROUPS[kind][0],
        "expert_group_used_count": GROUPS[kind][1],
        "leading_dense_block_count": 1,
        "attention.kv_lora_rank": KV_RANK,
    }
    if new:
        keys |= {"attention.key_length": KV_RANK + ROTATED, "attention.value_length": KV_RANK}
        keys |= {"attention.key_length_mla": D, "attention.value_length_mla": V}
        keys |= {"attention.head_count_kv": 1}
    else:
        keys |= {"attention.head_count_kv": H, "attention.value_length": V}
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.yarn_log_multiplier": 0.1 * YARN["mscale"],
        }
        keys |= {"rope.scaling.factor": YARN["factor"]}
        keys["rope.scaling.original_context_length"] = YARN["original_max_position_embeddings"]
    if Q_RANK[kind]:
        keys["attention.q_lora_rank"] = Q_RANK[kind]
    f = RandomFile(path, "deepseek2", keys, **how)
    for i, at in enumerate(make.beginning(f, g)):
        f.vector(at + "attn_norm.weight", g.hidden)
        if Q_RANK[kind]:
            f.matrix(at + "attn_q_a.weight", Q_RANK[kind], g.hidden)
            f.vector(at + "attn_q_a_norm.weight", Q_RANK[kind])
            f.matrix(at + "attn_q_b.weight", H * D, Q_RANK[kind])
        else:
            f.matrix(at + "attn_q.weight", H * D, g.hidden)
        if new:
            f.matrix(at + "attn_k_b.weight", H, KV_RANK, plain)
            f.matrix(at + "attn_v_b.weight", H, V, KV_RANK)
        else:
            f.matrix(at + "attn_kv_b.weight", H * (plain + V), KV_RANK)
        f.matrix(at + "attn_kv_a_mqa.weight", KV_RANK + ROTATED, g.hidden)
        f.vector(at + "attn_kv_a_norm.weight", KV_RANK)
        f.matrix(at + "attn_output.weight", g.hidden, H * V)
        f.vector(at + "ffn_norm.weight", g.hidden)
        if i == 0:
            make.feed_forward(f, at, "", g.hidden, DENSE_FFN)
        else:
            make.mixture(f, at, g)
            if kind != "DeepseekV2":
                f.vector(at + "exp_probs_b.bias", g.experts, about=0, spread=0.3)
            make.feed_forward(f, at, "_shexp", g.hidden, 2 * g.ffn)
    return f.close()


made = make.made(SHAPES, write)


@pytest.mark.parametrize("name", ["cpu", "wgpu"])
def test_bits(made: make.Made, name: str) -> None:
    make.check_bits(made[1], TOKENS, [name])


@pytest.mark.parametrize("parts", [2, 3])
def test_parts(made: make.Made, parts: int) -> None:
    make.check_parts(made[1], parts)


def test_transformers_in_float64(made: make.Made) -> None:
    kind, file, values = made
    g, w = SHAPES[kind], dict(values)
    for i in range(g.layers):
        at = f"blk.{i}.attn_"
        if at + "k_b.weight" in w:  # a head's keys, then its values
            k, v = w.pop(at + "k_b.weight").swapaxes(1, 2), w.pop(at + "v_b.weight")
            w[at + "kv_b.weight"] = np.concatenate([k, v], axis=1).reshape(-1, KV_RANK)
    names = make.NAMES | {
        "attn_q_a": "self_attn.q_a_proj",
        "attn_q_a_norm": "self_attn.q_a_layernorm",
        "attn_q_b": "self_attn.q_b_proj",
        "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
        "attn_kv_a_norm": "self_attn.kv_a_layernorm",
        "attn_kv_b": "self_attn.kv_b_proj",
        "exp_probs_b": "mlp.gate.e_score_correction_bias!",
        "ffn_gate+ffn_up_exps": "mlp.experts.gate_up_proj!",
        "ffn_down_exps": "mlp.experts.down_proj!",
        **{f"ffn_{r}_shexp": f"mlp.shared_experts.{r}_proj" for r in ("gate", "up", "down")},
    }
    settings = make.settings(g) | {
        "num_key_value_heads": g.heads,
        "intermediate_size": DENSE_FFN,
        "moe_intermediate_size": g.ffn,
        "n_routed_experts": g.experts,
        "n_shared_experts": 2,
        "n_group": GROUPS[kind][0],
        "topk_group": GROUPS[kind][1],
        "routed_scaling_factor": float(np.float32(SCALE)),
        "kv_lora_rank": KV_RANK,
        "q_lora_rank": Q_RANK[kind] or None,
        "qk_rope_head_dim": ROTATED,
        "qk_nope_head_dim": g.head_dim - ROTATED,
        "v_head_dim": values_of(kind, g),
    }
    del settings["head_dim"]
    if kind == "DeepseekV2":
        settings["topk_method"] = "group_limited_greedy"
    else:
        settings["rope_interleave"] = True
    if kind != "Glm4MoeLite":
        settings["first_k_dense_replace"] = 1
        settings["rope_parameters"] |= {"rope_type": "yarn", **YARN}
    model = make.loaded(kind, settings, make.transformers_state(w, g, names))
    for layer in model.model.layers:  # files have one number for all norms
        layer.self_attn.kv_a_layernorm.variance_epsilon = settings["rms_norm_eps"]
        if Q_RANK[kind]:
            layer.self_attn.q_a_layernorm.variance_epsilon = settings["rms_norm_eps"]
    make.check_accuracy(file, TOKENS, make.logits_of(model, TOKENS))


def test_a_damaged_file_is_refused(made: make.Made) -> None:
    kind, file, _ = made
    wrong = {
        "expert_gating_func": 3,
        "rope.dimension_count": 600,
        "rope.scaling.type": "longrope",
        "leading_dense_block_count": 9,
        "attention.kv_lora_rank": 0,
    }
    if kind != "Glm4MoeLite":
        wrong |= {"expert_group_count": 5, "attention.value_length": 65}
        wrong |= {"rope.scaling.yarn_log_multiplier": 2.0}
    missing = ["attention.kv_lora_rank", "rope.dimension_count", "block_count"]
    optional = "exp_probs_b", "attn_kv_b"
    make.check_refusals(file, wrong, missing, optional=optional)
