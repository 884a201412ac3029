"""Runs of operations that some launches do together, each in a file of its own.

A claim looks at the operations that come next. If it knows how they begin, it lowers as many as it
takes and returns their number; else it returns 0, and what no claim takes is lowered one by one.
"""

from collections.abc import Callable, Sequence

from isobit.backends.wgpu.fusions import gate_up, head_vectors, norm
from isobit.backends.wgpu.lowering import Lowering
from isobit.model.graph import Op

Claim = Callable[[Lowering, Sequence[Op]], int]

CLAIMS: tuple[Claim, ...] = (head_vectors.claim, norm.claim, gate_up.claim)
"""Longest first."""
