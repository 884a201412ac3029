"""Gate and up of the same pairs in one product, and SwiGLU of them."""

from collections.abc import Mapping, Sequence
from functools import partial

from isobit.backends.cuda.device.load import DeviceWeight
from isobit.backends.cuda.device.memory import supers
from isobit.backends.cuda.lowering import WARPS, Claimed, Lowering
from isobit.backends.cuda.ops import silu_gate
from isobit.backends.cuda.ops.batch_matmul import stream
from isobit.backends.cuda.ops.launch_shapes import fits_all
from isobit.backends.cuda.ops.matmul import on_tensor_cores, one, prefers_tensor_cores
from isobit.backends.cuda.ops.product import Product
from isobit.backends.cuda.workspace import Pass
from isobit.model.graph import Op, Value

_DENSE = "gate = matmul x", "up = matmul x", "y = silu_gate gate up"
_EXPERTS = "gate = expert_matmul x ids", "up = expert_matmul x ids", _DENSE[2]


def claim(g: Lowering, ops: Sequence[Op]) -> Claimed | None:
    """See :mod:`isobit.backends.cuda.fusions`."""
    inner = ("gate", "up")
    v = g.match(ops, _EXPERTS, inner) or g.match(ops, _DENSE, inner)
    if v is None or len(ops[0].weights) + len(ops[1].weights) != 2:
        return None
    gate, up = (g.matrix(op.weights[0]) for op in ops[:2])
    if len(ops) > 3 and ops[3].kind == "gather" and ops[3].inputs == (v["y"],):
        gather, whole = ops[3], ops[3].outputs[0]
        within = g.ends(v["y"], [gather]) and g.only_multiplied(whole) and fits_all(g, gate, up)
        if within and g.exchanges_within(gather):
            return 4, partial(_lower, g, ops[:3], v, gate, up, gather)
    return 3, partial(_lower, g, ops[:3], v, gate, up)


def _lower(
    g: Lowering,
    ops: Sequence[Op],
    v: Mapping[str, Value],
    gate: DeviceWeight,
    up: DeviceWeight,
    gather: Op | None = None,
) -> None:
    """``gather``: of the SwiGLU, which is sent to the other parts as it is made."""
    product = Product(g, (gate, up), v["x"], v.get("ids"))
    if fits_all(g, gate, up):
        together, exchange = g.target(v["y"])
        if product.stack and g.captured:
            g.ahead.weights = gate, up
        exchange = g.exchange_of(gather) if gather else exchange

        def both(p: Pass) -> None:
            planned = not product.stack
            y, stride = together.address, together.step
            stream(product, p, gate, y, stride, up=up, planned=planned, exchange=exchange)

        g.emit(both, v["y"])
        if gather:
            g.arrives(gather.outputs[0], v["y"], exchange)
        return
    to = g.new(v["gate"]), g.new(v["up"])

    def make(p: Pass) -> None:
        pairs, y = product.pairs(p), [slot.address for slot in to]
        if gate.followed_by(up) and prefers_tensor_cores(gate, pairs, stack=product.stack):
            step = (y[1] - y[0]) // 4
            on_tensor_cores(product, gate, y[0], pairs, gate.rows, rounds=2, y_step=step)
            return
        for w, at in zip((gate, up), y, strict=True):
            one(product, w, at, pairs, w.rows)

    g.emit(make, v["gate"], v["up"])
    y = v["y"]
    if not g.only_multiplied(y):
        silu_gate.lower(g, ops[2])
        return
    n, acts = y.shape.row[-1], g.acts_of(y, y.shape.row[-1])

    def activate(p: Pass) -> None:
        rows = p.rows(y.shape) * (y.shape.width // n)
        arguments = (to[0].address, to[1].address, n, rows, acts.address)
        g.launch("ops/silu_gate.swiglu_quantise", (-(-rows * supers(n) // WARPS),), arguments)

    g.emit(activate)
