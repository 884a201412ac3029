"""The gated delta rule, token by token, with the state of each sequence."""

from collections.abc import Iterable

from isobit.backends.wgpu.device.gpu import Step
from isobit.backends.wgpu.lowering import Lowering, Pass
from isobit.model.graph import Op
from isobit.numerics.ops import GatedDelta

_LANES = 256  # of a workgroup of gated_delta.wgsl
_LANES_A_COLUMN = 16
_MOST = 512  # values of a key


def supports(op: Op) -> str | None:
    """See :mod:`isobit.backends.wgpu.ops`."""
    size = op.inputs[1].shape.row[1]
    return None if size <= _MOST else f"expected keys of at most {_MOST} values, got {size}"


def lower(g: Lowering, op: Op) -> None:
    """Some columns of a head's state a workgroup, which takes all tokens of a run."""
    assert isinstance(op.operation, GatedDelta)
    (_, k, v, _, _), (y,) = op.inputs, op.outputs
    (key_heads, size), (heads, columns) = k.shape.row, v.shape.row
    together = op.operation.together(key_heads, heads)
    places = [g.rows(x, x.shape.width) for x in op.inputs]
    lanes = min(size, _LANES_A_COLUMN)
    buffers = *(x.slot for x in places), g.batch, g.state(op), g.new(y)
    groups = -(-columns // (_LANES // lanes))
    corrects = int(op.operation.corrects)

    def steps(p: Pass) -> Iterable[Step]:
        each = (n for x in places for n in (x.first, x.stride))
        parameters = heads, key_heads, together, columns, g.at(p).runs, *each
        grid = groups, heads, p.runs
        constants = {"SIZE": size, "LANES": lanes, "CORRECTS": corrects}
        yield g.step("ops/gated_delta", buffers, parameters, grid, (), **constants)

    g.emit(steps)
