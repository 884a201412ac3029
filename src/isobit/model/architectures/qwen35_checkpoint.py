"""Qwen3.5 and Qwen3.5-MoE as transformers saves them: the text model, without its draft block.

GGUF's delta net has value heads in another order: the heads that share key head 0 do not come one
after the other, but the first of every key head, then the second of every key head, and so on.
"""

from collections.abc import Callable

import numpy as np

from isobit.config import Metadata
from isobit.gguf.header import Value
from isobit.model.checkpoint.names import (
    Array,
    CheckpointFormat,
    Source,
    Sources,
    expert_stacks,
    experts,
    float32,
    plain,
    transformer,
)


def _common(c: Metadata) -> dict[str, Value]:
    found = transformer(c)
    layers, head_dim = found["block_count"], found["attention.key_length"]
    assert isinstance(layers, int)
    assert isinstance(head_dim, int)
    keys, values, size = _delta_net(c)
    c.only("attn_output_gate", True)
    c.only("linear_key_head_dim", size)
    interval = c.count("full_attention_interval", 1, 4096, default=4)
    rotated = head_dim * float32(c.number("partial_rotary_factor", 0.0, 1.0))
    said = c.metadata.get("mrope_section")
    sections: list[Value] = [s for s in said if type(s) is int] if isinstance(said, list) else []
    return {
        **found,
        "rope.dimension_count": int(rotated),
        "rope.dimension_sections": [*sections, 0, 0, 0, 0][:4],
        "ssm.conv_kernel": c.count("linear_conv_kernel_dim", 2, 16),
        "ssm.state_size": size,
        "ssm.group_count": keys,
        "ssm.time_step_rank": values,
        "ssm.inner_size": values * size,
        "attention.recurrent_layers": list(_recurrent(c, layers, interval)),
        "full_attention_interval": interval,
    }


def _delta_net(c: Metadata) -> tuple[int, int, int]:
    """Key heads, value heads, values of a head vector."""
    values = c.count("linear_num_value_heads", 1, 4096)
    keys = c.count("linear_num_key_heads", 1, values)
    if values % keys:
        raise c.refusal("linear_num_value_heads", f"a multiple of {keys}", values)
    return keys, values, c.count("linear_value_head_dim", 2, 512)


def _recurrent(c: Metadata, layers: int, interval: int) -> tuple[bool, ...]:
    kinds = c.metadata.get("layer_types")
    if kinds is None:
        return tuple((i + 1) % interval != 0 for i in range(layers))
    known = ("linear_attention", "full_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or any(k not in known for k in kinds):
        raise c.refusal("layer_types", f"one of {', '.join(known)} for each layer", kinds)
    return tuple(k == known[0] for k in kinds)


def _dense(c: Metadata) -> dict[str, Value]:
    return {**_common(c), "feed_forward_length": c.count("intermediate_size", 1, 1 << 20)}


def _mixture(c: Metadata) -> dict[str, Value]:
    shared = c.count("shared_expert_intermediate_size", 1, 1 << 20)
    return {**_common(c), **experts(c), "expert_shared_feed_forward_length": shared}


def _tiled(keys: int, values: int, size: int, *, first: int = 0) -> Callable[[Array], Array]:
    """Rows by value head, ``size`` each, in GGUF's order; those before ``first`` stay."""

    def take(a: Array) -> Array:
        if a.shape[0] != first + values * size:
            return a  # of another shape than it should have, which is refused by its shape
        rows = np.arange(values * size).reshape(keys, values // keys, size)
        order = first + rows.transpose(1, 0, 2).reshape(-1)
        found: Array = a[np.concatenate([np.arange(first), order])]
        return found

    return take


def _sources(c: Metadata, *, moe: bool) -> Sources:
    layers = c.count("num_hidden_layers", 1, 4096)
    recurrent = _recurrent(c, layers, c.count("full_attention_interval", 1, 4096, default=4))
    keys, values, size = _delta_net(c)
    by_head, by_value = _tiled(keys, values, 1), _tiled(keys, values, size)
    after_keys = _tiled(keys, values, size, first=2 * keys * size)

    def norm(name: str) -> tuple[Source, ...]:
        return (Source(f"{name}.weight", lambda w: w + 1, float32=True),)

    def attention(at: str) -> dict[str, tuple[Source, ...]]:
        return {
            "attn_q.weight": plain(f"{at}q_proj"),
            "attn_k.weight": plain(f"{at}k_proj"),
            "attn_v.weight": plain(f"{at}v_proj"),
            "attn_output.weight": plain(f"{at}o_proj"),
            "attn_q_norm.weight": norm(f"{at}q_norm"),
            "attn_k_norm.weight": norm(f"{at}k_norm"),
        }

    def delta_net(at: str) -> dict[str, tuple[Source, ...]]:
        return {
            "attn_qkv.weight": (Source(f"{at}in_proj_qkv.weight", after_keys),),
            "attn_gate.weight": (Source(f"{at}in_proj_z.weight", by_value),),
            "ssm_beta.weight": (Source(f"{at}in_proj_b.weight", by_head),),
            "ssm_alpha.weight": (Source(f"{at}in_proj_a.weight", by_head),),
            "ssm_conv1d.weight": (
                Source(f"{at}conv1d.weight", lambda w: after_keys(w.squeeze(1)), float32=True),
            ),
            "ssm_dt.bias": (Source(f"{at}dt_bias", by_head, float32=True),),
            "ssm_a": (Source(f"{at}A_log", lambda a: by_head(-np.exp(a)), float32=True),),
            "ssm_norm.weight": (Source(f"{at}norm.weight", float32=True),),
            "ssm_out.weight": (Source(f"{at}out_proj.weight", lambda w: by_value(w.T).T),),
        }

    def feed_forward(at: str, tail: str) -> dict[str, tuple[Source, ...]]:
        return {f"ffn_{r}{tail}.weight": plain(f"{at}{r}_proj") for r in ("gate", "up", "down")}

    found = {
        "token_embd.weight": plain("model.embed_tokens"),
        "output_norm.weight": norm("model.norm"),
    }
    if not c.flag("tie_word_embeddings", default=False):
        found["output.weight"] = plain("lm_head")
    for i in range(layers):
        at = f"model.layers.{i}."
        layer = {
            "attn_norm.weight": norm(f"{at}input_layernorm"),
            "post_attention_norm.weight": norm(f"{at}post_attention_layernorm"),
            **(delta_net(f"{at}linear_attn.") if recurrent[i] else attention(f"{at}self_attn.")),
        }
        if moe:
            gate = Source(f"{at}mlp.shared_expert_gate.weight", lambda w: w[0], float32=True)
            layer |= {
                "ffn_gate_inp.weight": (Source(f"{at}mlp.gate.weight", float32=True),),
                "ffn_gate_inp_shexp.weight": (gate,),
                **expert_stacks(at),
                **feed_forward(f"{at}mlp.shared_expert.", "_shexp"),
            }
        else:
            layer |= feed_forward(f"{at}mlp.", "")
        found |= {f"blk.{i}.{role}": source for role, source in layer.items()}
    return found


QWEN35 = CheckpointFormat("qwen35", _dense, lambda c: _sources(c, moe=False))
QWEN35MOE = CheckpointFormat("qwen35moe", _mixture, lambda c: _sources(c, moe=True))
