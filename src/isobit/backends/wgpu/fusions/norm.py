"""A residual sum, also of weighted experts, and the norm behind it; or of the wanted rows alone."""

from collections.abc import Sequence

from isobit.backends.wgpu.lowering import BufferView, Lowering
from isobit.backends.wgpu.ops.rms_norm import norm
from isobit.model.graph import Op, match

_SUMS = ("o = combine shares y", "z = add x o"), ("z = add x y",), ()
_NORM, _WANTED = "h = rms_norm z", "wanted = select_rows h rows"
_PATTERNS = (*((*s, _NORM, _WANTED) for s in _SUMS), *((*s, _NORM) for s in _SUMS[:2]))


def claim(g: Lowering, ops: Sequence[Op]) -> int:
    """See :mod:`isobit.backends.wgpu.fusions`."""
    for pattern in _PATTERNS:
        v = match(ops, pattern, ("o", "z", "h") if _WANTED in pattern else ())
        if v is None or len(v["z"].shape.row) > 1:
            continue
        (op,) = (op for op, line in zip(ops, pattern, strict=False) if line == _NORM)
        z, width = v["z"], v["z"].shape.width
        given = v.get("wanted", v["h"])
        x = v.get("x", z)
        state = norm(g, op, x, given, v.get("y"), v.get("shares"))
        if given is v["h"]:  # the sums of all rows are there, too
            g.put(z, BufferView(state, width, width))
            if "o" in v:
                g.put(v["o"], BufferView(state, width, width, behind=2 * width))
        return len(pattern)
    return 0
