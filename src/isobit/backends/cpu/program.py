"""What a lowered graph consists of, as the extension takes it: see program.h."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from isobit.model.graph import Value
from isobit.numerics.ops import LOGIT_ROWS, TOKENS


@dataclass(frozen=True)
class BufferView:
    """Where a value lies: see Ref of program.h."""

    slot: int
    width: int
    offset: int = 0
    step: int = 0
    gather: bool = False

    def as_tuple(self) -> tuple[int, int, int, int, bool]:
        """As the extension takes it."""
        return self.slot, self.width, self.offset, self.step, self.gather


Instruction = dict[str, Any]
"""Op of program.h: kind, in, out, vectors, matrices, numbers, integers."""


@dataclass
class Chain:
    """Instructions for each of ``vectors`` vectors of a row."""

    vectors: int
    made: set[Value] = field(default_factory=set)
    ops: list[Instruction] = field(default_factory=list)
    at_once: int = 1


@dataclass
class Phase:
    """What runs between two meetings of the threads."""

    kind: str
    layer: int | None
    rows: str = TOKENS
    traced: bool = False
    chains: list[Chain] = field(default_factory=list)
    op: Instruction = field(default_factory=dict)
    after: list[Instruction] = field(default_factory=list)
    stages: list[Value] = field(default_factory=list)
    used: set[Value] = field(default_factory=set)
    """What it reads and makes: these slots are not given to others of the phase."""
    by_expert: bool = False
    """Whether it needs pairs of tokens and experts in order."""

    def flat(self, places: Mapping[Value, BufferView]) -> dict[str, Any]:
        """As the extension takes it; ``places``: where its stages lie."""
        return {
            "kind": self.kind,
            "layer": -1 if self.layer is None else self.layer,
            "logit_rows": self.rows == LOGIT_ROWS,
            "traced": self.traced,
            "chains": [(c.vectors, c.at_once, [_flat(o) for o in c.ops]) for c in self.chains],
            "after": [_flat(o) for o in self.after],
            "op": _flat(self.op) if self.op else None,
            "shows": [_show(v, places[v]) for v in self.stages],
        }


def instruction(kind: str, **fields: Any) -> Instruction:
    """An instruction; what is not given is empty."""
    empty: Instruction = {
        k: [] for k in ("in", "out", "vectors", "matrices", "numbers", "integers")
    }
    return empty | {"kind": kind, **{k.rstrip("_"): v for k, v in fields.items()}}


def _show(value: Value, place: BufferView) -> tuple[Any, ...]:
    shape = value.shape
    return (
        value.name,
        -1 if value.layer is None else value.layer,
        place.as_tuple(),
        shape.dtype is not np.float32,
        shape.rows == LOGIT_ROWS,
        list(shape.row),
    )


def _flat(i: Instruction) -> dict[str, Any]:
    return i | {end: [place.as_tuple() for place in i[end]] for end in ("in", "out")}
