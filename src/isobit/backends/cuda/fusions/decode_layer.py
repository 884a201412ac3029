"""A whole layer of one token in six launches: norm and q, k, v; attention; its output product; the
router; gate and up; down. With many tiles of keys a seventh merges them (decode/*.cu). Of a split
model they also send what they make to the other parts, and get what those made.

Only for layers of Qwen3's form whose matrices are tiled Q4_K and Q6_K. Of several rows (ROWS), the
same launches read each weight once for all of them.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from isobit.backends.cuda.device.load import DeviceWeight
from isobit.backends.cuda.fusions import step_attention
from isobit.backends.cuda.fusions.decode_launches import GATHERED, Launches, Layer, planned
from isobit.backends.cuda.fusions.decode_memory import Streaming
from isobit.backends.cuda.fusions.head_vectors import HeadVectors
from isobit.backends.cuda.lowering import Claimed, Lowering
from isobit.backends.cuda.workspace import NOT_EXCHANGED, Pass, Slot, Source, TracePoint
from isobit.model.graph import Op, Value
from isobit.numerics.ops import RmsNorm, TopK


def _pattern(experts: bool, split: bool) -> tuple[tuple[str, ...], set[str]]:
    """The operations of a layer, and what nothing else reads."""

    def whole(name: str) -> tuple[str, ...]:
        return (f"whole_{name} = gather {name}",) if split else ()

    of = "whole_{}".format if split else str
    lines = (
        "h = rms_norm x",
        "qkv = matmul h",
        *step_attention.PATTERN_OF_STEP,
        *whole("y"),
        f"out = matmul {of('y')}",
        *whole("out"),
        f"x1 = add x {of('out')}",
        "h1 = rms_norm x1",
    )
    if experts:
        lines += (
            "z = matmul h1",
            "shares ids = top_k z",
            "gate = expert_matmul h1 ids",
            "up = expert_matmul h1 ids",
            "swiglu = silu_gate gate up",
            *whole("swiglu"),
            f"each = expert_matmul {of('swiglu')} ids",
            "ffn = combine shares each",
        )
    else:
        lines += (
            "gate = matmul h1",
            "up = matmul h1",
            "swiglu = silu_gate gate up",
            *whole("swiglu"),
            f"ffn = matmul {of('swiglu')}",
        )
    lines += (*whole("ffn"), f"x2 = add x1 {of('ffn')}")
    return lines, {n for line in lines for n in line.partition(" = ")[0].split()} - {"x2"}


_PATTERNS = tuple(_pattern(experts, split) for experts in (True, False) for split in (False, True))


def claim(g: Lowering, ops: Sequence[Op]) -> Claimed | None:
    """See :mod:`isobit.backends.cuda.fusions`."""
    for pattern, inner in _PATTERNS:
        v = g.match(ops, pattern, inner)
        if v is None or not g.dies(v["x"], ops[: len(pattern)]):
            continue
        taken = ops[: len(pattern)]
        layer = _layer(g, taken, v)
        if layer is not None and (plan := planned(layer, g)) is not None:
            return len(pattern), partial(_lower, g, v, layer, plan)
    return None


def _layer(g: Lowering, ops: Sequence[Op], v: Mapping[str, Value]) -> Layer | None:
    """The layer, if the kernels take it."""
    maker = {value: op for op in ops for value in op.outputs}
    made = {name: maker[value] for name, value in v.items() if value in maker}
    h = HeadVectors.of(g, ops[2:], v)
    if h is None or not step_attention.takes(g, h) or not step_attention.plain(made["y"]):
        return None
    products = ("qkv", "q", "k", "v"), ("out", "out"), ("z", "router"), ("gate", "gate")
    m: dict[str, DeviceWeight] = {}
    for of, *names in (*products, ("up", "up"), ("each" if "z" in v else "ffn", "down")):
        if of not in made:
            continue
        if len(made[of].weights) != len(names):
            return None
        m |= {name: g.matrix(w) for name, w in zip(names, made[of].weights, strict=True)}
    choice = made["ids"].operation if "ids" in v else None
    assert choice is None or isinstance(choice, TopK)
    if choice and (made["ids"].weights or not choice.plain):
        return None
    first, second = made["h"].operation, made["h1"].operation
    assert isinstance(first, RmsNorm)
    assert isinstance(second, RmsNorm)
    layer = Layer(
        h,
        hidden=v["x"].shape.width,
        ffn=v["swiglu"].shape.row[-1],
        experts=v["z"].shape.width if "z" in v else 0,
        used=choice.k if choice else 1,
        normalise=choice.normalise if choice else False,
        eps=(first.eps, second.eps),
        norms=(g.vector(made["h"].weights[0]), g.vector(made["h1"].weights[0])),
        matrices=m,
        rows=g.rows,
        gathers={n: maker[v[f"whole_{n}"]] for n in GATHERED if f"whole_{n}" in v},
    )
    if not all(map(g.exchanges_within, layer.gathers.values())):
        return None
    launch_shape = (
        all(w.layout.fused for name, w in m.items() if name != "router")
        and m["q"].layout == m["k"].layout
        and m["gate"].layout == m["up"].layout
        and ("router" not in m or m["router"].layout.kind == "floats")
        and [m[n].rows for n in "qkv"] == [h.head_dim * n for n in (h.heads, *[h.kv_heads] * 2)]
        and layer.experts <= 512
        and layer.used <= 32
        and layer.attended % 256 == 0
        and m["down"].rows == layer.made
    )
    return layer if launch_shape else None


def _lower(
    g: Lowering, v: Mapping[str, Value], layer: Layer, plan: Mapping[str, Streaming]
) -> None:
    g.whole_layers += 1
    its, split = Launches(g, layer, plan, v), bool(layer.gathers)
    g.emit(its.projections)
    if its.came is not NOT_EXCHANGED:
        g.mark(v["x"])  # it is whole now
    g.mark(v["qkv"])
    g.emit(its.attention, *(() if split else (v["x1"],)))
    if layer.experts:
        g.emit(its.router, v["z"])
    g.emit(its.gate_up)
    if split:
        g.mark(v["x1"])
    if layer.experts:
        for name, taken in (("shares", _shares), ("ids", _ids)):
            read = partial(_read_chosen, its.chosen, (layer.rows, layer.used), taken)
            g.made.append(TracePoint(v[name], read, True))
    g.mark(v["swiglu"])
    g.emit(its.down, *(() if split else (v["x2"],)))
    if split:
        g.lands(v["x2"], its.of("ffn"))


def _read_chosen(
    chosen: Slot,
    shape: tuple[int, int],
    taken: Callable[[NDArray[np.uint64]], NDArray[np.generic]],
    source: Source,
    _: Pass,
) -> NDArray[np.generic]:
    """What a layer chose: words of step.cuh's ``packed``."""
    words = np.empty(shape, np.uint64)
    source.download(chosen.address, words)
    return taken(words)


def _shares(words: NDArray[np.uint64]) -> NDArray[np.generic]:
    return (words >> np.uint64(32)).astype(np.uint32).view(np.float32)


def _ids(words: NDArray[np.uint64]) -> NDArray[np.generic]:
    return words.view(np.uint16)[..., 1::4].astype(np.int32)
