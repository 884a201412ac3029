"""Matrix product: a phase, see matmul.cpp."""

from dataclasses import replace

from isobit.backends.cpu.device.load import matrix
from isobit.backends.cpu.lowering import Lowering
from isobit.backends.cpu.program import Phase, instruction
from isobit.model.graph import Op


def lower(to: Lowering, op: Op) -> None:
    """The products of one input with all its matrices."""
    x = to.fixed(op.inputs[0], op)
    out = to.place(op.outputs[0])
    outs, column = [], 0
    for w in op.weights:
        outs.append(replace(out, offset=out.offset + column))
        column += w.shape[0]
    made = instruction(
        "products", matrices=[matrix(w) for w in op.weights], in_=[x] * len(outs), out=outs
    )
    to.phase(op, Phase("products", op.layer, op.outputs[0].shape.rows, op=made))
