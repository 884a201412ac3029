"""Runs of operations that one phase does together, each in a file of its own.

A claim looks at the operations that come next. If it knows how they begin, it lowers as many as it
takes and returns their number; else it returns 0, and what no claim takes is lowered one by one.
Operations on vectors need no claim: those that follow one another share a phase anyway.
"""

from collections.abc import Callable, Sequence

from isobit.backends.cpu.fusions import gate_up
from isobit.backends.cpu.lowering import Lowering
from isobit.model.graph import Op

Claim = Callable[[Lowering, Sequence[Op]], int]

CLAIMS: tuple[Claim, ...] = (gate_up.claim,)
