"""Qwen3 and Qwen3-MoE as transformers saves them."""

from isobit.config import Metadata
from isobit.gguf.header import Value
from isobit.model.checkpoint.names import (
    CheckpointFormat,
    Source,
    Sources,
    expert_stacks,
    experts,
    plain,
    transformer,
)


def _dense(c: Metadata) -> dict[str, Value]:
    return {**transformer(c), "feed_forward_length": c.count("intermediate_size", 1, 1 << 20)}


def _mixture(c: Metadata) -> dict[str, Value]:
    c.only("decoder_sparse_step", 1)
    c.only("mlp_only_layers", [])
    normalised = c.flag("norm_topk_prob", default=False)
    return {**transformer(c), **experts(c), "expert_weights_norm": normalised}


def _sources(c: Metadata, *, moe: bool) -> Sources:
    def norm(name: str) -> tuple[Source, ...]:
        return (Source(f"{name}.weight", float32=True),)

    found = {
        "token_embd.weight": plain("model.embed_tokens"),
        "output_norm.weight": norm("model.norm"),
    }
    if not c.flag("tie_word_embeddings", default=False):
        found["output.weight"] = plain("lm_head")
    for i in range(c.count("num_hidden_layers", 1, 4096)):
        at = f"model.layers.{i}."
        layer = {
            "attn_norm.weight": norm(f"{at}input_layernorm"),
            "attn_q.weight": plain(f"{at}self_attn.q_proj"),
            "attn_k.weight": plain(f"{at}self_attn.k_proj"),
            "attn_v.weight": plain(f"{at}self_attn.v_proj"),
            "attn_output.weight": plain(f"{at}self_attn.o_proj"),
            "attn_q_norm.weight": norm(f"{at}self_attn.q_norm"),
            "attn_k_norm.weight": norm(f"{at}self_attn.k_norm"),
            "ffn_norm.weight": norm(f"{at}post_attention_layernorm"),
        }
        if moe:
            layer["ffn_gate_inp.weight"] = norm(f"{at}mlp.gate")
            layer |= expert_stacks(at)
        else:
            layer |= {f"ffn_{r}.weight": plain(f"{at}mlp.{r}_proj") for r in ("gate", "up", "down")}
        found |= {f"blk.{i}.{role}": source for role, source in layer.items()}
    return found


QWEN3 = CheckpointFormat("qwen3", _dense, lambda c: _sources(c, moe=False))
QWEN3MOE = CheckpointFormat("qwen3moe", _mixture, lambda c: _sources(c, moe=True))
