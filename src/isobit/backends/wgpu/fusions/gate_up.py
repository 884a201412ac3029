"""Gate and up side by side in one product, and SwiGLU of them."""

from collections.abc import Sequence

from isobit.backends.wgpu.lowering import BufferView, Lowering
from isobit.backends.wgpu.ops import silu_gate
from isobit.backends.wgpu.ops.matmul import multiply, supports
from isobit.model.graph import Op, match

_DENSE = "gate = matmul x", "up = matmul x", "y = silu_gate gate up"
_EXPERTS = "gate = expert_matmul x ids", "up = expert_matmul x ids", _DENSE[2]


def claim(g: Lowering, ops: Sequence[Op]) -> int:
    """See :mod:`isobit.backends.wgpu.fusions`."""
    v = match(ops, _EXPERTS) or match(ops, _DENSE)
    if v is None or supports(ops[0]) or supports(ops[1]):
        return 0
    weights = *ops[0].weights, *ops[1].weights
    gate, up = v["gate"], v["up"]
    n, shape = gate.shape.row[-1], gate.shape
    both = g.slot("gate_up", 2 * shape.width, shape.rows)
    multiply(g, g.matrix(weights), v["x"], both, v.get("ids"))
    g.put(gate, BufferView(both, n, 2 * n))
    g.put(up, BufferView(both, n, 2 * n, at=n))
    silu_gate.lower(g, ops[2])
    return 3
