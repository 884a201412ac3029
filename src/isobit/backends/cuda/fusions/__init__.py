"""Runs of operations that some launches do together, each in a file of its own.

A claim looks at the operations that come next. If it knows how they begin, it says how many it
takes and how it lowers them. Claims are tried in order over the whole graph, the longest first;
what no claim takes is lowered one by one.
"""

from collections.abc import Callable, Mapping, Sequence

from isobit.backends.cuda.fusions import (
    decode_head,
    decode_layer,
    delta_net,
    gate_up,
    head_vectors,
    norm,
    step_attention,
)
from isobit.backends.cuda.lowering import Claimed, Lowering
from isobit.backends.cuda.workspace import MIXED, PASS, ROWS, STEP, STEPS
from isobit.model.graph import Op

Claim = Callable[[Lowering, Sequence[Op]], Claimed | None]

_ANY: tuple[Claim, ...] = (
    head_vectors.claim,
    delta_net.claim,
    norm.claim_shared,
    norm.claim,
    gate_up.claim,
)
_STEPS = step_attention.claim, *_ANY
CLAIMS: dict[str, tuple[Claim, ...]] = {
    PASS: _ANY,
    MIXED: _STEPS,
    STEPS: _STEPS,
    STEP: (decode_layer.claim, decode_head.claim, *_STEPS),
    ROWS: (decode_layer.claim, *_STEPS),
}
"""By the kind of program."""


_LONGEST = 48
"""Operations that a claim may take."""


def claims(g: Lowering, ops: Sequence[Op], tried: Sequence[Claim]) -> Mapping[int, Claimed]:
    """What is claimed, by the place of the first operation."""
    found: dict[int, Claimed] = {}
    taken = [False] * (len(ops) + 1)
    taken[-1] = True
    for claim in tried:
        for at in range(len(ops)):
            if taken[at]:
                continue
            end = (
                taken.index(True, at, at + _LONGEST) if True in taken[at : at + _LONGEST] else None
            )
            if claimed := claim(g, ops[at : end or at + _LONGEST]):
                found[at] = claimed
                taken[at : at + claimed[0]] = [True] * claimed[0]
    return found
