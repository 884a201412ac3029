"""Choosing a token (docs/numerics.md, section 10), one sequence at a time."""

import numpy as np
from numpy.typing import NDArray

from isobit.arrays import F32
from isobit.numerics.logprobs import U64, WEIGHT_BITS, weights
from isobit.numerics.pointwise import exp

SAMPLING_VERSION = 2
"""The version of section 10; it stands in every receipt."""

_LARGEST = np.finfo(np.float32).max


def adjust(
    z: F32,
    *,
    bias: F32,
    occurred: NDArray[np.bool_],
    generated: NDArray[np.int32],
    repetition: float,
    presence: float,
    frequency: float,
) -> F32:
    """Logits [N] after bias and penalties; every argument is of the same N tokens.

    occurred: whether each is in prompt or output. generated: how often each is in the output.
    """
    c, n = np.float32(repetition), generated.astype(np.float32)
    with np.errstate(over="ignore"):
        z = z + bias
        if c != 1:
            z = np.where(occurred, np.where(z > 0, z / c, z * c), z)
        lowered = (z - np.float32(frequency) * n) - np.float32(presence)
        z = np.where(generated > 0, lowered, z)
    return z.clip(-_LARGEST, _LARGEST)  # the difference of two infinities would be no number


def distribution(z: F32, temperature: float, top_k: int, top_p: float, min_p: float) -> U64:
    """What is drawn from: weights [V], 0 for tokens that are not kept.

    z: logits [V], minus infinity for tokens that are not allowed (at least one is).
    """
    if temperature == 0:
        only = np.zeros(len(z), np.uint64)
        only[np.argmax(z)] = 1 << WEIGHT_BITS
        return only
    with np.errstate(over="ignore"):
        p = exp((z - z.max()) / np.float32(temperature))
    w = weights(p)
    order = np.argsort(-p, kind="stable")  # ties to the lower id
    if top_k:
        order = order[:top_k]
    if top_p < 1:
        sums = w[order].cumsum()
        enough = int(top_p * 2.0**64) * int(sums[-1]) >> 64
        order = order[: int(np.searchsorted(sums, np.uint64(enough))) + 1]
    order = order[p[order] >= np.float32(min_p)]
    kept = np.zeros_like(w)
    kept[order] = w[order]
    return kept


def random_bits(seed: int, index: int) -> int:
    """64 random bits for a sequence's generated token ``index`` (1, 2, …)."""
    return int(np.random.Philox(key=seed, counter=index - 1).random_raw())  # it counts on first


def draw(kept: U64, random: int) -> int:
    """The token that 64 random bits draw from weights [V]."""
    sums = kept.cumsum()
    return int(np.searchsorted(sums, np.uint64(random * int(sums[-1]) >> 64), side="right"))


def choose(z: F32, temperature: float, top_k: int, top_p: float, min_p: float, random: int) -> int:
    """The token that 64 random bits choose from logits [V]."""
    return draw(distribution(z, temperature, top_k, top_p, min_p), random)
