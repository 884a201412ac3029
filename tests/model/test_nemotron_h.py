"""Nemotron-H and Nemotron 3: random weights of odd shapes, against transformers' own model in
float64."""

from pathlib import Path
from typing import Any

import numpy as np

from isobit.config import EngineConfig
from isobit.model.weights import Weights
from tests.helpers import random_models as make
from tests.helpers.passes import opened, run_cut, same_bits
from tests.helpers.random_file import F32, RandomFile
from tests.helpers.synth import Geometry

SCAN, ATTENTION, FEED_FORWARD = "linear_attention", "full_attention", "moe"
LAYERS = [SCAN, FEED_FORWARD, ATTENTION, SCAN]
SHAPES = {
    "dense": Geometry(4, 160, 5, 1, 64, experts=0, ffn=224, vocab=300),
    "moe": Geometry(4, 160, 4, 2, 32, experts=6, experts_used=3, ffn=96, vocab=300),
    "latent": Geometry(4, 128, 2, 1, 64, experts=8, experts_used=2, ffn=64, vocab=300),
}
LATENT, SHARED, SCALE = 96, 224, 2.5
HEADS, SIZE, GROUPS, STATE = SCANS = 6, 24, 3, 32  # of the scan
TOKENS = np.random.default_rng(17).integers(0, 300, 90).tolist()


