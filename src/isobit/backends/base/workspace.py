"""Memory of a pass on a device, as its lowering asks for it before there is any."""

from dataclasses import dataclass

from isobit.numerics.ops import TOKENS

TILES = "tiles"
"""Rows of a slot: a token's tiles of keys, as many as the context has."""
BATCH = "batch"
"""Rows of a slot: none; what the pass as a whole needs."""


@dataclass(eq=False)
class Slot:
    """Memory of a pass."""

    name: str
    words: int
    """For a row …"""
    rows: str = TOKENS
    """… of these (see numerics.ops.base, and above)"""
    more: int = 0
    """Words besides."""
    users: int = 0
    """Values in it, and launches being made; a slot without is free."""
