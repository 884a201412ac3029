"""Checkpoints of transformers: the graph that is read of one is the model that wrote it."""

import json
import os
from pathlib import Path

import gguf
import numpy as np
import pytest

from isobit.cli import main
from isobit.config import EngineConfig
from isobit.errors import ModelRefused
from isobit.gguf.formats import BF16, F16, F32, Q4_0, Q8_0, Format
from isobit.gguf.quantize import quantize
from isobit.gguf.reader import GGUFFile
from isobit.inspect import inspect, verdict
from isobit.model.checkpoint import TYPES, open_model
from isobit.model.weights import Weights
from isobit.runtime.model import Model
from isobit.verify.oracle import Oracle

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
SIZES = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip
MIXTURE = {
    "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64, "norm_topk_prob": True,
}  # fmt: skip
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1], "mrope_interleaved": True,
    },
}  # fmt: skip
MODELS = {
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", MIXTURE),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", DELTA),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", MIXTURE | DELTA),
    "llama": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            "head_dim": 16,
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral": (
        "MistralConfig",
        "MistralForCausalLM",
        {
            "sliding_window": None,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4},
        },
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "qwen2": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        "Glm4MoeForCausalLM",
        {
            "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5, "attention_bias": True,
            "use_qk_norm": True, "num_hidden_layers": 2,
        },
    ),
    "glm4_moe_lite": (
        "Glm4MoeLiteConfig",
        "Glm4MoeLiteForCausalLM",
        {
            "n_routed_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "num_hidden_layers": 2, "kv_lora_rank": 32, "q_lora_rank": 48, "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16, "v_head_dim": 24, "rms_norm_eps": 1e-6, "head_dim": 16,
            "num_key_value_heads": 4,
        },
    ),
    "lfm2": (
        "Lfm2Config",
        "Lfm2ForCausalLM",
        {
            "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"],
            "block_multiple_of": 32, "tie_word_embeddings": True,
        },
    ),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        "Lfm2MoeForCausalLM",
        {
            "num_hidden_layers": 2, "layer_types": ["full_attention", "conv"],
            "num_dense_layers": 1, "num_experts": 3, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "minimax_m2": (
        "MiniMaxM2Config",
        "MiniMaxM2ForCausalLM",
        {
            "num_local_experts": 3, "num_experts_per_tok": 2, "num_hidden_layers": 2,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
            },
        },
    ),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", MIXTURE | {"norm_topk_prob": False}),
}  # fmt: skip