def write(
    path: Path,
    kind: str,
    g: Geometry | None = None,
    scan: tuple[int, int, int, int] = SCANS,
    **how: Any,
) -> dict[str, F32]:
    g, (heads, size, groups, state) = g or SHAPES[kind], scan
    inner, channels = heads * size, heads * size + 2 * groups * state
    layers = [LAYERS[i % 4] for i in range(g.layers)]
    keys = make.common_keys(g) | {
        "attention.head_count_kv": [g.kv_heads * (k == ATTENTION) for k in layers],
        "feed_forward_length": [g.ffn * (k == FEED_FORWARD) for k in layers],
        "attention.layer_norm_epsilon": 1e-5,
        "ssm.conv_kernel": 4,
        "ssm.state_size": state,
        "ssm.group_count": groups,
        "ssm.time_step_rank": heads,
        "ssm.inner_size": inner,
    }
    if g.experts:
        keys |= {
            "expert_feed_forward_length": g.ffn,
            "expert_shared_feed_forward_length": SHARED,
            "expert_shared_count": 1,
            "expert_weights_norm": True,
            "expert_weights_scale": SCALE,
            "expert_group_count": 4 if kind == "latent" else 1,
            "expert_group_used_count": 2 if kind == "latent" else 1,
        }
    if kind == "latent":
        keys["moe_latent_size"] = LATENT
        del keys["attention.layer_norm_rms_epsilon"]
    f = RandomFile(path, "nemotron_h_moe" if g.experts else "nemotron_h", keys, **how)
    for i, at in enumerate(make.beginning(f, g)):
        f.vector(at + "attn_norm.weight", g.hidden)
        if layers[i] == SCAN:
            f.matrix(at + "ssm_in.weight", inner + channels + heads, g.hidden)
            f.vector(at + "ssm_conv1d.weight", channels, 4, about=0, spread=0.5)
            f.vector(at + "ssm_conv1d.bias", channels, about=0, spread=0.2)
            f.vector(at + "ssm_dt.bias", heads, about=0, spread=1)
            f.put(at + "ssm_a", -np.exp(f.rng.standard_normal((heads, 1))))
            f.vector(at + "ssm_d", heads, 1)
            f.vector(at + "ssm_norm.weight", groups, inner // groups)
            f.matrix(at + "ssm_out.weight", g.hidden, inner, fmt="F32" if inner % 32 else None)
        elif layers[i] == ATTENTION:
            make.attention(f, at, g, spread=2)
        elif not g.experts:
            f.matrix(at + "ffn_up.weight", g.ffn, g.hidden)
            f.matrix(at + "ffn_down.weight", g.hidden, g.ffn)
        else:
            width = g.hidden
            if kind == "latent":
                width = LATENT
                f.matrix(at + "ffn_latent_down.weight", LATENT, g.hidden)
                f.matrix(at + "ffn_latent_up.weight", g.hidden, LATENT)
            f.matrix(at + "ffn_gate_inp.weight", g.experts, g.hidden, fmt="F32", spread=2)
            f.vector(at + "exp_probs_b.bias", g.experts, about=0, spread=0.3)
            f.matrix(at + "ffn_up_exps.weight", g.experts, g.ffn, width)
            f.matrix(at + "ffn_down_exps.weight", g.experts, width, g.ffn)
            f.matrix(at + "ffn_up_shexp.weight", SHARED, g.hidden)
            f.matrix(at + "ffn_down_shexp.weight", g.hidden, SHARED)
    return f.close()


made = make.made(SHAPES, write)


def test_bits(made: make.Made) -> None:
    make.check_bits(made[1], TOKENS, ["cpu"])


def test_bits_on_a_device(made: make.Made) -> None:
    """A prompt and a step: cuts are tested operation by operation."""
    weights, engine = Weights.from_file(made[1]), EngineConfig(context=64, max_sequences=1)
    found = []
    for name in ("cpu", "wgpu"):
        backend = opened(name, weights, engine)
        found.append(run_cut(backend, TOKENS[:9], [0, 8]))
        backend.close()
    assert same_bits(*found)


def test_parts(made: make.Made) -> None:
    make.check_parts(made[1], 2)


def test_transformers_in_float64(made: make.Made) -> None:
    kind, file, values = made
    g, w = SHAPES[kind], dict(values)
    names = {
        "attn_norm": "norm",
        **{f"attn_{r}": f"mixer.{r}_proj" for r in "qkv"},
        "attn_output": "mixer.o_proj",
        "ssm_in": "mixer.in_proj",
        "ssm_conv1d": "mixer.conv1d",
        "ssm_dt.bias": "mixer.dt_bias!",
        "ssm_norm": "mixer.norm",
        "ssm_out": "mixer.out_proj",
        "ffn_up": "mixer.up_proj",
        "ffn_down": "mixer.down_proj",
        "ffn_gate_inp": "mixer.gate",
        "exp_probs_b": "mixer.gate.e_score_correction_bias!",
        "ffn_up_exps": "mixer.experts.up_proj!",
        "ffn_down_exps": "mixer.experts.down_proj!",
        "ffn_latent_down": "mixer.fc1_latent_proj",
        "ffn_latent_up": "mixer.fc2_latent_proj",
        **{f"ffn_{r}_shexp": f"mixer.shared_experts.{r}_proj" for r in ("up", "down")},
    }
    own = {}
    for i in range(g.layers):
        at = f"blk.{i}.ssm_"
        if at + "a" in w:
            to = f"model.layers.{i}.mixer."
            own[to + "A_log"] = np.log(-w.pop(at + "a").astype(np.float64)).ravel()
            own[to + "D"] = w.pop(at + "d").ravel()
            w[at + "conv1d.weight"] = w[at + "conv1d.weight"][:, None]
            w[at + "norm.weight"] = w[at + "norm.weight"].ravel()
    state = make.transformers_state(w, g, names) | own
    state["model.embeddings.weight"] = state.pop("model.embed_tokens.weight")
    state["model.norm_f.weight"] = state.pop("model.norm.weight")
    layers = [k if k != FEED_FORWARD or g.experts else "mlp" for k in LAYERS]
    settings = make.settings(g) | {
        "layers_block_type": layers,
        "layer_norm_epsilon": float(np.float32(1e-5)),
        "ssm_state_size": STATE,
        "mamba_num_heads": HEADS,
        "mamba_head_dim": SIZE,
        "n_groups": GROUPS,
        "conv_kernel": 4,
        "time_step_min": 1e-30,  # a clamp that other engines do not have
    }
    for name in ("rms_norm_eps", "rope_parameters", "num_hidden_layers"):
        del settings[name]
    if g.experts:
        settings |= {
            "n_routed_experts": g.experts,
            "moe_intermediate_size": g.ffn,
            "moe_shared_expert_intermediate_size": SHARED,
            "moe_latent_size": LATENT if kind == "latent" else None,
            "routed_scaling_factor": SCALE,
            "n_group": 4 if kind == "latent" else 1,
            "topk_group": 2 if kind == "latent" else 1,
        }
    model = make.loaded("NemotronH", settings, state)
    make.check_accuracy(file, TOKENS, make.logits_of(model, TOKENS))


def test_a_damaged_file_is_refused(made: make.Made) -> None:
    kind, file, _ = made
    wrong = {
        "attention.head_count_kv": [0, 0, 2, 1],
        "feed_forward_length": [0, 3, 0, 5],
        "ssm.time_step_rank": 5,
        "ssm.group_count": 5,
        "ssm.state_size": 1,
        "nextn_predict_layers": 4,
    }
    if kind != "dense":
        wrong |= {"expert_gating_func": 3, "expert_weights_scale": "much"}
    missing = ["ssm.conv_kernel", "ssm.inner_size", "block_count", "feed_forward_length"]
    make.check_refusals(file, wrong, missing, optional=("ssm_conv1d.bias",))
