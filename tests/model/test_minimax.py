"""MiniMax-M2: random weights of odd shapes, against transformers' own model in float64."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isobit.gguf.reader import GGUFFile
from tests.helpers import random_models as make
from tests.helpers.random_file import F32, RandomFile
from tests.helpers.synth import Geometry

G = Geometry(2, 160, 5, 1, 64, experts=7, experts_used=3, ffn=96, vocab=300)
TOKENS = np.random.default_rng(13).integers(0, 300, 90).tolist()
Made = tuple[GGUFFile, dict[str, F32]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    path = tmp_path_factory.mktemp("minimax") / "m.gguf"
    values = write(path)
    with GGUFFile.open(path) as file:
        yield file, values


def write(path: Path, g: Geometry = G, **how: Any) -> dict[str, F32]:
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


@pytest.mark.parametrize("name", ["cpu", "wgpu"])
def test_bits(made: Made, name: str) -> None:
    make.check_bits(made[0], TOKENS, [name])


def test_parts(made: Made) -> None:
    make.check_parts(made[0], 2)


def test_transformers_in_float64(made: Made) -> None:
    file, values = made
    names = make.NAMES | {
        "exp_probs_b": "mlp.e_score_correction_bias!",
        "ffn_gate+ffn_up_exps": "mlp.experts.gate_up_proj!",
        "ffn_down_exps": "mlp.experts.down_proj!",
    }
    settings = make.settings(G) | {"num_local_experts": G.experts}
    settings["rope_parameters"]["partial_rotary_factor"] = 0.5
    model = make.loaded("MiniMaxM2", settings, make.transformers_state(values, G, names))
    make.check_accuracy(file, TOKENS, make.logits_of(model, TOKENS))


def test_a_damaged_file_is_refused(made: Made) -> None:
    wrong = {
        "expert_gating_func": 3,
        "expert_weights_norm": False,
        "expert_shared_count": 1,
        "leading_dense_block_count": 1,
        "nextn_predict_layers": 1,
        "rope.dimension_count": 66,
    }
    missing = ["expert_count", "expert_gating_func", "rope.dimension_count", "block_count"]
    make.check_refusals(made[0], wrong, missing)
