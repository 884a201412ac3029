"""Qwen3-Next: random weights of odd shapes, against transformers' own model in float64."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isobit.config import EngineConfig
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights
from tests.helpers import random_models as make
from tests.helpers.passes import opened, run_cut, same_bits
from tests.helpers.random_file import F32, RandomFile
from tests.helpers.synth import Geometry

G = Geometry(3, 160, 3, 1, 64, experts=5, experts_used=2, ffn=96, vocab=300)
RECURRENT = [True, False, True]
K, V, N = 2, 6, 32  # heads of the delta net, and their size
CHANNELS, SHARED = (2 * K + V) * N, 224
TOKENS = np.random.default_rng(11).integers(0, 300, 80).tolist()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[GGUFFile, dict[str, F32]]]:
    path = tmp_path_factory.mktemp("qwen3next") / "m.gguf"
    values = write(path)
    with GGUFFile.open(path) as file:
        yield file, values


def write(path: Path, g: Geometry = G, kind: str = "qwen3next", **how: Any) -> dict[str, F32]:
    """Qwen3.5's, too (``qwen35``, ``qwen35moe``): beta and alpha are two matrices."""
    keys = make.common_keys(g) | {
        "rope.dimension_count": 16,
        "attention.recurrent_layers": [RECURRENT[i % 3] for i in range(g.layers)],
        "ssm.conv_kernel": 4,
        "ssm.state_size": N,
        "ssm.group_count": K,
        "ssm.time_step_rank": V,
        "ssm.inner_size": V * N,
    }
    if g.experts:
        keys |= {"expert_feed_forward_length": g.ffn, "expert_shared_feed_forward_length": SHARED}
    if kind != "qwen3next":
        keys |= {"rope.dimension_sections": [3, 3, 2, 0]}
    f = RandomFile(path, kind, keys, **how)
    for i, at in enumerate(make.beginning(f, g)):
        f.vector(at + "attn_norm.weight", g.hidden)
        f.vector(at + "post_attention_norm.weight", g.hidden)
        if RECURRENT[i % 3]:
            f.matrix(at + "attn_qkv.weight", CHANNELS, g.hidden)
            f.matrix(at + "attn_gate.weight", V * N, g.hidden)
            if kind == "qwen3next":
                f.matrix(at + "ssm_ba.weight", 2 * V, g.hidden)
            else:
                f.matrix(at + "ssm_beta.weight", V, g.hidden)
                f.matrix(at + "ssm_alpha.weight", V, g.hidden)
            f.vector(at + "ssm_conv1d.weight", CHANNELS, 4, about=0, spread=0.5)
            f.vector(at + "ssm_dt.bias", V, about=0, spread=1)
            f.put(at + "ssm_a", -np.exp(f.rng.standard_normal(V)))
            f.vector(at + "ssm_norm.weight", N)
            f.matrix(at + "ssm_out.weight", g.hidden, V * N)
        else:
            f.matrix(at + "attn_q.weight", 2 * g.heads * g.head_dim, g.hidden)
            f.matrix(at + "attn_k.weight", g.kv_heads * g.head_dim, g.hidden)
            f.matrix(at + "attn_v.weight", g.kv_heads * g.head_dim, g.hidden)
            f.vector(at + "attn_q_norm.weight", g.head_dim)
            f.vector(at + "attn_k_norm.weight", g.head_dim)
            f.matrix(at + "attn_output.weight", g.hidden, g.heads * g.head_dim)
        if g.experts:
            make.mixture(f, at, g)
            make.feed_forward(f, at, "_shexp", g.hidden, SHARED)
            f.vector(at + "ffn_gate_inp_shexp.weight", g.hidden, about=0)
        else:
            make.feed_forward(f, at, "", g.hidden, g.ffn)
    return f.close()


def test_bits(made: tuple[GGUFFile, dict[str, F32]]) -> None:
    make.check_bits(made[0], TOKENS, ["cpu"])


def test_bits_on_a_device(made: tuple[GGUFFile, dict[str, F32]]) -> None:
    """A prompt and a step: what runs there of it alone is a parameter of one kernel."""
    weights, engine = Weights.from_file(made[0]), EngineConfig(context=64, max_sequences=1)
    found = []
    for name in ("cpu", "wgpu"):
        backend = opened(name, weights, engine)
        found.append(run_cut(backend, TOKENS[:9], [0, 8]))
        backend.close()
    assert same_bits(*found)


def test_transformers_in_float64(made: tuple[GGUFFile, dict[str, F32]]) -> None:
    file, w = made
    names = make.NAMES | {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_gate+ffn_up_exps": "mlp.experts.gate_up_proj!",
        "ffn_down_exps": "mlp.experts.down_proj!",
        "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
        "ffn_up_shexp": "mlp.shared_expert.up_proj",
        "ffn_down_shexp": "mlp.shared_expert.down_proj",
        "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
        "attn_qkv": "linear_attn.in_proj_qkvz",
        "ssm_ba": "linear_attn.in_proj_ba",
        "ssm_conv1d": "linear_attn.conv1d",
        "ssm_dt.bias": "linear_attn.dt_bias!",
        "ssm_norm": "linear_attn.norm",
        "ssm_out": "linear_attn.out_proj",
    }
    rest = {k: v for k, v in w.items() if not k.endswith(("ssm_a", "attn_gate.weight"))}
    state = make.transformers_state(rest, G, names)
    for name, value in state.items():
        if "norm" in name and "linear_attn" not in name:
            state[name] = value - 1
        elif "shared_expert_gate" in name:
            state[name] = value[None]
        elif "conv1d" in name:
            state[name] = value[:, None]
    for i in (0, 2):
        at = f"model.layers.{i}.linear_attn."
        q, k, v = np.split(w[f"blk.{i}.attn_qkv.weight"], [K * N, 2 * K * N])
        parts = [x.reshape(K, -1, G.hidden) for x in (q, k, v, w[f"blk.{i}.attn_gate.weight"])]
        state[at + "in_proj_qkvz.weight"] = np.concatenate(parts, axis=1).reshape(-1, G.hidden)
        state[at + "A_log"] = np.log(-w[f"blk.{i}.ssm_a"])
    settings = make.settings(G) | {
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": N,
        "linear_value_head_dim": N,
        "linear_num_key_heads": K,
        "linear_num_value_heads": V,
        "num_experts": G.experts,
        "moe_intermediate_size": G.ffn,
        "shared_expert_intermediate_size": SHARED,
        "norm_topk_prob": True,
        "layer_types": ["linear_attention" if r else "full_attention" for r in RECURRENT],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
        },
    }
    model = make.loaded("Qwen3Next", settings, state)
    make.check_accuracy(file, TOKENS, make.logits_of(model, TOKENS))


def test_a_damaged_file_is_refused(made: tuple[GGUFFile, dict[str, F32]]) -> None:
    wrong = {"ssm.group_count": 4, "ssm.inner_size": 5, "attention.recurrent_layers": [True]}
    make.check_refusals(made[0], wrong, ["ssm.state_size", "expert_count", "rope.dimension_count"])


@pytest.mark.parametrize("parts", [2, 3])
def test_parts(made: tuple[GGUFFile, dict[str, F32]], parts: int) -> None:
    make.check_parts(made[0], parts)
