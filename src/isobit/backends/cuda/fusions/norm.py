"""A residual sum, also of weighted experts and a shared one, and the norm behind it, with its
quantised form; of a split model with what the other parts have of the addend."""

from collections.abc import Mapping, Sequence
from functools import partial

from isobit.backends.cuda.fusions import gate_up
from isobit.backends.cuda.lowering import Claimed, Lowering
from isobit.backends.cuda.ops import matmul
from isobit.backends.cuda.ops.rms_norm import fits, norm
from isobit.backends.cuda.workspace import NOT_EXCHANGED
from isobit.model.graph import Op, Value

_COMBINE, _GATHER, _NORM = "y = combine shares each", "whole = gather y", "h = rms_norm z"
_PATTERNS = (
    ((_COMBINE, _GATHER, "z = add x whole", _NORM), ("y", "whole")),
    ((_COMBINE, "z = add x y", _NORM), ("y",)),
    ((_GATHER, "z = add x whole", _NORM), ("whole",)),
    (("z = add x y", _NORM), ()),
)
_SHARED = (
    "routed = combine shares each",
    "gate = matmul h1",
    "up = matmul h1",
    "swiglu = silu_gate gate up",
    "shared = matmul swiglu",
    "share = matmul h1",
    "y = gated_add routed shared share",
    "z = add x y",
    "h = rms_norm z",
)
"""A shared expert stands between the sum of the others and the residual."""


def claim_shared(g: Lowering, ops: Sequence[Op]) -> Claimed | None:
    """See :mod:`isobit.backends.cuda.fusions`."""
    v, taken = g.match(ops, _SHARED, ("routed", "shared", "share", "y")), ops[: len(_SHARED)]
    if v is None or not fits(v["z"].shape.width) or not g.dies(v["x"], taken):
        return None
    gate = g.matrix(taken[5].weights[0])
    first = gate_up.claim(g, taken[1:4])
    if first is None or gate.layout.format.name != "F32" or len(taken[5].weights) > 1:
        return None

    def lower() -> None:
        first[1]()
        matmul.lower(g, taken[4])
        x = g.dense(v["x"])
        g.put(v["z"], x)
        shared = v["shared"], v["h1"], lambda: gate.address
        norm(g, taken[-1], x, v["h"], v["each"], v["shares"], v["z"], shared=shared)

    return len(_SHARED), lower


def claim(g: Lowering, ops: Sequence[Op]) -> Claimed | None:
    """See :mod:`isobit.backends.cuda.fusions`."""
    for pattern, inner in _PATTERNS:
        v = g.match(ops, pattern, inner)
        if v is None or len(v["z"].shape.row) > 1 or not fits(v["z"].shape.width):
            continue
        taken = ops[: len(pattern)]
        gather = taken[pattern.index(_GATHER)] if _GATHER in pattern else None
        if gather and not g.exchanges_within(gather):
            continue
        if g.dies(v["x"], taken):  # the sum takes its place
            if pattern[0].startswith("z = add") and g.ends(v["y"], taken):
                g.added.add(v["y"])
            return len(pattern), partial(_lower, g, taken[-1], gather, v)
    return None


def _lower(g: Lowering, op: Op, gather: Op | None, v: Mapping[str, Value]) -> None:
    x, added = g.dense(v["x"]), v.get("each", v["y"])
    g.put(v["z"], x)
    columns = v["y"].shape.width if gather else 0
    exchange = g.exchange_of(gather) if gather else NOT_EXCHANGED
    norm(g, op, x, v["h"], added, v.get("shares"), v["z"], exchange=exchange, columns=columns)
