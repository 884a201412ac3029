"""A model that is not what the engine implements is refused by name, before anything is run."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest

import isobit
from isobit.errors import ModelRefused
from isobit.gguf.reader import GGUFFile
from isobit.inspect import inspect
from isobit.model.weights import Weights
from tests.helpers import synth
from tests.helpers.synth import Geometry, all_in, write_model

MOE = Geometry(layers=1, experts=4)
DENSE = Geometry(layers=1, experts=0, tied=True)


def refusal(path: Path) -> str:
    """The one line that refuses the model."""
    with GGUFFile.open(path) as file, pytest.raises(ModelRefused) as caught:
        Weights.from_file(file)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "expected" in message
    assert "\n" not in message
    assert len(message) < len(str(path)) + 250
    return message


def test_the_untouched_models_are_accepted(tmp_path: Path) -> None:
    for name, geometry in (("moe", MOE), ("dense", DENSE)):
        with GGUFFile.open(write_model(tmp_path / name, geometry)) as file:
            weights = Weights.from_file(file)
        assert weights.config.is_moe == (name == "moe")


MOE_TENSORS = [
    "token_embd.weight",
    "output_norm.weight",
    *(
        f"blk.0.{role}.weight"
        for role in (
            *("attn_norm", "attn_q", "attn_k", "attn_v", "attn_q_norm", "attn_k_norm"),
            *("attn_output", "ffn_norm", "ffn_gate_inp"),
            *("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"),
        )
    ),
]


@pytest.mark.parametrize("name", MOE_TENSORS)
def test_missing_tensor(name: str, tmp_path: Path) -> None:
    message = refusal(write_model(tmp_path / "m.gguf", MOE, without=[name]))
    assert name in message
    assert "not found" in message


@pytest.mark.parametrize("role", ["ffn_gate", "ffn_up", "ffn_down"])
def test_missing_dense_tensor(role: str, tmp_path: Path) -> None:
    name = f"blk.0.{role}.weight"
    assert name in refusal(write_model(tmp_path / "m.gguf", DENSE, without=[name]))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("token_embd.weight", (320, 512)),
        ("token_embd.weight", (4, 80, 256)),
        ("output.weight", (319, 256)),
        ("output_norm.weight", (255,)),
        ("blk.0.attn_norm.weight", (1, 256)),
        ("blk.0.attn_q.weight", (128, 256)),
        ("blk.0.attn_k.weight", (256, 256)),
        ("blk.0.attn_q_norm.weight", (256,)),
        ("blk.0.attn_output.weight", (512, 256)),
        ("blk.0.ffn_gate_inp.weight", (8, 256)),
        ("blk.0.ffn_gate_exps.weight", (8, 256, 256)),
        ("blk.0.ffn_up_exps.weight", (256, 256)),
        ("blk.0.ffn_down_exps.weight", (4, 256, 512)),
    ],
)
def test_misshapen_tensor(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    message = refusal(write_model(tmp_path / "m.gguf", MOE, reshaped={name: shape}))
    assert name in message
    if name != "token_embd.weight":
        assert str(shape) in message


def test_one_expert_as_ggml_writes_it(tmp_path: Path) -> None:
    """It drops dimensions of 1 at the end of its own order, the beginning of ours."""
    one = Geometry(layers=1, experts=1, experts_used=1)
    shapes: dict[str, tuple[int, ...]] = {
        f"blk.0.ffn_{role}_exps.weight": (256, 256) for role in ("gate", "up", "down")
    }
    shapes["blk.0.ffn_gate_inp.weight"] = (256,)
    paths = (
        write_model(tmp_path / "whole", one, all_in("Q8_0")),
        write_model(tmp_path / "dropped", one, all_in("Q8_0"), reshaped=shapes),
    )
    logits = []
    for path, backend in product(paths, ("reference", "cpu")):
        with isobit.load(path, backend) as model:
            logits.append(model.logits([1, 2, 3]).tobytes())
    assert len(set(logits)) == 1


@pytest.mark.parametrize("arch", ["qwen3moe", "qwen3", "llama"])
def test_queries_keys_and_values_in_one_tensor(arch: str, tmp_path: Path) -> None:
    """attn_qkv.weight, as some converters write it, is its three parts, one after the other."""
    g = Geometry(layers=2, experts=8 if arch == "qwen3moe" else 0)
    more: dict[str, Any] = {}
    if arch == "llama":
        keys = {k.replace("qwen3", arch): v for k, v in synth._hyper_parameters(g).items()}
        norms = {f"blk.{i}.attn_{x}_norm.weight" for i in range(g.layers) for x in "qk"}
        more = {"arch": arch, "metadata": keys, "without": norms}
    logits = []
    for fused, backend in product((False, True), ("reference", "cpu")):
        path = write_model(tmp_path / f"{fused}", g, all_in("Q8_0"), fused=fused, seed=3, **more)
        assert inspect(path).refused == []
        with isobit.load(path, backend) as model:
            assert ("blk.1.attn_qkv.weight" in model.file.tensors) is fused
            logits.append(model.logits([1, 2, 3]).tobytes())
    assert len(set(logits)) == 1


def test_a_tensor_of_all_three_that_does_not_fit(tmp_path: Path) -> None:
    parts = {f"blk.0.attn_{role}.weight" for role in "qkv"}
    extra = {"blk.0.attn_qkv.weight": (500, 256)}
    message = refusal(write_model(tmp_path / "m", MOE, without=parts, extra=extra))
    assert "blk.0.attn_qkv.weight: expected 512 rows, those of blk.0.attn_q.weight, " in message
    extra = {"blk.0.attn_qkv.weight": (512, 512)}
    message = refusal(write_model(tmp_path / "m", MOE, without=parts, extra=extra))
    assert "expected shape (256, 256) of blk.0.attn_q.weight, got (256, 512)" in message
    message = refusal(write_model(tmp_path / "m", MOE, extra=extra))  # beside its parts
    assert "blk.0.attn_qkv.weight" in message


@pytest.mark.parametrize("rows", [319, 321])
def test_embedding_of_another_vocabulary(rows: int, tmp_path: Path) -> None:
    """A row without a token could be generated and not be written."""
    shapes = {"token_embd.weight": (rows, 256), "output.weight": (rows, 256)}
    message = refusal(write_model(tmp_path / "m.gguf", MOE, reshaped=shapes))
    assert f"tokenizer.ggml.tokens: expected {rows} tokens" in message
    assert message.endswith("got 320")


@pytest.mark.parametrize(
    "name", ["blk.0.attn_q.bias", "rope_freqs.weight", "blk.0.ffn_up_shexp.weight", "blk.1.x"]
)
def test_tensor_that_no_role_takes(name: str, tmp_path: Path) -> None:
    """Ignoring a bias or a shared expert would run another model than the file's."""
    assert name in refusal(write_model(tmp_path / "m.gguf", MOE, extra={name: (256,)}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", 0),
        ("block_count", None),
        ("block_count", 1 << 31),
        ("block_count", "1"),
        ("block_count", True),
        ("embedding_length", None),
        ("embedding_length", 1 << 30),
        ("attention.head_count", 0),
        ("attention.head_count", [4, 4]),  # one for each layer, of which there is one
        ("attention.head_count", [True]),
        ("attention.head_count", [1.25e-300] * 100_000),  # not printed
        ("attention.head_count_kv", 0),
        ("attention.head_count_kv", 3),
        ("attention.head_count_kv", 8),
        ("attention.head_count_kv", [2, 2]),
        ("attention.key_length", 63),
        ("attention.key_length", 0),
        ("attention.key_length", 514),
        ("attention.key_length", -64),
        ("attention.value_length", 128),
        ("attention.layer_norm_rms_epsilon", None),
        ("attention.layer_norm_rms_epsilon", 0.0),
        ("attention.layer_norm_rms_epsilon", -1e-6),
        ("attention.layer_norm_rms_epsilon", float("nan")),
        ("attention.layer_norm_rms_epsilon", float("inf")),
        ("attention.sliding_window", 4096),
        ("expert_count", 0),
        ("expert_count", None),
        ("expert_used_count", 0),
        ("expert_used_count", 5),
        ("expert_feed_forward_length", None),
        ("expert_weights_norm", 1),
        ("expert_weights_scale", 2.5),
        ("expert_shared_count", 1),
        ("expert_gating_func", 2),
        ("leading_dense_block_count", 1),
        ("context_length", None),
        ("context_length", 0),
        ("vocab_size", 321),
        ("attention.causal", False),
        ("attention.scale", 0.5),
        ("final_logit_softcapping", 30.0),
        ("logit_scale", 0.5),
        ("rope.freq_base", None),
        ("rope.freq_base", 0.0),
        ("rope.freq_base", 1e-30),
        ("rope.freq_base", float("nan")),
        ("rope.freq_base", True),
        ("rope.dimension_count", 32),
        ("rope.dimension_sections", [16, 16, 0, 0]),
        ("rope.scaling.type", "no such thing\n\x1b[31m"),
        ("rope.scaling.factor", 4.0),
        ("rope.scaling.attn_factor", 0.5),
        ("rope.scaling.yarn_log_multiplier", 0.1),
        ("rope.scale_linear", 2.0),
    ],
)
def test_metadata(key: str, value: object, tmp_path: Path) -> None:
    key = f"qwen3moe.{key}"
    message = refusal(write_model(tmp_path / "m.gguf", MOE, metadata={key: value}))
    assert key in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.scaling.type", "none"),
        ("rope.scaling.factor", 1.0),
        ("rope.scaling.attn_factor", 1.0),
        ("rope.scaling.original_context_length", 512),
        ("rope.scaling.finetuned", False),
        ("rope.dimension_count", 64),
        ("attention.sliding_window", 0),
        ("expert_weights_scale", 1.0),
        ("expert_weights_norm", False),
        ("expert_gating_func", 1),
        ("vocab_size", 320),
    ],
)
def test_metadata_that_says_nothing_new(key: str, value: object, tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", MOE, metadata={f"qwen3moe.{key}": value})
    with GGUFFile.open(path) as file:
        Weights.from_file(file)


def test_metadata_that_may_be_missing(tmp_path: Path) -> None:
    geometry = Geometry(layers=1, experts=4, heads=8, kv_heads=8, head_dim=32)
    missing = {f"qwen3moe.attention.{key}": None for key in ("key_length", "head_count_kv")}
    path = write_model(tmp_path / "m.gguf", geometry, metadata=missing)
    with GGUFFile.open(path) as file:
        config = Weights.from_file(file).config
    assert (config.head_dim, config.n_kv_heads, config.normalise_experts) == (32, 8, True)


def test_another_architecture(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", MOE, arch="bert")
    assert "general.architecture" in refusal(path)
    path = write_model(tmp_path / "m.gguf", MOE, arch="t5", without=["token_embd.weight"])
    message = refusal(path)
    assert "general.architecture" in message
    assert "'t5'" in message


@pytest.mark.parametrize(
    ("arch", "kind", "way_on"),
    [
        ("clip", "mmproj", "runs without it"),
        ("clip", None, "runs without it"),
        ("qwen3moe", "adapter", "llama-export-lora"),
        ("imatrix", None, "llama-quantize"),
        ("gptoss", None, "hf://ggml-org/"),
    ],
)
def test_what_is_no_model_says_the_way_on(
    arch: str, kind: str | None, way_on: str, tmp_path: Path
) -> None:
    path = write_model(tmp_path / "m.gguf", MOE, arch=arch, metadata={"general.type": kind})
    assert way_on in refusal(path)


def test_a_vocabulary_alone() -> None:
    path = Path(__file__).parents[1] / "data/qwen2-vocab.gguf"
    assert "vocabulary without weights" in refusal(path)


def test_load_refuses_too(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", MOE, all_in("Q8_0"), without=["output_norm.weight"])
    with pytest.raises(ModelRefused, match="output_norm"):
        isobit.load(path, backend="reference")
    assert ModelRefused.exit_code == 3
