"""Softcap."""

import numpy as np

from isobit.backends.cuda.lowering import Lowering, anything
from isobit.model.graph import Op
from isobit.numerics.ops import Softcap

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A value a thread."""
    assert isinstance(op.operation, Softcap)
    cap = float(np.float32(op.operation.cap))
    (x,), (y,) = op.inputs, op.outputs
    n, to = y.shape.row[-1], g.new(y)
    g.vectors("ops/softcap", y.shape, n, [g.view(x, n)], lambda _: (cap, to.address), y)
