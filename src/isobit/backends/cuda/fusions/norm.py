"""A residual sum, also of weighted experts, and the norm behind it, with its quantised form."""

from collections.abc import Mapping, Sequence
from functools import partial

from isobit.backends.cuda.device.memory import supers
from isobit.backends.cuda.lowering import Claimed, Lowering
from isobit.backends.cuda.ops.matmul import multiply
from isobit.backends.cuda.ops.rms_norm import fits, norm, normed
from isobit.backends.cuda.slots import Pass
from isobit.model.graph import Op, Value
from isobit.numerics.ops import RmsNorm

_ROWS, _SUPERS = 16, 9  # of a block of norm_router.cu, and superblocks that its registers hold
_SHARED = 18 << 10  # bytes of its NormShared, but for a row
_EACH = 2
"""Tokens of its blocks up to which it pays."""
_ROUTER = "z = add x y", "h = rms_norm z", "logits = matmul h"
_PATTERNS = (
    (("o = combine shares y", "z = add x o", "h = rms_norm z"), ("o",)),
    (("z = add x y", "h = rms_norm z"), ()),
)


def claim(g: Lowering, ops: Sequence[Op]) -> Claimed | None:
    """See :mod:`isobit.backends.cuda.fusions`."""
    v = g.match(ops, _ROUTER)
    if g.captured and v is not None and _routes(g, ops, v):
        return len(_ROUTER), partial(_lower_router, g, ops[:3], v)
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


def _routes(g: Lowering, ops: Sequence[Op], v: Mapping[str, Value]) -> bool:
    """Whether norm_router.cu knows such a product, and the norm is otherwise only multiplied."""
    weights, n = ops[2].weights, v["h"].shape.width
    alone = len(weights) == 1 and weights[0].format.name == "F32"
    return (
        alone
        and len(v["z"].shape.row) == 1
        and n % 256 == 0
        and supers(n) <= _SUPERS
        and g.only_multiplied(v["h"], but=ops[2])
    )


def _lower_router(g: Lowering, ops: Sequence[Op], v: Mapping[str, Value]) -> None:
    """In a step of few tokens, sum, norm and the router's product are one launch."""
    x, more, z, y = g.dense(v["x"]), g.dense(v["y"]), g.new(v["z"]), g.new(v["logits"])
    w, norm_op, n = g.matrix(ops[2].weights[0]), ops[1], v["h"].shape.width
    assert isinstance(norm_op.operation, RmsNorm)
    eps, weight = norm_op.operation.eps, g.vector(norm_op.weights[0])
    apart = normed(g, norm_op, x, v["h"], v["y"], None, z)
    product, acts = multiply(g, [w], v["h"], y), g.acts(v["h"], n)
    blocks = -(-w.rows // _ROWS)

    def make(p: Pass) -> None:
        each = -(-p.tokens // max(1, g.gpu.multiprocessors // blocks))
        if each > _EACH:
            apart(p)
            product(p)
            return
        g.launch(
            "ops/norm_router",
            (blocks, -(-p.tokens // each)),
            (x.address, more.address, weight(), eps, z.address, acts.address)
            + (w.address, w.rows, y.address, p.tokens, each),
            {"WIDTH": n},
            shared=_SHARED + 4 * n,
        )

    g.emit(make, v["z"], v["logits"])
