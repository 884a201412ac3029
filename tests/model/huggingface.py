"""A GGUF model's dequantised weights in ``transformers``: float32, eager attention."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.model.oracle import Oracle

_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def build(source: Oracle) -> PreTrainedModel:
    """The model that ``source`` holds, its hyper-parameters and float32 weights."""
    shape = source.weights["token_embd.weight"].shape
    tied = "output.weight" not in source.weights
    settings: dict[str, Any] = {
        "vocab_size": shape[0],
        "hidden_size": shape[1],
        "intermediate_size": int(source.of("feed_forward_length")),
        "num_hidden_layers": int(source.of("block_count")),
        "num_attention_heads": int(source.of("attention.head_count")),
        "num_key_value_heads": int(source.of("attention.head_count_kv")),
        "head_dim": len(source.weights["blk.0.attn_q_norm.weight"]),
        "rms_norm_eps": source.of("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": int(source.of("context_length")),
        "rope_parameters": {"rope_type": "default", "rope_theta": source.of("rope.freq_base")},
        "tie_word_embeddings": tied,
        "attn_implementation": "eager",
    }
    if source.arch == "qwen3moe":
        settings |= {
            "num_experts": int(source.of("expert_count")),
            "num_experts_per_tok": int(source.of("expert_used_count")),
            "moe_intermediate_size": int(source.of("expert_feed_forward_length")),
            "norm_topk_prob": True,
        }
    with torch.device("meta"):
        model: PreTrainedModel = (
            Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings))
            if source.arch == "qwen3moe"
            else Qwen3ForCausalLM(Qwen3Config(**settings))
        )
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(model.config)  # its buffers are computed, not loaded
    model.load_state_dict(_state(source, tied), assign=True)
    return model.eval()


def run(model: PreTrainedModel, ids: list[int]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Logits [T, vocabulary] and chosen experts [L, T, k] (k = 0 for a dense model)."""
    moe = isinstance(model, Qwen3MoeForCausalLM)
    with torch.inference_mode():
        out = model(torch.tensor([ids]), **({"output_router_logits": True} if moe else {}))
    logits = out.logits[0].double().numpy()
    if not moe:
        return logits, np.zeros((0, len(ids), 0), np.int64)
    k = model.config.num_experts_per_tok
    return logits, np.stack([r.topk(k, dim=-1).indices.numpy() for r in out.router_logits])


def _state(source: Oracle, tied: bool) -> dict[str, torch.Tensor]:
    tensors = {name: torch.from_numpy(w) for name, w in source.weights.items()}
    state = {
        "model.embed_tokens.weight": tensors["token_embd.weight"],
        "model.norm.weight": tensors["output_norm.weight"],
        "lm_head.weight": tensors["token_embd.weight" if tied else "output.weight"],
    }
    for i in range(int(source.of("block_count"))):
        ours, theirs = f"blk.{i}.", f"model.layers.{i}."
        for role, name in _NAMES.items():
            if f"{ours}{role}.weight" in tensors:
                state[f"{theirs}{name}.weight"] = tensors[f"{ours}{role}.weight"]
        if f"{ours}ffn_gate_exps.weight" in tensors:
            gate, up, down = (
                tensors[f"{ours}ffn_{role}_exps.weight"] for role in ("gate", "up", "down")
            )
            state[f"{theirs}mlp.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
            state[f"{theirs}mlp.experts.down_proj"] = down
    return state
