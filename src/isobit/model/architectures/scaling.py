"""The scalings of RoPE that a file can name."""

from dataclasses import replace

from isobit.config import MOST_POSITIONS, Metadata
from isobit.numerics import RopeTable
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
