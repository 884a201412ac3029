"""OLMoE: random weights of odd shapes, against transformers' own model in float64."""

from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers import random_models as make
from tests.helpers.random_file import F32, RandomFile
from tests.helpers.synth import Geometry

SHAPES = {
    "several": Geometry(3, 320, 5, 1, 64, experts=6, experts_used=3, ffn=96, vocab=300),
    "one": Geometry(1, 512, 2, 2, 256, experts=1, experts_used=1, ffn=640, vocab=300),
}
TOKENS = np.random.default_rng(8).integers(0, 300, 90).tolist()


def write(path: Path, kind: str, g: Geometry | None = None, **how: Any) -> dict[str, F32]:
    g = g or SHAPES[kind]
    f = RandomFile(path, "olmoe", make.common_keys(g), **how)
    for at in make.beginning(f, g):
        f.vector(at + "attn_norm.weight", g.hidden)
        make.attention(f, at, g)
        f.vector(at + "attn_q_norm.weight", g.heads * g.head_dim)
        f.vector(at + "attn_k_norm.weight", g.kv_heads * g.head_dim)
        f.vector(at + "ffn_norm.weight", g.hidden)
        make.mixture(f, at, g)
    return f.close()


made = make.made(SHAPES, write)


class TestOlmoe(make.SameBits):
    tokens = TOKENS


def test_transformers_in_float64(made: make.Made) -> None:
    kind, file, values = made
    g = SHAPES[kind]
    names = make.NAMES | {
        "ffn_gate+ffn_up_exps": "mlp.experts.gate_up_proj!",
        "ffn_down_exps": "mlp.experts.down_proj!",
    }
    more = {"num_experts": g.experts, "norm_topk_prob": False, "clip_qkv": None}
    settings = make.settings(g) | more
    model = make.loaded("Olmoe", settings, make.transformers_state(values, g, names))
    make.check_accuracy(file, TOKENS, make.logits_of(model, TOKENS))


def test_a_damaged_file_is_refused(made: make.Made) -> None:
    wrong = {"attention.clamp_kqv": 8.0, "rope.dimension_count": 32, "expert_used_count": 65}
    make.check_refusals(made[1], wrong, ["expert_count", "feed_forward_length", "block_count"])
