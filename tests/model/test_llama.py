"""Llama and its relatives: files of random weights, bit for bit on the backends, and against
transformers' own models in float64."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isobit.config import EngineConfig
from isobit.errors import ModelRefused
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights
from tests.helpers import random_models as make
from tests.helpers.passes import opened, run_cut, same_bits
from tests.helpers.random_file import F32, RandomFile
from tests.helpers.synth import Geometry

PLAIN = Geometry(head_dim=32, ffn=512, vocab=300, experts=0)
GEOMETRIES = {
    "llama": PLAIN,
    "llama3": replace(PLAIN, head_dim=64, hidden=160, heads=5, kv_heads=1, ffn=96),
    "mixtral": replace(PLAIN, experts=4),
    "qwen2": replace(PLAIN, tied=True),
    "qwen2moe": replace(
        PLAIN, hidden=192, heads=3, kv_heads=1, head_dim=64, ffn=96, experts=5, experts_used=3
    ),
    "linear": PLAIN,
    "yarn": PLAIN,
}
SHARED = 224  # width of Qwen2-MoE's shared expert
TOKENS = np.random.default_rng(2).integers(0, 300, 90).tolist()


@dataclass(frozen=True)
class Written:
    """A model of a kind, and what it is made of."""

    kind: str
    file: GGUFFile
    weights: Weights
    values: dict[str, F32]
    expected: dict[int, F32]
    """The reference's logits by the number of planes."""


def engine(planes: int) -> EngineConfig:
    return EngineConfig(activation_bits=8 * planes, context=128, max_sequences=1)


@pytest.fixture(scope="module", params=GEOMETRIES)
def written(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Written]:
    path = tmp_path_factory.mktemp("llama") / "m.gguf"
    values = write(path, request.param)
    with GGUFFile.open(path) as file:
        weights = Weights.from_file(file)
        expected = {
            n: run_cut(opened("reference", weights, engine(n)), TOKENS, [0]) for n in (1, 2)
        }
        yield Written(request.param, file, weights, values, expected)


def write(path: Path, kind: str, g: Geometry | None = None, **how: Any) -> dict[str, F32]:
    """A two-layer model of a kind, quantised to Q8_0; its weights as the file holds them."""
    g = g or GEOMETRIES[kind]
    keys = make.common_keys(g) | {"context_length": 4096}
    if kind == "qwen2moe":
        keys["expert_feed_forward_length"] = g.ffn
        keys["expert_shared_feed_forward_length"] = SHARED
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": 4.0}
        keys["rope.scaling.original_context_length"] = 1024
    qwen = kind.startswith("qwen2")
    f = RandomFile(path, kind if qwen else "llama", keys, **how)
    f.matrix("token_embd.weight", g.vocab, g.hidden)
    for i in range(g.layers):
        at = f"blk.{i}."
        f.vector(at + "attn_norm.weight", g.hidden)
        for role, heads in (("q", g.heads), ("k", g.kv_heads), ("v", g.kv_heads)):
            f.matrix(f"{at}attn_{role}.weight", heads * g.head_dim, g.hidden)
            if qwen:
                f.vector(f"{at}attn_{role}.bias", heads * g.head_dim, about=0, spread=0.3)
        f.matrix(at + "attn_output.weight", g.hidden, g.heads * g.head_dim)
        f.vector(at + "ffn_norm.weight", g.hidden)
        stack, tail = ((g.experts,), "_exps") if g.experts else ((), "")
        if stack:
            f.matrix(at + "ffn_gate_inp.weight", g.experts, g.hidden, spread=2)
        make.feed_forward(f, at, tail, g.hidden, g.ffn, *stack)
        if kind == "qwen2moe":
            make.feed_forward(f, at, "_shexp", g.hidden, SHARED)
            f.vector(at + "ffn_gate_inp_shexp.weight", g.hidden, about=0)
    f.vector("output_norm.weight", g.hidden)
    if not g.tied:
        f.matrix("output.weight", g.vocab, g.hidden)
    if kind == "llama3":
        f.put("rope_freqs.weight", f.rng.uniform(1, 8, g.head_dim // 2))
    return f.close()


@pytest.mark.parametrize("name", ["cpu", "wgpu"])
def test_bits(written: Written, name: str) -> None:
    for planes, expected in written.expected.items():
        backend = opened(name, written.weights, engine(planes))
        for cuts in ([0], [0, 1, 2, 31, 64, 65]):
            assert same_bits(run_cut(backend, TOKENS, cuts), expected), (planes, cuts)
        backend.close()


def test_transformers_in_float64(written: Written) -> None:
    model = transformers_model(written.kind, written.values)
    make.check_accuracy(written.file, TOKENS, make.logits_of(model, TOKENS), within=2e-5)


def transformers_model(kind: str, w: dict[str, F32]) -> Any:
    g = GEOMETRIES[kind]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    if kind == "linear":
        rope |= {"rope_type": "linear", "factor": 4.0}
    if kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    settings = make.settings(g) | {"max_position_embeddings": 4096, "rope_parameters": rope}
    families = {"qwen2": "Qwen2", "mixtral": "Mixtral", "qwen2moe": "Qwen2Moe"}
    if g.experts:
        settings["num_experts" if kind == "qwen2moe" else "num_local_experts"] = g.experts
        settings |= {"sliding_window": None}
    if kind == "qwen2moe":
        settings |= {"moe_intermediate_size": g.ffn, "norm_topk_prob": False}
        settings |= {"shared_expert_intermediate_size": SHARED}
    names = make.NAMES | {
        "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
        "ffn_up_shexp": "mlp.shared_expert.up_proj",
        "ffn_down_shexp": "mlp.shared_expert.down_proj",
        "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
        "ffn_gate+ffn_up_exps": "mlp.experts.gate_up_proj!",
        "ffn_down_exps": "mlp.experts.down_proj!",
    }
    state = make.transformers_state(w, g, names, neighbours=not kind.startswith("qwen2"))
    state = {k: v[None] if k.endswith("shared_expert_gate.weight") else v for k, v in state.items()}
    model = make.loaded(families.get(kind, "Llama"), settings, state)
    rotary = model.model.rotary_emb
    if "rope_freqs.weight" in w:  # what Llama 3's scaling comes to
        import torch  # noqa: PLC0415

        rotary.inv_freq = rotary.inv_freq / torch.from_numpy(w["rope_freqs.weight"])
    return model


def test_an_unknown_scaling_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path, "llama")
    with GGUFFile.open(path) as file:
        file.metadata["llama.rope.scaling.type"] = "dynamic"  # type: ignore[index]
        with pytest.raises(ModelRefused, match="expected none, linear or yarn, got 'dynamic'"):
            Weights.from_file(file)
