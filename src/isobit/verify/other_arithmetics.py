"""Arithmetics to try in place of the specification's, by name.

``f64``: the operation in float64. ``int8/32``, ``int8/256``, ``int16/256``, …: its inputs rounded
to integers with one float32 scale for so many values. ``bf16``, ``f16``: its inputs rounded to
these. The rounded ones compute the rest in float64, so that the rounding alone is seen.
``f32-reversed``: float32, every sum sequential from its last term to its first. Results are
float32.
"""

import re
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np

from isobit.backends.base import F32
from isobit.errors import UsageError
from isobit.model.graph import Op
from isobit.numerics import Weight, exp
from isobit.numerics.attention import attention_scale, visible
from isobit.numerics.moe import LEAST_SUM, best
from isobit.numerics.ops import (
    Array,
    Arrays,
    Attention,
    AttentionScores,
    AttentionSoftmax,
    Context,
    ExpertMatMul,
    RmsNorm,
    TopK,
    UnpackCache,
)
from isobit.numerics.ops.attention import masked
from isobit.verify.arithmetic import SpecArithmetic

NAMES = "f64, f32-reversed, bf16, f16, int8/32, int8/256, int16/32, int16/256"
_NO_CONTEXT = Context()  # products in float32 ask for nothing of it
_INTEGER = re.compile(r"int(8|16)/(32|64|128|256)")


def rounding(name: str) -> Callable[[Array], Array] | None:
    """What a named arithmetic does to a float input; None for f64 and f32-reversed.

    Raises UsageError with the valid names.
    """
    if name in ("f64", "f32-reversed"):
        return None
    if name == "f16":
        return _float16
    if name == "bf16":
        return _bfloat16
    match = _INTEGER.fullmatch(name)
    if match is None:
        raise UsageError(f"arithmetic: expected one of {NAMES}; got {name!r}")
    limit, block = 2 ** (int(match[1]) - 1) - 1, int(match[2])
    return lambda x: _integers(x, limit, block)


def _float16(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float64)


def _bfloat16(x: Array) -> Array:
    """Nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.int64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32).astype(np.float64)


def _integers(x: Array, limit: int, block: int) -> Array:
    """Blocks along the last axis; the last block may be shorter."""
    out = np.empty(x.shape)
    for start in range(0, x.shape[-1], block):
        part = x[..., start : start + block].astype(np.float64)
        scale = (np.abs(part).max(axis=-1, keepdims=True) / limit).astype(np.float32)
        scale = np.where(scale == 0, 1, scale).astype(np.float64)
        out[..., start : start + block] = np.rint(part / scale).clip(-limit, limit) * scale
    return out


class ReversedArithmetic:
    """Float32 throughout, each sum from the last term to the first; no fixed point.

    An operation without a sum of its own runs as specified.
    """

    exact = False

    def __init__(self, planes: int) -> None:
        self._specification = SpecArithmetic(planes)
        self._floats = UnpackCache(lambda w: w.float32())
        self._forms: dict[str, Callable[[Op, Sequence[Array]], Arrays]] = {
            "matmul": self._matmul,
            "expert_matmul": self._expert_matmul,
            "rms_norm": _rms_norm,
            "attention_scores": lambda op, x: (_scores(op, *x),),
            "attention_softmax": lambda op, x: (_softmax(op, *x),),
            "attention": lambda op, x: (_attention(op, *x),),
            "top_k": _top_k,
            "combine": lambda _, x: (_sum((x[0][..., None] * x[1]).swapaxes(1, 2)),),
        }

    def __call__(self, op: Op, inputs: Sequence[Array]) -> Arrays:
        """See ``Arithmetic``."""
        return self._forms.get(op.kind, self._specification)(op, inputs)

    def _product(self, _: Context, w: Weight, x: Array) -> F32:
        values = self._floats(w)
        y = np.zeros((len(x), len(values)), np.float32)
        for k in reversed(range(x.shape[1])):
            y += x[:, k : k + 1] * values[:, k]
        return y

    def _matmul(self, op: Op, inputs: Sequence[Array]) -> Arrays:
        products = [self._product(_NO_CONTEXT, w, inputs[0]) for w in op.weights]
        return (np.concatenate(products, axis=1),)

    def _expert_matmul(self, op: Op, inputs: Sequence[Array]) -> Arrays:
        return (ExpertMatMul.each(self._product, _NO_CONTEXT, op.weights[0], *inputs),)


def _rms_norm(op: Op, inputs: Sequence[Array]) -> Arrays:
    (x,), norm = inputs, cast(RmsNorm, op.operation)
    mean = _sum(x * x) / np.float32(x.shape[-1])
    r = np.float32(1) / np.sqrt(mean + np.float32(norm.eps))
    return ((x * r[..., None]) * op.weights[0].float32(),)


_Attends = AttentionScores | AttentionSoftmax | Attention


def _scores(op: Op, q: Array, keys: Array, positions: Array) -> Array:
    group = q.shape[1] // keys.shape[1]
    out: Array = np.zeros((*q.shape[:2], len(keys)), np.float32)
    for i in reversed(range(q.shape[2])):
        out += q[:, :, None, i] * keys[:, :, i].T.repeat(group, axis=0)
    attends = cast(AttentionScores | Attention, op.operation)
    return masked(out * attention_scale(q.shape[2], attends.scale), positions, attends.window)


def _softmax(op: Op, scores: Array, positions: Array) -> Array:
    window = cast(_Attends, op.operation).window
    seen = visible(np.arange(scores.shape[2]), positions, window)[:, None]
    top = np.where(seen, scores, np.float32(-np.inf)).max(axis=-1, keepdims=True)
    sinks = [w.float32()[:, None] for w in op.weights]
    for sink in sinks:
        top = np.maximum(top, sink)
    p: F32 = np.where(seen, exp(scores - top), np.float32(0))
    total = _sum(p)[..., None]
    for sink in sinks:
        total = exp(sink - top) + total
    out: F32 = p / total
    return out


def _attention(op: Op, q: Array, keys: Array, values: Array, positions: Array) -> Array:
    p = _softmax(op, _scores(op, q, keys, positions), positions)
    group = q.shape[1] // keys.shape[1]
    out: F32 = np.zeros(q.shape, np.float32)
    for j in reversed(range(len(keys))):
        out += p[:, :, j, None] * values[j].repeat(group, axis=0)
    return out.reshape(len(out), -1)


def _top_k(op: Op, inputs: Sequence[Array]) -> Arrays:
    (p,), choice = inputs, cast(TopK, op.operation)
    if choice.softmax:
        e = exp(p - p.max(axis=1, keepdims=True))
        p = e / _sum(e)[:, None]
    score = p + op.weights[0].float32() if op.weights else p
    ids = best(score, choice.k, choice.groups, choice.groups_used, alone=choice.softmax)
    chosen = np.take_along_axis(p, ids, axis=1)
    if choice.normalise:
        chosen = chosen / np.maximum(_sum(chosen), np.float32(LEAST_SUM))[:, None]
    return chosen, ids


def _sum(v: Array) -> F32:
    """Sum of the last axis, from its end."""
    out: F32 = np.add.accumulate(v[..., ::-1], axis=-1)[..., -1]
    return out
