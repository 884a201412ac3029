"""Products of each token's experts: a phase, see expert_matmul.cpp."""

from collections.abc import Sequence

from isobit.backends.cpu.device.load import matrix
from isobit.backends.cpu.lowering import Lowering
from isobit.backends.cpu.program import Phase, instruction
from isobit.model.graph import Op
from isobit.numerics.ops import ExpertMatMul


def lower(to: Lowering, op: Op) -> None:
    """One product of each token's experts."""
    products(to, [op], None)


def products(to: Lowering, ops: Sequence[Op], gate: Op | None) -> None:
    """The products of one input: one, or two with what makes one of both. Plain products (a dense
    feed-forward) are those of one expert that every token goes to."""
    first = ops[0]
    dense = not isinstance(first.operation, ExpertMatMul)
    if isinstance(first.operation, ExpertMatMul):
        ids = first.inputs[1]
        to.group(ids, first.operation.part or (0, ids.shape.below or 0), first)
    x = to.fixed(first.inputs[0], first)
    outputs = [op.outputs[0] for op in ops] + list(gate.outputs if gate else ())
    per_pair = not dense and len(first.inputs[0].shape.row) == 2
    made = instruction(
        "experts",
        matrices=[matrix(op.weights[0]) for op in ops],
        in_=[x],
        out=[to.place(v) for v in outputs],
        integers=[int(dense), int(per_pair)],
    )
    to.phase(first, Phase("experts", first.layer, op=made, by_expert=not dense), outputs)
