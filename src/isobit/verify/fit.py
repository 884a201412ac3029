"""Which arithmetic an operation was done in: what its recorded inputs and output fit.

An operation that is off by more than a rounding has usually been done in another arithmetic, on
purpose or by mistake. Each one that has a name is tried on the operation's own inputs; the one that
leaves next to nothing of the error is it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from isobit.numerics import quantise
from isobit.verify.arithmetic import Array
from isobit.verify.other_arithmetics import rounding

PLANES = "int16 in two planes/256"
"""isobit's own: 16 bits to 32,639, so that they are two planes of 8."""
CANDIDATES = ("bf16", "f16", PLANES, *(f"int{b}/{n}" for b in (8, 16) for n in (256, 128, 64, 32)))
LEFT = 0.1
"""An arithmetic fits if it leaves at most this share of an operation's error."""
Recompute = Callable[[Sequence[Array]], Array]
"""The operation in float64, of other inputs."""


@dataclass(frozen=True)
class Fit:
    """The arithmetic that an operation was done in."""

    arithmetic: str
    """A name of ``isobit ablate``: int8/256, bf16, …"""
    error: float
    """Relative RMS of the operation's error against float64 on the same inputs."""
    left: float
    """What is left of it against float64 on inputs rounded so."""

    @property
    def words(self) -> str:
        """What its activations are."""
        kind, _, block = self.arithmetic.partition("/")
        return f"{kind} in blocks of {block}" if block else kind


def in_words(fits: Sequence[tuple[str, Fit]]) -> list[str]:
    """What stages' activations are, as far as that explains their error; a line for each
    arithmetic. ``fits``: pairs of a stage and what fits it, in its first layer that is off."""
    found: dict[str, list[tuple[str, Fit]]] = {}
    for stage, of in fits:
        found.setdefault(of.words, []).append((stage, of))
    return [
        f"activations are {words} in {', '.join(stage for stage, _ in pairs)} (in the first layer "
        f"that is off; so rounded, {max(f.left / (f.error or 1.0) for _, f in pairs):.2g} of the "
        "error is left)"
        for words, pairs in found.items()
    ]


def float32_explains(stage: str, position: int) -> float:
    """The relative RMS that an operation in float32 may be off by, up to a position.

    Products and norms over 8,192 terms added one after the other stay below 4e-6, a softmax of
    scores up to 100 below 2e-5; the angle of a rotation is a product with the position.
    """
    if stage in ("q_post_rope", "k_post_rope"):
        return 4e-6 + position * 2.0**-23
    return 2e-5 if stage in ("attn_scores", "attn_softmax", "attention") else 4e-6


def fit(value: Array, inputs: Sequence[Array], recompute: Recompute) -> Fit | None:
    """The arithmetic whose rounded inputs give ``value``; None if none of those known does."""
    if value.dtype.kind != "f" or not any(x.dtype.kind == "f" for x in inputs):
        return None

    def off(given: Sequence[Array]) -> float:
        expected = recompute(given)
        scale = float(np.linalg.norm(expected))
        return float(np.linalg.norm(value.reshape(expected.shape) - expected)) / (scale or 1.0)

    error = off(inputs)
    best: Fit | None = None
    for name in CANDIDATES:
        rounded = _planes if name == PLANES else rounding(name)
        assert rounded is not None
        left = off([x if x.dtype.kind == "i" else rounded(x) for x in inputs])
        if best is None or left < best.left:
            best = Fit(name, error, left)
    return best if best is not None and best.left <= LEFT * error else None


def _planes(x: Array) -> Array:
    """Section 3 of docs/numerics.md: 16 bits for each 256 values of the last axis."""
    out = np.empty(x.shape)
    for start in range(0, x.shape[-1], 256):
        part = np.ascontiguousarray(x[..., start : start + 256], np.float32)
        q, d = quantise(part, planes=2)
        out[..., start : start + 256] = q * d[..., None].astype(np.float64)
    return out