def written(kind: str, folder: Path, seed: int = 0) -> None:
    """A random model of transformers, saved in bfloat16 in several shards."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config, cls, more = MODELS[kind]
    torch.manual_seed(seed)
    model = getattr(transformers, cls)(getattr(transformers, config)(**SIZES | more))
    with torch.no_grad():
        for name, p in model.named_parameters():
            spread = 0.3 if p.ndim == 1 else p.shape[-1] ** -0.5
            p.normal_(1.0 if p.ndim == 1 and "norm" in name else 0.0, spread)
        for name, buffer in model.named_buffers():
            if name.endswith(("correction_bias", "expert_bias")):
                buffer.normal_(0.0, 0.3)
    model.bfloat16().save_pretrained(folder, max_shard_size="60KB")


def transformers_logits(kind: str, folder: Path) -> np.ndarray:
    """Logits of ``IDS`` by transformers, in float64 but for what it does in float32 itself."""
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    model = getattr(transformers, MODELS[kind][1]).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        return model.double().eval()(torch.tensor([IDS])).logits[0].numpy()


@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    written(kind, tmp_path)
    expected = transformers_logits(kind, tmp_path)
    with open_model(tmp_path) as file:
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        got = Oracle(Weights.from_file(file)).evaluate(IDS).logits
    worst = float(np.abs(got - expected).max())
    assert worst < 2e-5 * float(np.abs(expected).max()), worst  # some of it is float32's


@pytest.mark.parametrize("kind", MODELS)
def test_a_converted_file_gives_the_folders_bits(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    written(kind, folder)
    for name in TYPES:
        out = tmp_path / f"{name}.gguf"
        assert main(["convert", str(folder), "-o", str(out), "--type", name]) == 0
        with open_model(f"{folder}:{name}") as made, GGUFFile.open(out) as file:
            assert {**file.metadata, **made.metadata} == file.metadata
            assert made.tensors.keys() == file.tensors.keys()
            for tensor, info in file.tensors.items():
                assert info.shape == made.tensors[tensor].shape
                assert info.format is made.tensors[tensor].format
                assert np.array_equal(file.data(tensor), made.data(tensor)), tensor
    engine = EngineConfig(context=64, max_sequences=1, threads=1)
    with (
        Model(f"{folder}:q8_0", "cpu", engine) as a,
        Model(out.with_stem("q8_0"), "cpu", engine) as b,
    ):
        assert np.array_equal(a.logits(IDS).view(np.int32), b.logits(IDS).view(np.int32))
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize("fmt", [F32, F16, BF16, Q8_0, Q4_0], ids=lambda f: f.name)
def test_rounding_is_the_gguf_packages(fmt: Format, rng: np.random.Generator) -> None:
    values = rng.standard_normal((64, 128)).astype(np.float32)
    values *= np.exp2(rng.integers(-20, 12, (64, 1))).astype(np.float32)
    values[0], values[1, ::3], values[2] = 0, -0.0, np.round(values[2] * 8) / 8  # zeros, ties
    values[3] = np.resize(np.float32([0.5, -0.5, 127, -127, 1.5]), 128)
    if fmt is BF16:  # NaN of which the low bits alone say so, infinity, what rounds to it
        odd = np.uint32([0x7F800001, 0xFF80FFFF, 0x7FC00000, 0x7F800000, 0x7F7FFFFF, 1, 0x8000])
        values[4] = np.resize(odd, 128).view(np.float32)
    expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType(fmt.ggml_type))
    assert np.array_equal(quantize(fmt, values), expected.reshape(-1).view(np.uint8))


def test_k_quants_are_llama_quantizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "x.gguf")
    assert main(["convert", str(tmp_path), "-o", out, "--type", "q4_k_m"]) == 2
    assert "llama-quantize BF16.gguf OUT.gguf Q4_K_M" in capsys.readouterr().err


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model_type": "bert"}, "model_type: expected one of .*llama"),
        ({"hidden_size": -1}, "hidden_size: expected an integer"),
        ({"num_hidden_layers": 5}, "tensor model.layers.4.*expected in the file, not found"),
        ({"num_hidden_layers": 3}, "expected only tensors of the architecture"),
        ({"num_experts": 4}, r"tensor model.layers.0.mlp.experts.3"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_a_config_that_does_not_fit(tmp_path: Path, changes: dict[str, object], line: str) -> None:
    written("qwen3_moe", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_experts"] = config.pop("num_local_experts", 3)
    config.pop("rope_parameters", None)
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_theta": 1e4, **changes}))
    with pytest.raises(ModelRefused, match=line) as refused, open_model(tmp_path) as file:
        Weights.from_file(file)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("end", [0, 4, 8, 100, -1])
def test_a_cut_shard_is_one_line(tmp_path: Path, end: int) -> None:
    written("qwen3", tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:end])
    with pytest.raises(ModelRefused, match=shard.name):
        open_model(tmp_path)


def test_a_shard_that_changes_while_it_is_open_is_refused(tmp_path: Path) -> None:
    written("qwen3", tmp_path)
    file = open_model(tmp_path)
    file.check_unchanged()
    shard = sorted(tmp_path.glob("*.safetensors"))[-1]
    os.truncate(shard, 8)
    for use in (file.check_unchanged, file.sha256):
        with pytest.raises(ModelRefused, match=f"{shard.name}: file: expected"):
            use()


def test_an_index_names_files_beside_it(tmp_path: Path) -> None:
    written("qwen3", tmp_path)
    edit(tmp_path / "model.safetensors.index.json", weight_map={"a": "../../etc/passwd"})
    with pytest.raises(ModelRefused, match="names of files beside it"):
        open_model(tmp_path)


def test_a_gpu_is_asked_about_the_type_that_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gpu:
        name = "a GPU"

        def memory(self) -> tuple[int, int]:
            return 1 << 30, 1 << 30

        def close(self) -> None:
            pass

    class Room:
        total, cache = 1000, 10

    planned = []

    def plan(weights: Weights, *_: object) -> Room:
        planned.append({t.format.name for t in weights.file.tensors.values()})
        return Room()

    monkeypatch.setattr("isobit.inspect.may_have_gpu", lambda: True)
    monkeypatch.setattr("isobit.backends.cuda.device.driver.available", lambda: (True, ""))
    monkeypatch.setattr("isobit.backends.cuda.device.gpu.CudaGpu", Gpu)
    monkeypatch.setattr("isobit.backends.cuda.steps.programs.planned", plan)
    written("qwen3", tmp_path)
    for name in (tmp_path, f"{tmp_path}:q8_0"):
        assert verdict(inspect(name)).backend == "cuda"
    assert "Q8_0" not in planned[0]
    assert "Q8_0" in planned[1]
