"""Gate and up of the same rows in one phase, and SwiGLU of them."""

from collections.abc import Sequence

from isobit.backends.cpu.lowering import Lowering
from isobit.backends.cpu.ops.expert_matmul import products
from isobit.model.graph import Op, match

_DENSE = "gate = matmul x", "up = matmul x", "y = silu_gate gate up"
_EXPERTS = "gate = expert_matmul x ids", "up = expert_matmul x ids", _DENSE[2]


def claim(to: Lowering, ops: Sequence[Op]) -> int:
    """See :mod:`isobit.backends.cpu.fusions`."""
    inner = "gate", "up"
    found = match(ops, _EXPERTS, inner) or match(ops, _DENSE, inner)
    if found is None or any(len(op.weights) != 1 for op in ops[:2]):
        return 0
    products(to, ops[:2], ops[2])
    return 3
