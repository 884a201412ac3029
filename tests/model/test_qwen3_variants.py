"""Qwen3 as other files have it: the text of Qwen3-VL, YaRN, gate and up of all experts in one
tensor, what is the same in every layer listed by layer."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isobit.config import EngineConfig
from isobit.errors import ModelRefused
from isobit.gguf.reader import GGUFFile
from isobit.model.architectures import read_config
from isobit.model.weights import Weights
from tests.helpers import random_models as make
from tests.helpers.expected import needs
from tests.helpers.passes import opened, run_cut, same_bits
from tests.helpers.random_file import F32, RandomFile

LAYERS, HIDDEN, H, G, D, E, K, FFN, VOCAB = 2, 96, 3, 1, 64, 5, 2, 160, 300
TOKENS = np.random.default_rng(8).integers(0, VOCAB, 80).tolist()
SECTIONS = [12, 10, 10, 0]  # of the 32 pairs, for positions in images
KINDS = ("qwen3vlmoe", "qwen3vl", "yarn", "fused")


@dataclass(frozen=True)
class Written:
    """A model of a kind, and what it is made of."""

    kind: str
    file: GGUFFile
    weights: Weights
    values: dict[str, F32]


@pytest.fixture(scope="module", params=KINDS)
def written(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Written]:
    path = tmp_path_factory.mktemp("qwen3") / "m.gguf"
    values = write(path, request.param)
    with GGUFFile.open(path) as file:
        yield Written(request.param, file, Weights.from_file(file), values)


def write(path: Path, kind: str) -> dict[str, F32]:
    moe = kind != "qwen3vl"
    keys: dict[str, object] = {
        "block_count": LAYERS,
        "context_length": 4096,
        "embedding_length": HIDDEN,
        "feed_forward_length": [FFN] * LAYERS,
        "attention.head_count": [H] * LAYERS,
        "attention.head_count_kv": [G] * LAYERS,
        "attention.key_length": D,
        "attention.value_length": D,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e6,
    }
    if moe:
        keys |= {"expert_count": E, "expert_used_count": K, "expert_feed_forward_length": FFN}
    if kind.startswith("qwen3vl"):
        keys |= {"rope.dimension_sections": SECTIONS, "n_deepstack_layers": 3}
    if kind == "yarn":
        keys |= {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
        keys["rope.scaling.original_context_length"] = 1024
    f = RandomFile(path, kind if kind.startswith("qwen3vl") else "qwen3moe", keys)
    f.matrix("token_embd.weight", VOCAB, HIDDEN)
    for i in range(LAYERS):
        at, stack, tail = f"blk.{i}.", (E,) if moe else (), "_exps" if moe else ""
        f.vector(at + "attn_norm.weight", HIDDEN)
        f.vector(at + "ffn_norm.weight", HIDDEN)
        for role, heads in (("q", H), ("k", G), ("v", G)):
            f.matrix(f"{at}attn_{role}.weight", heads * D, HIDDEN)
        f.vector(at + "attn_q_norm.weight", D)
        f.vector(at + "attn_k_norm.weight", D)
        f.matrix(at + "attn_output.weight", HIDDEN, H * D)
        if moe:
            f.matrix(at + "ffn_gate_inp.weight", E, HIDDEN, spread=2)
        if kind == "fused":
            f.matrix(at + "ffn_gate_up_exps.weight", E, 2 * FFN, HIDDEN)
        else:
            f.matrix(f"{at}ffn_gate{tail}.weight", *stack, FFN, HIDDEN)
            f.matrix(f"{at}ffn_up{tail}.weight", *stack, FFN, HIDDEN)
        f.matrix(f"{at}ffn_down{tail}.weight", *stack, HIDDEN, FFN)
    f.vector("output_norm.weight", HIDDEN)
    f.matrix("output.weight", VOCAB, HIDDEN)
    return f.close()


@pytest.mark.parametrize("name", ["cpu", "wgpu"])
def test_bits(written: Written, name: str) -> None:
    for planes in (1, 2):
        engine = EngineConfig(activation_bits=8 * planes, context=128, max_sequences=1)
        expected = run_cut(opened("reference", written.weights, engine), TOKENS, [0])
        backend = opened(name, written.weights, engine)
        for cuts in ([0], [0, 1, 2, 31, 64, 65]):
            assert same_bits(run_cut(backend, TOKENS, cuts), expected), (planes, cuts)
        backend.close()


def test_transformers_in_float64(written: Written) -> None:
    torch = needs("torch", "torch")
    needs("transformers", "transformers")
    model = transformers_model(written.kind, written.values)
    with torch.no_grad():
        hidden = model(torch.tensor([TOKENS]), use_cache=False).last_hidden_state[0].numpy()
    true = hidden @ written.values["output.weight"].astype(np.float64).T
    make.check_accuracy(written.file, TOKENS, true, within=1e-4)


def transformers_model(kind: str, w: dict[str, F32]) -> Any:
    """The model below the output matrix: the text part of Qwen3-VL is a class of its own."""
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    moe = kind != "qwen3vl"
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6}
    if kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    if kind.startswith("qwen3vl"):
        rope["mrope_section"] = SECTIONS[:3]
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": H,
        "num_key_value_heads": G,
        "head_dim": D,
        "rms_norm_eps": float(np.float32(1e-6)),
        "max_position_embeddings": 4096,
        "rope_parameters": rope,
        "attn_implementation": "eager",
    }
    if moe:
        settings |= {"num_experts": E, "num_experts_per_tok": K, "moe_intermediate_size": FFN}
        settings |= {"norm_topk_prob": True, "experts_implementation": "eager"}
    family = {"qwen3vl": "Qwen3VLText", "qwen3vlmoe": "Qwen3VLMoeText"}.get(kind, "Qwen3Moe")
    config = getattr(transformers, family + "Config")(**settings)
    model = getattr(transformers, family + "Model")(config)
    roles = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "attn_output": "self_attn.o_proj",
        "ffn_gate_inp": "mlp.gate",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    state = {"embed_tokens.weight": w["token_embd.weight"], "norm.weight": w["output_norm.weight"]}
    for i in range(LAYERS):
        ours, theirs = f"blk.{i}.", f"layers.{i}."
        for role, name in roles.items():
            if (value := w.get(f"{ours}{role}.weight")) is not None:
                state[f"{theirs}{name}.weight"] = value
        if moe:
            both = w.get(ours + "ffn_gate_up_exps.weight")
            if both is None:
                parts = [w[f"{ours}ffn_{role}_exps.weight"] for role in ("gate", "up")]
                both = np.concatenate(parts, axis=1)
            name = theirs + "mlp.experts."
            down = w[ours + "ffn_down_exps.weight"]
            for key, value in (("gate_up_proj", both), ("down_proj", down)):
                turned = shapes[name + key] != value.shape
                state[name + key] = value.swapaxes(1, 2) if turned else value
    model.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in state.items()})
    return model.double().eval()


def test_layers_that_differ_are_refused(written: Written) -> None:
    arch = written.weights.config.architecture
    for name, value in (("head_count", [3, 6]), ("head_count_kv", [1, 0]), ("head_count", [3])):
        key = f"{arch}.attention.{name}"
        with pytest.raises(ModelRefused, match=key):
            read_config(written.file.metadata | {key: value}, vocab=VOCAB, source="m.gguf")
