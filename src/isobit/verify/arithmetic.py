"""The arithmetics that the operations of a graph can run in.

``SpecArithmetic`` is docs/numerics.md: a test holds the graph run with it to the bits of the
reference backend. ``Float64Arithmetic`` is the oracle's; others are in
``isobit.verify.other_arithmetics``.
"""

from collections.abc import Sequence
from typing import Protocol

from isobit.model.graph import Op
from isobit.numerics.ops import Array, Arrays, Context

__all__ = ["Arithmetic", "Array", "Float64Arithmetic", "SpecArithmetic"]


class Arithmetic(Protocol):
    """Computes an operation from its inputs."""

    exact: bool
    """Whether it is the specification's, so that equal bits can be expected."""

    def __call__(self, op: Op, inputs: Sequence[Array]) -> Arrays:
        """What the operation gives."""


class SpecArithmetic:
    """docs/numerics.md, with so many planes of activations."""

    exact = True

    def __init__(self, planes: int) -> None:
        self._context = Context(planes)

    def __call__(self, op: Op, inputs: Sequence[Array]) -> Arrays:
        """See :class:`Arithmetic`."""
        return op.operation.specification(self._context, op.weights, *inputs)


class Float64Arithmetic:
    """The operations in float64, over dequantised weights."""

    exact = False

    def __init__(self) -> None:
        self._context = Context()

    def __call__(self, op: Op, inputs: Sequence[Array]) -> Arrays:
        """See :class:`Arithmetic`."""
        return op.operation.float64(self._context, op.weights, *inputs)
