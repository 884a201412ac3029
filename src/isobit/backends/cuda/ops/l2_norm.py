"""L2 norm of head vectors."""

import numpy as np

from isobit.backends.cuda.lowering import Lowering, anything
from isobit.backends.cuda.workspace import Pass
from isobit.model.graph import Op
from isobit.numerics.ops import L2Norm

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A vector a block."""
    assert isinstance(op.operation, L2Norm)
    (x,), (y,), n = op.inputs, op.outputs, op.outputs[0].shape.row[-1]
    numbers = op.operation.eps, float(np.float32(op.operation.scale))
    view, to, each = g.view(x, n), g.new(y), y.shape.width // n

    def make(p: Pass) -> None:
        arguments = (*view(), each, *numbers, n, to.address)
        g.launch("ops/l2_norm", (p.rows(y.shape) * each,), arguments)

    g.emit(make, y)
