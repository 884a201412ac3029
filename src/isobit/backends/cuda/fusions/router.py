"""A router's product and the choice of experts, by clusters of blocks that have all experts'
logits of some tokens."""

from collections.abc import Sequence
from functools import partial

from isobit.backends.cuda.device.load import DeviceWeight
from isobit.backends.cuda.device.memory import supers
from isobit.backends.cuda.lowering import Claimed, Lowering
from isobit.backends.cuda.ops import top_k
from isobit.backends.cuda.ops.matmul import Product, dense_rows, dense_shared, dense_tokens, one
from isobit.backends.cuda.workspace import Pass
from isobit.model.graph import Op, Value
from isobit.numerics.ops import TopK

_PATTERN = "z = matmul x", "shares ids = top_k z"
_CLUSTERS = 2, 4, 8
ON = True


def claim(g: Lowering, ops: Sequence[Op]) -> Claimed | None:
    """See :mod:`isobit.backends.cuda.fusions`."""
    v = g.match(ops, _PATTERN)
    if v is None or not (ON and g.captured and g.gpu.clusters) or len(ops[0].weights) != 1:
        return None
    w, choice = g.matrix(ops[0].weights[0]), ops[1].operation
    assert isinstance(choice, TopK)
    rows = dense_rows(g.gpu, w)
    if not rows or -(-w.rows // (2 * rows)) not in _CLUSTERS or choice.groups_used < choice.groups:
        return None
    return 2, partial(_lower, g, ops, w, rows, v["x"], v["z"])


def _lower(g: Lowering, ops: Sequence[Op], w: DeviceWeight, rows: int, x: Value, z: Value) -> None:
    product, to, cluster = Product(g, (w,), x, None), g.new(z), -(-w.rows // (2 * rows))
    s = supers(w.columns)
    defines = w.layout.matmul[2] | {"ROWS": rows, "SUPERS": s}
    defines |= {"CLUSTER": cluster, "AT_ONCE": 1, "PARTS": -(-w.rows // 32)}
    shared = dense_shared(s, rows) + 4 * cluster * 2 * rows

    def chosen_together(p: Pass) -> bool:
        return dense_tokens(g.gpu, cluster, product.pairs(p)) <= cluster

    def multiply(p: Pass) -> None:
        if not chosen_together(p):
            one(product, w, to.address, product.pairs(p), w.rows)

    def choose(p: Pass, how: tuple[int, ...], ids: int, shares: int) -> bool:
        if not chosen_together(p):
            return False
        tokens = product.pairs(p)
        each = dense_tokens(g.gpu, cluster, tokens)
        of_product = (
            w.address,
            product.input(w),
            w.columns,
            tokens,
            each,
            to.address,
            w.rows,
            w.rows,
        )
        grid = cluster, -(-tokens // each)
        g.launch("ops/router", grid, (*of_product, *how, ids, shares), defines, shared=shared)
        return True

    g.emit(multiply)
    top_k.lower(g, ops[1], choose)
