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
from isobit.verify.oracle import Oracle
from tests.helpers.expected import needs
from tests.helpers.passes import opened, run_cut, same_bits
from tests.helpers.random_file import F32, RandomFile
from tests.model.test_split import Meeting, passes

LAYERS, HIDDEN, H, G, D, E, K, FFN, VOCAB = 3, 96, 6, 2, 64, 5, 3, 160, 300
WINDOW = 70  # longer than a tile of keys, shorter than the text
YARN = {"factor": 8.0, "original_context_length": 64}
TOKENS = np.random.default_rng(6).integers(0, VOCAB, 150).tolist()
KEYS: dict[str, object] = {
    "block_count": LAYERS,
    "context_length": 4096,
    "embedding_length": HIDDEN,
    "feed_forward_length": FFN,
    "attention.head_count": H,
    "attention.head_count_kv": G,
    "attention.key_length": D,
    "attention.value_length": D,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.sliding_window": WINDOW,
    "expert_count": E,
    "expert_used_count": K,
    "expert_feed_forward_length": FFN,
    "rope.freq_base": 150000.0,
    "rope.scaling.type": "yarn",
    **{f"rope.scaling.{name}": value for name, value in YARN.items()},
}


def write(path: Path) -> dict[str, F32]:
    f = RandomFile(path, "gpt-oss", KEYS)
    f.matrix("token_embd.weight", VOCAB, HIDDEN)
    for i in range(LAYERS):
        at = f"blk.{i}."
        f.vector(at + "attn_norm.weight", HIDDEN)
        f.vector(at + "post_attention_norm.weight", HIDDEN)
        for role, rows in (("q", H * D), ("k", G * D), ("v", G * D)):
            f.matrix(f"{at}attn_{role}.weight", rows, HIDDEN, spread=2)
            f.vector(f"{at}attn_{role}.bias", rows, about=0, spread=0.5)
        f.matrix(at + "attn_output.weight", HIDDEN, H * D)
        f.vector(at + "attn_output.bias", HIDDEN, about=0, spread=0.3)
        f.vector(at + "attn_sinks.weight", H, about=3, spread=2)
        f.matrix(at + "ffn_gate_inp.weight", E, HIDDEN, fmt="F32", spread=2)
        f.vector(at + "ffn_gate_inp.bias", E, about=0, spread=1)
        for role, rows, columns in (
            ("gate", FFN, HIDDEN),
            ("up", FFN, HIDDEN),
            ("down", HIDDEN, FFN),
        ):  # some beyond the clamp
            f.matrix(f"{at}ffn_{role}_exps.weight", E, rows, columns, fmt="MXFP4", spread=4)
            f.vector(f"{at}ffn_{role}_exps.bias", E, rows, about=0, spread=1)
    f.vector("output_norm.weight", HIDDEN)
    f.matrix("output.weight", VOCAB, HIDDEN)
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
    torch = needs("torch", "torch")
    needs("transformers", "transformers")
    model = transformers_model(values[1])
    with torch.no_grad():
        true = model(torch.tensor([TOKENS]), use_cache=False).logits[0].numpy()
    found = Oracle.of(file).evaluate(TOKENS).logits
    assert np.abs(found - true).max() < 1e-4 * np.abs(true).max()  # its angles are float32
    ours = run_cut(opened("cpu", Weights.from_file(file), engine(2)), TOKENS, [0])
    # Row by row: where two experts are as good as equal, one row may take the other.
    errors = np.linalg.norm(ours - true, axis=1) / np.linalg.norm(true, axis=1)
    assert np.median(errors) < 2e-3


def transformers_model(w: dict[str, F32]) -> Any:
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    config = transformers.GptOssConfig(
        num_hidden_layers=LAYERS,
        num_local_experts=E,
        num_experts_per_tok=K,
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        head_dim=D,
        num_attention_heads=H,
        num_key_value_heads=G,
        sliding_window=WINDOW,
        rms_norm_eps=float(np.float32(1e-5)),
        max_position_embeddings=4096,
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
    for i in range(LAYERS):
        ours, theirs = f"blk.{i}.", f"model.layers.{i}."
        for role, name in names.items():
            for what in ("weight", "bias"):
                if (value := w.get(f"{ours}{role}.{what}")) is not None:
                    state[f"{theirs}{name}.{what}"] = value
        state[theirs + "self_attn.sinks"] = w[ours + "attn_sinks.weight"]
        for what, tail in (("weight", ""), ("bias", "_bias")):
            gate, up, down = (w[f"{ours}ffn_{r}_exps.{what}"] for r in ("gate", "up", "down"))
            both = np.stack([gate, up], axis=2).reshape(E, 2 * FFN, *gate.shape[2:])  # in turns
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
    (whole,) = passes([ReferenceBackend(w, settings)], VOCAB, np.random.default_rng(seed))
    meeting, backends = Meeting(parts), []
    for rank in range(parts):
        mine = Weights(w.config, split(w.graph, rank, parts).graph)
        backends.append(ReferenceBackend(mine, settings, exchange=meeting.exchange(rank)))
    for logits in passes(backends, VOCAB, np.random.default_rng(seed)):
        assert same_bits(logits, whole)


def test_what_a_file_lacks_is_refused_by_one_line(file: GGUFFile) -> None:
    for key in ("attention.sliding_window", "rope.scaling.factor", "expert_feed_forward_length"):
        metadata = {k: v for k, v in file.metadata.items() if k != f"gpt-oss.{key}"}
        with pytest.raises(ModelRefused, match=key):
            read_config(metadata, vocab=VOCAB, source="m.gguf")
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
            read_config(file.metadata | {f"gpt-oss.{key}": value}, vocab=VOCAB, source="m.gguf")
