"""A residual sum, also of weighted experts, and the norm behind it, with its quantised form."""

from collections.abc import Mapping, Sequence
from functools import partial

from isobit.backends.cuda.lowering import Claimed, Lowering
from isobit.backends.cuda.ops.rms_norm import fits, norm
from isobit.model.graph import Op, Value

_PATTERNS = (
    (("o = combine shares y", "z = add x o", "h = rms_norm z"), ("o",)),
    (("z = add x y", "h = rms_norm z"), ()),
)


def claim(g: Lowering, ops: Sequence[Op]) -> Claimed | None:
    """See :mod:`isobit.backends.cuda.fusions`."""
    for pattern, inner in _PATTERNS:
        v = g.match(ops, pattern, inner)
        if v is None or len(v["z"].shape.row) > 1 or not fits(v["z"].shape.width):
            continue
        taken = ops[: len(pattern)]
        if g.dies(v["x"], taken):  # the sum takes its place
            return len(pattern), partial(_lower, g, taken[-1], v)
    return None


def _lower(g: Lowering, op: Op, v: Mapping[str, Value]) -> None:
    x = g.dense(v["x"])
    g.put(v["z"], x)
    norm(g, op, x, v["h"], v["y"], v.get("shares"), v["z"])
