"""Gemma 3 and Gemma 4: random weights of odd shapes, against transformers' models in float64."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers import random_models as make
from tests.helpers.random_file import F32, RandomFile
from tests.helpers.synth import Geometry

WINDOW = 70  # longer than a tile of keys, shorter than the text
THIRD = Geometry(3, 160, 5, 1, 64, experts=0, ffn=640, vocab=300, tied=True)
FOURTH = Geometry(3, 192, 4, 2, 32, experts=6, experts_used=3, ffn=96, vocab=300, tied=True)
SLIDES = [True, False, False]
FULL_HEADS, FULL_SIZE, DENSE, CAP = 1, 64, 224, 1.5
KINDS = {"gemma3": THIRD, "gemma4": FOURTH, "dense": replace(FOURTH, experts=0)}
TOKENS = np.random.default_rng(10).integers(0, 300, 150).tolist()


def write(path: Path, kind: str, g: Geometry | None = None, **how: Any) -> dict[str, F32]:
    return (_third if kind == "gemma3" else _fourth)(path, g or KINDS[kind], **how)


def _third(path: Path, g: Geometry, **how: Any) -> dict[str, F32]:
    keys = make.common_keys(g) | {
        "attention.sliding_window": WINDOW,
        "attention.sliding_window_pattern": 3,
        "rope.freq_base": 1e6,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
    }
    f = RandomFile(path, "gemma3", keys, **how)
    for at in make.beginning(f, g):
        make.attention(f, at, g)
        _norms(f, at, g, g.head_dim)
        make.feed_forward(f, at, "", g.hidden, g.ffn)
    return f.close()


def _norms(f: RandomFile, at: str, g: Geometry, size: int) -> None:
    for role in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
        f.vector(f"{at}{role}.weight", g.hidden)
    for role in ("attn_q_norm", "attn_k_norm"):
        f.vector(f"{at}{role}.weight", size)


def _fourth(path: Path, g: Geometry, **how: Any) -> dict[str, F32]:
    """Of a file's layers one slides; of the others' values one has a matrix of its own."""
    slides = [SLIDES[i % 3] for i in range(g.layers)]
    full = replace(g, kv_heads=FULL_HEADS, head_dim=FULL_SIZE)
    keys = make.common_keys(full) | {
        "feed_forward_length": DENSE,
        "attention.head_count_kv": [g.kv_heads if s else FULL_HEADS for s in slides],
        "attention.key_length_swa": g.head_dim,
        "attention.value_length_swa": g.head_dim,
        "attention.sliding_window": WINDOW,
        "attention.sliding_window_pattern": slides,
        "attention.shared_kv_layers": 0,
        "embedding_length_per_layer_input": 0,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 10000.0,
        "rope.dimension_count_swa": g.head_dim,
        "final_logit_softcapping": CAP,
    }
    if g.experts:
        keys["expert_feed_forward_length"] = g.ffn
    f = RandomFile(path, "gemma4", keys, **how)
    f.put("rope_freqs.weight", np.where(np.arange(FULL_SIZE // 2) < FULL_SIZE // 8, 1.0, 1e30))
    for i, at in enumerate(make.beginning(f, g)):
        mine = g if slides[i] else full
        make.attention(f, at, mine, without=() if slides[i] else ("v",))
        _norms(f, at, g, mine.head_dim)
        make.feed_forward(f, at, "", g.hidden, DENSE)
        f.vector(at + "layer_output_scale.weight", 1, about=0.7)
        if not g.experts:
            continue
        for role in ("post_ffw_norm_1", "pre_ffw_norm_2", "post_ffw_norm_2"):
            f.vector(f"{at}{role}.weight", g.hidden)
        f.matrix(at + "ffn_gate_inp.weight", g.experts, g.hidden, fmt="F32", spread=10)
        f.vector(at + "ffn_gate_inp.scale", g.hidden)
        f.matrix(at + "ffn_gate_up_exps.weight", g.experts, 2 * g.ffn, g.hidden)
        f.matrix(at + "ffn_down_exps.weight", g.experts, g.hidden, g.ffn)
        f.vector(at + "ffn_down_exps.scale", g.experts)
    return f.close()


NAMES = make.NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
    "layer_output_scale": "layer_scalar!",
    "ffn_gate_inp": "router.proj",
    "ffn_gate_inp.scale": "router.scale!",
    "ffn_down_exps.scale": "router.per_expert_scale!",
    "ffn_gate_up_exps": "experts.gate_up_proj!",
    "ffn_down_exps": "experts.down_proj!",
}


made = make.made(KINDS, write)


class TestGemma(make.SameBits):
    tokens = TOKENS


def test_transformers_in_float64(made: make.Made) -> None:
    kind, file, values = made
    g, state = KINDS[kind], make.transformers_state(values, KINDS[kind], NAMES)
    sliding: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    settings = make.settings(g) | {"sliding_window": WINDOW}
    if kind == "gemma3":
        state = {k: v - 1 if "norm" in k else v for k, v in state.items()}
        full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
        settings |= {"query_pre_attn_scalar": g.head_dim}
        kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    else:
        full = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}
        kinds = ["sliding_attention" if s else "full_attention" for s in SLIDES]
        settings |= {
            "global_head_dim": FULL_SIZE,
            "num_global_key_value_heads": FULL_HEADS,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "intermediate_size": DENSE,
            "final_logit_softcapping": CAP,
            "num_kv_shared_layers": 0,
        }
    if kind == "gemma4":
        settings |= {"enable_moe_block": True, "num_experts": g.experts}
        settings |= {"top_k_experts": g.experts_used, "moe_intermediate_size": g.ffn}
    settings |= {
        "layer_types": kinds,
        "rope_parameters": {"sliding_attention": sliding, "full_attention": full},
    }
    model = make.loaded("Gemma3Text" if kind == "gemma3" else "Gemma4Text", settings, state)
    make.check_accuracy(file, TOKENS, make.logits_of(model, TOKENS))


def test_a_damaged_file_is_refused(made: make.Made) -> None:
    kind, file, _ = made
    wrong: dict[str, object] = {"attention.sliding_window": 0, "rope.dimension_count": 16}
    wrong["attention.sliding_window_pattern"] = [True]
    missing = ["attention.sliding_window", "feed_forward_length"]
    if kind != "gemma3":
        wrong |= {
            "attention.head_count_kv": [2, 1],
            "attention.shared_kv_layers": 1,
            "embedding_length_per_layer_input": 256,
            "rope.dimension_count_swa": 16,
            "attention.value_length_swa": 16,
        }
        missing += ["attention.sliding_window_pattern", "attention.key_length_swa"]
    optional = [] if kind == "gemma3" else ["attn_v", "layer_output", "exps.scale", "gate_up"]
    make.check_refusals(file, wrong, missing, optional)
