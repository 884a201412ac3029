"""Single operations on NumPy arrays, through the kernels that a pass uses.

The functions of :mod:`isobit.numerics`, argument for argument, with the same bits: for tests, and
for running one operation of a trace again.
"""

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from isobit.backends.base import F32, I32
from isobit.backends.cpu import _cpu
from isobit.numerics import Weight, attention_scale


def matrix(w: Weight) -> _cpu.Matrix:
    """A weight matrix, or a stack of them, as the extension takes it: a view, no copy, unless rows
    lie apart in the file."""
    *stack, rows, columns = w.shape
    data = np.ascontiguousarray(w.data).reshape(-1)
    return _cpu.Matrix(data, w.format.ggml_type, int(np.prod(stack)), rows, columns, w.row_bytes)


class CpuOps:
    """The operations at one SIMD level (None: the best of this machine)."""

    name = "cpu"

    def __init__(self, simd: str | None = None, threads: int = 1) -> None:
        self._ops = _cpu.Ops(simd or "", threads)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> NDArray[Any]:
        """Room for a result; tests override it to put sentinels around."""
        return np.empty(shape, dtype)

    def dequantize(self, w: Weight) -> F32:
        """All values of a matrix [N, K]."""
        return self._run("dequantise", (w.shape,), matrix(w))

    def quantise_rows(self, x: F32, planes: int) -> tuple[I32, F32]:
        """(q int32 [T, K], d float32 [T, ceil(K / 256)])."""
        q = self.empty(x.shape, np.int32)
        d = self.empty((x.shape[0], -(-x.shape[1] // 256)))
        self._ops.quantise(x, planes, q, d)
        return q, d

    def matmul(self, w: Weight, x: F32, planes: int) -> F32:
        """``x @ w.T``, float32 [T, N]."""
        return self._run("matmul", ((len(x), w.shape[0]),), matrix(w), x, planes)

    def rms_norm(self, x: F32, weight: F32, eps: float) -> F32:
        """Rows x [T, n] normalised."""
        return self._run("rms_norm", (x.shape,), x, weight, float(eps))

    def rope(self, x: F32, cos: F32, sin: F32) -> F32:
        """x [T, heads, head_dim] rotated by tables [T, head_dim / 2]."""
        return self._run("rope", (x.shape,), x, cos, sin)

    def exp(self, x: F32) -> F32:
        """e to the x [n]."""
        return self._run("exp", (x.shape,), x)

    def silu_gate(self, gate: F32, up: F32) -> F32:
        """SwiGLU's pointwise part of [T, F]."""
        return self._run("silu_gate", (gate.shape,), gate, up)

    def top_k(self, logits: F32, k: int, *, normalise: bool = True) -> tuple[I32, F32, F32]:
        """(ids int32 [T, k], weights [T, k], probabilities [T, E])."""
        ids = self.empty((len(logits), k), np.int32)
        weights, p = self.empty(ids.shape), self.empty(logits.shape)
        self._ops.top_k(logits, normalise, ids, weights, p)
        return ids, weights, p

    def combine(self, weights: F32, outputs: F32) -> F32:
        """Expert outputs [T, k, N] weighted and added in rank order."""
        return self._run("combine", ((outputs.shape[0], outputs.shape[2]),), weights, outputs)

    def attention(
        self,
        q: F32,
        positions: I32,
        k: NDArray[np.int16],
        dk: F32,
        v: NDArray[np.int16],
        dv: F32,
        window: int | None = None,
        sink: np.float32 | None = None,
    ) -> F32:
        """One query head over one key-value head of one sequence."""
        sinks = np.array([] if sink is None else [sink], np.float32)
        more = float(attention_scale(q.shape[1])), window or 0, sinks
        return self._run("attention", (q.shape,), q, positions, k, dk, v, dv, *more)

    def experts(
        self, gate: Weight, up: Weight, down: Weight, x: F32, ids: I32, planes: int
    ) -> tuple[F32, F32, F32, F32]:
        """Each token of x [T, K] through its experts ids [T, k].

        Returns gate, up and their SwiGLU [T, k, F], and down [T, k, N].
        """
        inner, outer = (*ids.shape, gate.shape[1]), (*ids.shape, down.shape[1])
        g, u, a = (self.empty(inner) for _ in range(3))
        y = self.empty(outer)
        self._ops.experts(matrix(gate), matrix(up), matrix(down), x, ids, planes, g, u, a, y)
        return g, u, a, y

    def _run(self, op: str, shapes: tuple[tuple[int, ...], ...], *args: object) -> F32:
        out = self.empty(shapes[0])
        getattr(self._ops, op)(*args, out)
        return out
