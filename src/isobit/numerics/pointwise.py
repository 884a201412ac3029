"""Sums, exp and the pointwise operations (docs/numerics.md, sections 2 and 5).

Everything is binary32. NumPy rounds each elementwise operation on its own, so the expressions
below are the specification's, operation for operation.
"""

import numpy as np

from isobit.arrays import F32

_LOG2_E = np.uint32(0x3FB8AA3B).view(np.float32)
_LN2_HI = np.uint32(0x3F318000).view(np.float32)
_LN2_LO = np.uint32(0xB95E8083).view(np.float32)
_EXP_COEFFICIENTS = np.array(
    [0x3AB511E7, 0x3C091D10, 0x3D2AAC79, 0x3E2AAA49, 0x3EFFFFFE, 0x3F800000, 0x3F800000], np.uint32
).view(np.float32)
_GELU_CUBE = np.uint32(0x3D372713).view(np.float32)  # 0.044715
_GELU_FACTOR = np.uint32(0x3FCC422A).view(np.float32)  # 2 sqrt(2 / pi)
_ONE = np.float32(1)


def tree(v: F32) -> F32:
    """Sum the last axis (a power of two long) pairwise: halves, quarters, … then neighbours."""
    while v.shape[-1] > 1:
        half = v.shape[-1] // 2
        v = v[..., :half] + v[..., half:]
    total: F32 = v[..., 0]
    return total


def sum256(v: F32) -> F32:
    """Sum the last axis in 256 lanes (value j in lane j mod 256, ascending), then :func:`tree`."""
    lanes = np.zeros((*v.shape[:-1], 256), np.float32)
    for start in range(0, v.shape[-1], 256):
        part = v[..., start : start + 256]
        lanes[..., : part.shape[-1]] += part
    return tree(lanes)


def exp(x: F32) -> F32:
    """e to the x: saturates above 88, +0 below -87; under 1.2 ulp in between."""
    with np.errstate(invalid="ignore"):
        clamped = np.minimum(np.maximum(x, np.float32(-87)), np.float32(88))
        n = np.rint(clamped * _LOG2_E)
        r = (clamped - n * _LN2_HI) - n * _LN2_LO
        p = np.full_like(r, _EXP_COEFFICIENTS[0])
        for c in _EXP_COEFFICIENTS[1:]:
            p = p * r + c
        power = ((n.astype(np.int32) + 127) << 23).view(np.float32)
    return np.where(np.isnan(x), x, np.where(x < -87, np.float32(0), p * power))


def rms_norm(x: F32, weight: F32, eps: np.float32) -> F32:
    """Normalise the last axis of x by its root mean square and scale by weight (same length)."""
    n = np.float32(x.shape[-1])
    r = _ONE / np.sqrt(sum256(x * x) / n + eps)
    y: F32 = (x * r[..., None]) * weight
    return y


def silu_gate(gate: F32, up: F32) -> F32:
    """SwiGLU's pointwise part: gate / (1 + exp(-gate)) * up."""
    return (gate / (_ONE + exp(-gate))) * up


def gelu_gate(gate: F32, up: F32) -> F32:
    """GeGLU's pointwise part: GELU of the gate, in its tanh form, times up."""
    with np.errstate(over="ignore"):
        z = (gate + ((gate * gate) * gate) * _GELU_CUBE) * _GELU_FACTOR
    return (gate / (_ONE + exp(-z))) * up


def rope(x: F32, cos: F32, sin: F32) -> F32:
    """Rotate the last axis of x [T, heads, head_dim] by tables [T, head_dim / 2] (NEOX pairs)."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    c, s = cos[:, None, :], sin[:, None, :]
    return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)
