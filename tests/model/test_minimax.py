"""MiniMax-M2: random weights of odd shapes, against transformers' own model in float64."""

from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers import random_models as make
from tests.helpers.random_file import F32, RandomFile
from tests.helpers.synth import Geometry

SHAPES = {"M2": Geometry(2, 160, 5, 1, 64, experts=7, experts_used=3, ffn=96, vocab=300)}
TOKENS = np.random.default_rng(13).integers(0, 300, 90).tolist()


def write(path: Path, kind: str, g: Geometry | None = None, **how: Any) -> dict[str, F32]:
    g = g or SHAPES[kind]
    keys = make.common_keys(g) | {
        "rope.dimension_count": g.head_dim // 2,
        "expert_feed_forward_length": g.ffn,
        "expert_gating_func": 2,
    }
    f = RandomFile(path, "minimax-m2", keys, **how)
    for at in make.beginning(f, g):
        f.vector(at + "attn_norm.weight", g.hidden)
        make.attention(f, at, g)
        f.vector(at + "attn_q_norm.weight", g.heads * g.head_dim)
        f.vector(at + "attn_k_norm.weight", g.kv_heads * g.head_dim)
        f.vector(at + "ffn_norm.weight", g.hidden)
        make.mixture(f, at, g)
        f.vector(at + "exp_probs_b.bias", g.experts, about=0, spread=0.3)
    return f.close()


made = make.made(SHAPES, write)


class TestMinimax(make.SameBits):
    tokens = TOKENS


def test_transformers_in_float64(made: make.Made) -> None:
    kind, file, values = made
    g = SHAPES[kind]
    names = make.NAMES | {
        "exp_probs_b": "mlp.e_score_correction_bias!",
        "ffn_gate+ffn_up_exps": "mlp.experts.gate_up_proj!",
        "ffn_down_exps": "mlp.experts.down_proj!",
    }
    settings = make.settings(g) | {"num_local_experts": g.experts}
    settings["rope_parameters"]["partial_rotary_factor"] = 0.5
    model = make.loaded("MiniMaxM2", settings, make.transformers_state(values, g, names))
    make.check_accuracy(file, TOKENS, make.logits_of(model, TOKENS))


def test_a_damaged_file_is_refused(made: make.Made) -> None:
    wrong = {
        "expert_gating_func": 3,
        "expert_weights_norm": False,
        "expert_shared_count": 1,
        "leading_dense_block_count": 1,
        "nextn_predict_layers": 1,
        "rope.dimension_count": 66,
    }
    missing = ["expert_count", "expert_gating_func", "rope.dimension_count", "block_count"]
    make.check_refusals(made[1], wrong, missing)
