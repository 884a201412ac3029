"""Causal convolution: see causal_conv.simd.cpp."""

import numpy as np

from isobit.backends.cpu.lowering import Lowering
from isobit.backends.cpu.program import instruction
from isobit.model.graph import Op


def lower(to: Lowering, op: Op) -> None:
    """A row of the convolution; when its phase is done, the last rows are kept."""
    to.dense(op.inputs[0], op)
    channels, taps = op.weights[0].shape
    vectors = [np.ascontiguousarray(op.weights[0].float32().T).reshape(-1)]
    integers = [to.state(op), taps, channels]
    made = to.simple(op, vectors=vectors, integers=integers)
    phase = to.vectors(op, made, apart=True)
    phase.after.append(instruction("keep_rows", in_=made["in"], integers=integers))
