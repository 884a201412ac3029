"""The clamped SwiGLU of gpt-oss."""

import numpy as np

from isobit.backends.cuda.lowering import Lowering, anything
from isobit.model.graph import Op
from isobit.numerics.ops import ClampedGate

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A value a thread."""
    assert isinstance(op.operation, ClampedGate)
    (y,), n = op.outputs, op.outputs[0].shape.row[-1]
    limit, factor = (float(np.float32(x)) for x in (op.operation.limit, op.operation.factor))
    to, views = g.new(y), [g.view(v, n) for v in op.inputs]
    g.vectors("ops/clamped_gate", y.shape, n, views, lambda _: (limit, factor, to.address), y)
