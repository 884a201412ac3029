"""gpt-oss: random weights of odd shapes, bit for bit on the backends, and against transformers' own
model in float64."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isobit.backends.reference import ReferenceBackend
from isobit.config import EngineConfig
from isobit.errors import ModelRefused
from isobit.gguf.reader import GGUFFile
from isobit.model.architectures import read_config
from isobit.model.parallel.split import split
from isobit.model.weights import Weights
from tests.helpers import random_models as make
from tests.helpers.expected import needs
from tests.helpers.passes import opened, run_cut, same_bits
from tests.helpers.random_file import F32, RandomFile
from tests.helpers.synth import Geometry
from tests.model.test_split import Meeting, passes

SMALL = Geometry(3, 96, 6, 2, 64, experts=5, experts_used=3, ffn=160, vocab=300)
WINDOW = 70  # longer than a tile of keys, shorter than the text
YARN = {"factor": 8.0, "original_context_length": 64}
TOKENS = np.random.default_rng(6).integers(0, SMALL.vocab, 150).tolist()


def write(path: Path, g: Geometry = SMALL, experts: str = "MXFP4", **how: Any) -> dict[str, F32]:
    """``experts``: the format of their matrices."""
    keys = make.common_keys(g) | {
        "attention.sliding_window": WINDOW,
        "expert_feed_forward_length": g.ffn,
        "rope.freq_base": 150000.0,
        "rope.scaling.type": "yarn",
        **{f"rope.scaling.{name}": value for name, value in YARN.items()},
    }
    f = RandomFile(path, "gpt-oss", keys, **how)
    for at in make.beginning(f, g):
        f.vector(at + "attn_norm.weight", g.hidden)
        f.vector(at + "post_attention_norm.weight", g.hidden)
        for role, heads in (("q", g.heads), ("k", g.kv_heads), ("v", g.kv_heads)):
            f.matrix(f"{at}attn_{role}.weight", heads * g.head_dim, g.hidden, spread=2)
            f.vector(f"{at}attn_{role}.bias", heads * g.head_dim, about=0, spread=0.5)
        f.matrix(at + "attn_output.weight", g.hidden, g.heads * g.head_dim)
        f.vector(at + "attn_output.bias", g.hidden, about=0, spread=0.3)
        f.vector(at + "attn_sinks.weight", g.heads, about=3, spread=2)
        f.matrix(at + "ffn_gate_inp.weight", g.experts, g.hidden, fmt="F32", spread=2)
        f.vector(at + "ffn_gate_inp.bias", g.experts, about=0, spread=1)
        for role, rows, columns in (
            ("gate", g.ffn, g.hidden),
            ("up", g.ffn, g.hidden),
            ("down", g.hidden, g.ffn),
        ):  # some beyond the clamp
            name = f"{at}ffn_{role}_exps"
            f.matrix(f"{name}.weight", g.experts, rows, columns, fmt=experts, spread=4)
            f.vector(f"{name}.bias", g.experts, rows, about=0, spread=1)
    return f.close()


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, F32]]:
    path = tmp_path_factory.mktemp("gpt-oss") / "m.gguf"
    return path, write(path)


@pytest.fixture(scope="module")
def file(values: tuple[Path, dict[str, F32]]) -> Iterator[GGUFFile]:
    with GGUFFile.open(values[0]) as found:
        yield found


def engine(planes: int) -> EngineConfig:
    return EngineConfig(activation_bits=8 * planes, context=256, max_sequences=1)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("name", ["cpu", "wgpu"])
def test_bits(file: GGUFFile, planes: int, name: str) -> None:
    weights = Weights.from_file(file)
    expected = run_cut(opened("reference", weights, engine(planes)), TOKENS, [0])
    backend = opened(name, weights, engine(planes))
    for cuts in ([0], [0, 1, 2, 31, 64, 65, 139]):
        assert same_bits(run_cut(backend, TOKENS, cuts), expected), cuts
    backend.close()


def test_transformers_in_float64(file: GGUFFile, values: tuple[Path, dict[str, F32]]) -> None:
    needs("torch", "torch")
    needs("transformers", "transformers")
    true = make.logits_of(transformers_model(values[1]), TOKENS)
    make.check_accuracy(file, TOKENS, true, within=1e-4)


def transformers_model(w: dict[str, F32]) -> Any:
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    g = SMALL
    config = transformers.GptOssConfig(
        num_hidden_layers=g.layers,
        num_local_experts=g.experts,
        num_experts_per_tok=g.experts_used,
        vocab_size=g.vocab,
        hidden_size=g.hidden,
        intermediate_size=g.ffn,
        head_dim=g.head_dim,
        num_attention_heads=g.heads,
        num_key_value_heads=g.kv_heads,
        sliding_window=WINDOW,
        rms_norm_eps=float(np.float32(1e-5)),
        max_position_embeddings=g.context,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": YARN["factor"],
            "original_max_position_embeddings": YARN["original_context_length"],
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": True,  # as llama.cpp rounds the ramp's ends; OpenAI's file says not to
        },
        attn_implementation="eager",
        experts_implementation="eager",
    )
    names = {
        "attn_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate_inp": "mlp.router",
    }
    state = {
        "model.embed_tokens.weight": w["token_embd.weight"],
        "model.norm.weight": w["output_norm.weight"],
        "lm_head.weight": w["output.weight"],
    }
    for i in range(g.layers):
        ours, theirs = f"blk.{i}.", f"model.layers.{i}."
        for role, name in names.items():
            for what in ("weight", "bias"):
                if (value := w.get(f"{ours}{role}.{what}")) is not None:
                    state[f"{theirs}{name}.{what}"] = value
        state[theirs + "self_attn.sinks"] = w[ours + "attn_sinks.weight"]
        for what, tail in (("weight", ""), ("bias", "_bias")):
            gate, up, down = (w[f"{ours}ffn_{r}_exps.{what}"] for r in ("gate", "up", "down"))
            both = np.stack([gate, up], axis=2).reshape(
                g.experts, 2 * g.ffn, *gate.shape[2:]
            )  # in turns
            state[f"{theirs}mlp.experts.gate_up_proj{tail}"] = both.swapaxes(1, -1)
            state[f"{theirs}mlp.experts.down_proj{tail}"] = down.swapaxes(1, -1)
    model = transformers.GptOssForCausalLM(config)
    model.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in state.items()})
    return model.double().eval()


@pytest.mark.parametrize("parts", [2, 3])
def test_parts(file: GGUFFile, parts: int) -> None:
    """Each part has the sinks of its own heads."""
    w, seed = Weights.from_file(file), 5
    settings = EngineConfig(context=64, max_sequences=2)
    (whole,) = passes([ReferenceBackend(w, settings)], SMALL.vocab, np.random.default_rng(seed))
    meeting, backends = Meeting(parts), []
    for rank in range(parts):
        mine = Weights(w.config, split(w.graph, rank, parts).graph)
        backends.append(ReferenceBackend(mine, settings, exchange=meeting.exchange(rank)))
    for logits in passes(backends, SMALL.vocab, np.random.default_rng(seed)):
        assert same_bits(logits, whole)


def test_what_a_file_lacks_is_refused_by_one_line(file: GGUFFile) -> None:
    for key in ("attention.sliding_window", "rope.scaling.factor", "expert_feed_forward_length"):
        metadata = {k: v for k, v in file.metadata.items() if k != f"gpt-oss.{key}"}
        with pytest.raises(ModelRefused, match=key):
            read_config(metadata, vocab=SMALL.vocab, source="m.gguf")
    for name, tensor in list(file.tensors.items()):
        del file.tensors[name]  # type: ignore[attr-defined]
        with pytest.raises(ModelRefused, match=name):
            Weights.from_file(file)
        file.tensors[name] = tensor  # type: ignore[index]
    for key, value in (
        ("attention.sliding_window_pattern", 3),
        ("expert_gating_func", 2),
        ("rope.dimension_count", 32),
    ):
        with pytest.raises(ModelRefused, match=key):
            read_config(
                file.metadata | {f"gpt-oss.{key}": value}, vocab=SMALL.vocab, source="m.gguf"
            )
