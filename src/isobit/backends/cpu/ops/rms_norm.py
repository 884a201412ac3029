"""RMS norm: see rms_norm.simd.cpp."""

import numpy as np

from isobit.backends.cpu.lowering import Lowering
from isobit.model.graph import Op
from isobit.numerics.ops import RmsNorm


def lower(to: Lowering, op: Op) -> None:
    """A vector normed."""
    assert isinstance(op.operation, RmsNorm)
    weight, eps = op.weights[0].float32(), np.float32(op.operation.eps)
    made = to.simple(op, vectors=[weight], numbers=[float(eps)], integers=[weight.size])
    to.vectors(op, made)
