"""Logarithms and log-probabilities (docs/numerics.md, sections 5 and 11)."""

import numpy as np
from numpy.typing import NDArray

from isobit.arrays import F32
from isobit.numerics.pointwise import exp

U64 = NDArray[np.uint64]

WEIGHT_BITS = 40
"""A weight of 2^40 is a probability as large as the largest."""

_HALF = np.float32(0.5)
_ONE = np.float32(1)
_SQRT_HALF = np.int32(0x3F3504F3)
_LN2_HI = np.uint32(0x3F318000).view(np.float32)
_LN2_LO = np.uint32(0xB95E8083).view(np.float32)
_LOG_COEFFICIENTS = np.array(
    [
        *(0xBD9C5AC4, 0x3E02ADB6, 0xBE06C2A1, 0x3E116D0E),
        *(0xBE2A3922, 0x3E4CD004, 0xBE800113, 0x3EAAAAAA),
    ],
    np.uint32,
).view(np.float32)
_LARGEST = np.finfo(np.float32).max


def log(x: F32) -> F32:
    """Natural logarithm of positive normal numbers; under 0.9 ulp."""
    bits = np.asarray(x).view(np.int32)
    n = (bits - _SQRT_HALF) >> 23
    f = (bits - (n << 23)).view(np.float32) - _ONE
    p = np.full_like(f, _LOG_COEFFICIENTS[0])
    for c in _LOG_COEFFICIENTS[1:]:
        p = p * f + c
    q = f * f
    n = n.astype(np.float32)
    r = ((q * f) * p + n * _LN2_LO) - q * _HALF
    y: F32 = (r + f) + n * _LN2_HI
    return y


def weights(p: F32) -> U64:
    """floor(p * 2^40) of 0 <= p <= 1: integers, whose sums no order of adding can change."""
    w: U64 = (p.astype(np.float64) * 2.0**WEIGHT_BITS).astype(np.uint64)
    return w


def log_total(total: U64) -> F32:
    """log(total * 2^-40) of sums of weights, at least 2^40."""
    return log(total.astype(np.float32) * np.float32(2.0**-WEIGHT_BITS))


def log_softmax(z: F32) -> F32:
    """Log-probabilities of logits, along the last axis; float32, finite."""
    with np.errstate(over="ignore"):
        x = (z - z.max(axis=-1, keepdims=True)).clip(-_LARGEST, None)
    y: F32 = x - log_total(weights(exp(x)).sum(axis=-1, keepdims=True))
    return y


def top_logprobs(z: F32, k: int) -> tuple[NDArray[np.int32], F32]:
    """The k largest logits of each row of z [R, V], descending, ties to the lower id.

    (ids int32 [R, k], their log-probabilities float32 [R, k]).
    """
    ids = np.argsort(-z, axis=-1, kind="stable")[:, :k]
    return ids.astype(np.int32), np.take_along_axis(log_softmax(z), ids, axis=-1)
