"""Llama and its relatives: files of random weights, bit for bit on the backends, and against
transformers' own models in float64."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from isobit.backends import open_backend
from isobit.backends.base import Batch
from isobit.config import EngineConfig
from isobit.errors import ModelRefused
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights
from isobit.verify.oracle import Oracle

H, G, D, HIDDEN, FFN, VOCAB = 4, 2, 32, 256, 512, 300
TOKENS = np.random.default_rng(2).integers(0, VOCAB, 90).astype(np.int32)
KINDS = ("llama", "llama3", "mixtral", "qwen2", "linear", "yarn")


def write(path: Path, kind: str, rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    """A two-layer model of a kind, quantised to Q8_0; its weights as the file holds them."""
    arch = "qwen2" if kind == "qwen2" else "llama"
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(2)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(H)
    writer.add_head_count_kv(G)
    writer.add_key_length(D)
    writer.add_value_length(D)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(D)
    if kind == "mixtral":
        writer.add_expert_count(4)
        writer.add_expert_used_count(2)
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(1024)
    out: dict[str, NDArray[np.float32]] = {}

    def add(name: str, *shape: int, scale: float | None = None) -> None:
        values = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            values = (1 + 0.1 * values if scale is None else scale * values).astype(np.float32)
            writer.add_tensor(name, values)
            out[name] = values
            return
        values *= np.float32(shape[-1] ** -0.5)
        blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        out[name] = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)

    add("token_embd.weight", VOCAB, HIDDEN)
    for i in range(2):
        at = f"blk.{i}."
        add(at + "attn_norm.weight", HIDDEN)
        for role, rows in (("q", H * D), ("k", G * D), ("v", G * D)):
            add(f"{at}attn_{role}.weight", rows, HIDDEN)
            if kind == "qwen2":
                add(f"{at}attn_{role}.bias", rows, scale=0.3)
        add(at + "attn_output.weight", HIDDEN, H * D)
        add(at + "ffn_norm.weight", HIDDEN)
        stack, tail = ((4,), "_exps") if kind == "mixtral" else ((), "")
        if stack:
            add(at + "ffn_gate_inp.weight", 4, HIDDEN)
        add(f"{at}ffn_gate{tail}.weight", *stack, FFN, HIDDEN)
        add(f"{at}ffn_up{tail}.weight", *stack, FFN, HIDDEN)
        add(f"{at}ffn_down{tail}.weight", *stack, HIDDEN, FFN)
    add("output_norm.weight", HIDDEN)
    if kind != "qwen2":  # which is tied
        add("output.weight", VOCAB, HIDDEN)
    if kind == "llama3":
        factors = rng.uniform(1, 8, D // 2).astype(np.float32)
        writer.add_tensor("rope_freqs.weight", factors)
        out["rope_freqs.weight"] = factors
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def logits(weights: Weights, name: str, planes: int, cuts: list[int]) -> NDArray[np.float32]:
    backend = open_backend(
        name, weights, EngineConfig(activation_planes=planes, context=128, max_sequences=1)
    )
    parts = []
    for first, last in zip(cuts, [*cuts[1:], len(TOKENS)], strict=True):
        at = np.arange(first, last, dtype=np.int32)
        rows = at - first
        pages = np.arange(2, dtype=np.int32)[None]
        parts.append(backend.forward(Batch(TOKENS[first:last], at, 0 * at, pages, rows)))
    backend.close()
    return np.concatenate(parts)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_and_transformers(kind: str, tmp_path: Path) -> None:
    seed = int(np.random.SeedSequence().entropy % (1 << 32))
    print(f"seed {seed}")
    values = write(tmp_path / "m.gguf", kind, np.random.default_rng(seed))
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        weights = Weights.from_file(file)
        for planes in (1, 2):
            expected = logits(weights, "reference", planes, [0])
            for cuts in ([0], [0, 1, 2, 31, 64, 65]):
                ours = logits(weights, "cpu", planes, cuts)
                assert np.array_equal(ours.view(np.uint32), expected.view(np.uint32))
        torch = pytest.importorskip("torch", reason="not run: PyTorch is not installed")
        model = transformers_model(kind, values)
        with torch.no_grad():
            tokens = torch.tensor(TOKENS[None].astype(np.int64))
            true = model(tokens, use_cache=False).logits[0].numpy()
        found = Oracle.of(file).evaluate(TOKENS.tolist()).logits
        assert np.abs(found - true).max() < 2e-5 * np.abs(true).max()  # its angles are float32
        assert np.linalg.norm(expected - true) < 2e-3 * np.linalg.norm(true)


def transformers_model(kind: str, w: dict[str, NDArray[np.float32]]) -> Any:
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    if kind == "linear":
        rope |= {"rope_type": "linear", "factor": 4.0}
    if kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": 2,
        "num_attention_heads": H,
        "num_key_value_heads": G,
        "head_dim": D,
        "rms_norm_eps": float(np.float32(1e-5)),
        "max_position_embeddings": 4096,
        "rope_parameters": rope,
        "tie_word_embeddings": kind == "qwen2",
        "attn_implementation": "eager",
    }
    family = {"qwen2": "Qwen2", "mixtral": "Mixtral"}.get(kind, "Llama")
    if kind == "mixtral":
        settings |= {"num_local_experts": 4, "num_experts_per_tok": 2}
        settings |= {"sliding_window": None, "experts_implementation": "eager"}
    config = getattr(transformers, family + "Config")(**settings)
    model = getattr(transformers, family + "ForCausalLM")(config)
    names = {
        "attn_norm": "input_layernorm",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "ffn_gate_inp": "mlp.gate",
    }
    state = {
        "model.embed_tokens.weight": w["token_embd.weight"],
        "model.norm.weight": w["output_norm.weight"],
        "lm_head.weight": w.get("output.weight", w["token_embd.weight"]),
    }
    for name, stored in w.items():
        if not name.startswith("blk."):
            continue
        value, (layer, role, what) = stored, name.split(".")[1:]
        if role in ("attn_q", "attn_k") and family != "Qwen2":
            heads = H if role == "attn_q" else G  # from Meta's order of rows to transformers'
            value = value.reshape(heads, D // 2, 2, -1).swapaxes(1, 2).reshape(heads * D, -1)
        if role == "ffn_gate_exps":
            both = np.concatenate([value, w[f"blk.{layer}.ffn_up_exps.weight"]], axis=1)
            state[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = both
        elif role == "ffn_down_exps":
            state[f"model.layers.{layer}.mlp.experts.down_proj"] = value
        elif role != "ffn_up_exps":
            state[f"model.layers.{layer}.{names[role]}.{what}"] = value
    model.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in state.items()})
    rotary = model.model.rotary_emb
    if "rope_freqs.weight" in w:  # what Llama 3's scaling comes to
        rotary.inv_freq = rotary.inv_freq / torch.from_numpy(w["rope_freqs.weight"])
    return model.double()


def test_an_unknown_scaling_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path, "llama", np.random.default_rng(0))
    with GGUFFile.open(path) as file:
        file.metadata["llama.rope.scaling.type"] = "dynamic"  # type: ignore[index]
        with pytest.raises(ModelRefused, match="expected none, linear or yarn, got 'dynamic'"):
            Weights.from_file(file)
