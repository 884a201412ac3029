"""LFM2 and LFM2-MoE: random weights of odd shapes, against transformers' own models in float64."""

from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers import random_models as make
from tests.helpers.random_file import F32, RandomFile
from tests.helpers.synth import Geometry

SHAPES = {
    "lfm2": Geometry(3, 160, 5, 1, 32, experts=0, ffn=224, vocab=300, tied=True),
    "lfm2moe": Geometry(3, 128, 4, 2, 32, experts=6, experts_used=3, ffn=96, vocab=300, tied=True),
}
TAPS = {"lfm2": 3, "lfm2moe": 4}
CONVOLVES = [True, False, True]
DENSE_FFN = 224
TOKENS = np.random.default_rng(14).integers(0, 300, 90).tolist()


def convolves(g: Geometry) -> list[bool]:
    return [CONVOLVES[i % len(CONVOLVES)] for i in range(g.layers)]


def write(path: Path, kind: str, g: Geometry | None = None, **how: Any) -> dict[str, F32]:
    g = g or SHAPES[kind]
    keys = make.common_keys(g) | {
        "attention.head_count_kv": [0 if c else g.kv_heads for c in convolves(g)],
        "shortconv.l_cache": TAPS[kind],
    }
    if g.experts:
        keys |= {
            "feed_forward_length": DENSE_FFN,
            "expert_feed_forward_length": g.ffn,
            "expert_gating_func": 2,
            "leading_dense_block_count": 1,
        }
    f = RandomFile(path, kind, keys, **how)
    f.matrix("token_embd.weight", g.vocab, g.hidden)
    f.vector("token_embd_norm.weight", g.hidden)
    for i, convolution in enumerate(convolves(g)):
        at = f"blk.{i}."
        f.vector(at + "attn_norm.weight", g.hidden)
        if convolution:
            f.matrix(at + "shortconv.in_proj.weight", 3 * g.hidden, g.hidden)
            f.vector(at + "shortconv.conv.weight", g.hidden, TAPS[kind], about=0, spread=0.5)
            f.matrix(at + "shortconv.out_proj.weight", g.hidden, g.hidden)
        else:
            make.attention(f, at, g)
            f.vector(at + "attn_q_norm.weight", g.head_dim)
            f.vector(at + "attn_k_norm.weight", g.head_dim)
        f.vector(at + "ffn_norm.weight", g.hidden)
        if g.experts and i:
            make.mixture(f, at, g)
            f.vector(at + "exp_probs_b.bias", g.experts, about=0, spread=0.3)
        else:
            make.feed_forward(f, at, "", g.hidden, DENSE_FFN if g.experts else g.ffn)
    return f.close()


made = make.made(SHAPES, write)


class TestLfm2(make.SameBits):
    tokens = TOKENS


NAMES = {
    "attn_norm": "operator_norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "shortconv.in_proj.weight": "conv.in_proj.weight!",
    "shortconv.conv.weight": "conv.conv.weight!",
    "shortconv.out_proj.weight": "conv.out_proj.weight!",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
    "ffn_gate_inp": "feed_forward.gate",
    "exp_probs_b": "feed_forward.expert_bias!",
    "ffn_gate+ffn_up_exps": "feed_forward.experts.gate_up_proj!",
    "ffn_down_exps": "feed_forward.experts.down_proj!",
}


def test_transformers_in_float64(made: make.Made) -> None:
    kind, file, values = made
    g = SHAPES[kind]
    w = values | {"output_norm.weight": values["token_embd_norm.weight"]}
    state = make.transformers_state(w, g, NAMES)
    state["model.embedding_norm.weight"] = state.pop("model.norm.weight")
    for name in state:
        if name.endswith("conv.conv.weight"):
            state[name] = state[name][:, None]
    settings = make.settings(g) | {
        "norm_eps": float(np.float32(1e-5)),
        "conv_L_cache": TAPS[kind],
        "layer_types": ["conv" if c else "full_attention" for c in convolves(g)],
    }
    if g.experts:
        settings |= {"intermediate_size": DENSE_FFN, "moe_intermediate_size": g.ffn}
        settings |= {"num_experts": g.experts, "num_dense_layers": 1}
    else:
        settings["block_auto_adjust_ff_dim"] = False
    model = make.loaded("Lfm2Moe" if g.experts else "Lfm2", settings, state)
    make.check_accuracy(file, TOKENS, make.logits_of(model, TOKENS))


def test_a_damaged_file_is_refused(made: make.Made) -> None:
    kind, file, _ = made
    wrong: dict[str, object] = {
        "attention.head_count_kv": [0, 0, 0],
        "shortconv.l_cache": 1,
        "rope.dimension_count": 16,
        "expert_weights_norm": False,
    }
    missing = ["attention.head_count_kv", "shortconv.l_cache", "block_count"]
    if kind == "lfm2moe":
        wrong |= {"leading_dense_block_count": 4, "expert_gating_func": 3}
        missing += ["expert_count", "expert_gating_func"]
    optional = "token_embd_norm", "exp_probs_b"
    make.check_refusals(file, wrong, missing, optional=optional)
