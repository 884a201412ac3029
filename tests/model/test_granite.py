"""Granite and Granite-MoE: random weights of odd shapes, against transformers' own models in
float64."""

from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers import random_models as make
from tests.helpers.random_file import F32, RandomFile
from tests.helpers.synth import Geometry

SHAPES = {
    "Granite": Geometry(1, 512, 2, 1, 256, experts=0, ffn=640, vocab=300, tied=True),
    "GraniteMoe": Geometry(2, 320, 5, 1, 64, experts=6, experts_used=3, ffn=96, vocab=300),
    "GraniteMoeShared": Geometry(2, 640, 10, 5, 64, experts=1, experts_used=1, ffn=64, vocab=300),
}
SHARED = 224
SCALES = {"embedding": 11.5, "attention": 0.03125, "residual": 0.22, "logit": 7.5}
TOKENS = np.random.default_rng(9).integers(0, 300, 90).tolist()


def write(path: Path, kind: str, g: Geometry | None = None, **how: Any) -> dict[str, F32]:
    g = g or SHAPES[kind]
    keys = make.common_keys(g) | {
        "embedding_scale": SCALES["embedding"],
        "attention.scale": SCALES["attention"],
        "residual_scale": SCALES["residual"],
        "logit_scale": SCALES["logit"],
        "rope.scaling.finetuned": True,
    }
    if kind == "GraniteMoeShared":
        keys["expert_shared_feed_forward_length"] = SHARED
    f = RandomFile(path, "granitemoe" if g.experts else "granite", keys, **how)
    for at in make.beginning(f, g):
        f.vector(at + "attn_norm.weight", g.hidden)
        make.attention(f, at, g, spread=2)
        f.vector(at + "ffn_norm.weight", g.hidden)
        if g.experts:
            make.mixture(f, at, g)
        else:
            make.feed_forward(f, at, "", g.hidden, g.ffn)
        if kind == "GraniteMoeShared":
            make.feed_forward(f, at, "_shexp", g.hidden, SHARED)
    return f.close()


made = make.made(SHAPES, write)


class TestGranite(make.SameBits):
    tokens = TOKENS


def test_transformers_in_float64(made: make.Made) -> None:
    kind, file, values = made
    g = SHAPES[kind]
    names = make.NAMES | {
        "ffn_gate_inp": "block_sparse_moe.router",
        "ffn_gate+ffn_up_exps": "block_sparse_moe.experts.gate_up_proj!",
        "ffn_down_exps": "block_sparse_moe.experts.down_proj!",
        "ffn_gate+ffn_up_shexp": "shared_mlp.input_linear",
        "ffn_down_shexp": "shared_mlp.output_linear",
    }
    settings = make.settings(g) | {
        "embedding_multiplier": SCALES["embedding"],
        "attention_multiplier": SCALES["attention"],
        "residual_multiplier": float(np.float32(SCALES["residual"])),
        "logits_scaling": SCALES["logit"],
    }
    if g.experts:
        settings |= {"num_local_experts": g.experts, "shared_intermediate_size": SHARED}
    state = make.transformers_state(values, g, names, neighbours=True)
    model = make.loaded(kind, settings, state)
    make.check_accuracy(file, TOKENS, make.logits_of(model, TOKENS))


def test_a_damaged_file_is_refused(made: make.Made) -> None:
    wrong = {
        "rope.scaling.finetuned": False,
        "attention.scale": -1.0,
        "logit_scale": 0.0,
        "residual_scale": "one",
        "final_logit_softcapping": 30.0,
    }
    make.check_refusals(made[1], wrong, ["logit_scale", "feed_forward_length", "block_count"])
