"""The scalings of RoPE that a file, or transformers' config.json, can name."""

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from isobit.config import MOST_POSITIONS, Metadata
from isobit.gguf.header import Value
from isobit.numerics import RopeTable, inverse_frequencies
from isobit.numerics.rope_table import Yarn


def rope_scaling(r: Metadata, arch: str, table: RopeTable) -> RopeTable:
    """The table as the keys under ``rope.scaling`` change it; raises ModelRefused."""
    at = f"{arch}.rope.scaling."
    kind = r.metadata.get(at + "type", "none")
    if kind != "yarn":
        r.only(at + "attn_factor", 1.0)
    if kind == "linear":
        factor = r.number(at + "factor", 1e-3, 1e6)
        return replace(table, factors=(factor,) * (table.size // 2))
    if kind == "yarn":
        yarn = Yarn(
            factor=r.number(at + "factor", 1.0, 1e6),
            original_context=r.count(at + "original_context_length", 1, MOST_POSITIONS),
            attention_factor=r.number(at + "attn_factor", 1e-3, 1e3, default=1.0),
            fast=r.number(at + "yarn_beta_fast", 1e-3, 1e6, default=32.0),
            slow=r.number(at + "yarn_beta_slow", 1e-3, 1e6, default=1.0),
        )
        return replace(table, yarn=yarn)
    if kind != "none":
        raise r.refusal(at + "type", "none, linear or yarn", kind)
    r.only(at + "factor", 1.0)
    return table


def huggingface_scaling(c: Metadata) -> dict[str, Value]:
    """The keys of a file for what config.json says; raises ModelRefused."""
    kind = c.metadata.get("rope_type", "default")
    if kind in ("default", "llama3"):
        return {}
    if kind not in ("linear", "yarn"):
        raise c.refusal("rope_type", "default, linear, yarn or llama3", kind)
    found: dict[str, Value] = {"rope.scaling.type": kind, "rope.scaling.factor": c.scalar("factor")}
    if kind == "yarn":
        for name in ("attention_factor", "mscale", "mscale_all_dim", "truncate"):
            c.only(name, None)
        original = c.count("original_max_position_embeddings", 1, MOST_POSITIONS)
        found["rope.scaling.original_context_length"] = original
        for name in ("beta_fast", "beta_slow"):
            if name in c.metadata:
                found[f"rope.scaling.yarn_{name}"] = c.scalar(name)
    return found


def llama3_divisors(c: Metadata) -> dict[str, NDArray[np.float32]]:
    """Llama 3's scaling as a file has it: what each pair's frequency is divided by. A pair that
    turns often within the original context stays, one that turns less than once is slowed, between
    them it is weighed (transformers, modeling_rope_utils.py). Raises ModelRefused."""
    if c.metadata.get("rope_type") != "llama3":
        return {}
    heads = c.count("num_attention_heads", 1, 4096)
    hidden = c.count("hidden_size", 1, 1 << 20)
    size = c.count("head_dim", 2, 512, default=hidden // heads)
    factor, low, high = (
        c.number(name, 1e-3, 1e6) for name in ("factor", "low_freq_factor", "high_freq_factor")
    )
    if high <= low:
        raise c.refusal("high_freq_factor", f"more than {low:g}", high)
    original = c.count("original_max_position_embeddings", 1, MOST_POSITIONS)
    base = c.number("rope_theta", 1.0, 1e12)
    turns = original * inverse_frequencies(size, base) / (2 * math.pi)
    stay = np.clip((turns - low) / (high - low), 0, 1)
    return {"rope_freqs.weight": (1 / (stay + (1 - stay) / factor)).astype(np.float32)}
