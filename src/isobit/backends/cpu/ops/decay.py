"""Decay: see decay.simd.cpp."""

from isobit.backends.cpu.lowering import Lowering
from isobit.model.graph import Op


def lower(to: Lowering, op: Op) -> None:
    """The decay of each head."""
    rates = [w.float32() for w in op.weights]
    to.vectors(op, to.simple(op, vectors=rates, integers=[rates[0].size]))
