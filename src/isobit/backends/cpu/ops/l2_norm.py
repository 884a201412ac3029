"""L2 norm: see l2_norm.simd.cpp."""

import numpy as np

from isobit.backends.cpu.lowering import Lowering
from isobit.model.graph import Op
from isobit.numerics.ops import L2Norm


def lower(to: Lowering, op: Op) -> None:
    """A vector over its length."""
    assert isinstance(op.operation, L2Norm)
    numbers = [float(np.float32(x)) for x in (op.operation.eps, op.operation.scale)]
    to.vectors(op, to.simple(op, numbers=numbers, integers=[op.outputs[0].shape.row[-1]]))
