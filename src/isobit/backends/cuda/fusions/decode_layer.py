"""A whole layer of one token in six launches: norm and q, k, v; attention; its output product; the
router; gate and up; down. With many tiles of keys a seventh merges them (decode/*.cu). Of a split
model they also send what they make to the other parts, and get what those made.

For layers of Qwen3's form, and of Qwen3.5's (attention with an output gate, delta nets, a shared
expert), whose matrices are tiled Q4_K and Q6_K. Of several rows (ROWS), only of Qwen3's form: q, k
and v read each weight once for all of them, and so does what follows of a dense feed-forward; with
experts, of which each row has its own, a block behind attention has one row (Share of decode.cuh).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from isobit.backends.cuda.device.load import DeviceWeight, fuse_adjacent
from isobit.backends.cuda.fusions import delta_net, step_attention
from isobit.backends.cuda.fusions.decode_launches import GATHERED, Launches, Layer, planned
from isobit.backends.cuda.fusions.decode_memory import Streaming
from isobit.backends.cuda.fusions.delta_net import DeltaNet
from isobit.backends.cuda.fusions.head_vectors import HeadVectors
from isobit.backends.cuda.lowering import Claimed, Lowering
from isobit.backends.cuda.workspace import NOT_EXCHANGED, Pass, Slot, Source, TracePoint
from isobit.model.graph import Op, Value
from isobit.numerics.ops import RmsNorm, TopK

_ATTENTION = step_attention.PATTERN_OF_STEP, "y"
_MIXERS: tuple[tuple[tuple[str, ...], str], ...] = (
    _ATTENTION,
    (step_attention.GATED_PATTERN_OF_STEP, "gated"),
    (delta_net.PATTERN, "taken"),
)
"""Operations between a layer's first products and its output product, and what the latter reads."""
_EXPERTS = (
    "z = matmul h1",
    "shares ids = top_k z",
    "gate_out = expert_matmul h1 ids",
    "up_out = expert_matmul h1 ids",
    "swiglu = silu_gate gate_out up_out",
    "each = expert_matmul swiglu ids",
    "ffn = combine shares each",
)
_DENSE = (
    "gate_out = matmul h1",
    "up_out = matmul h1",
    "swiglu = silu_gate gate_out up_out",
    "ffn = matmul swiglu",
)
_SHARED = (
    *_EXPERTS[:-1],
    "routed = combine shares each",
    "shared_gate = matmul h1",
    "shared_up = matmul h1",
    "shared_swiglu = silu_gate shared_gate shared_up",
    "shared_out = matmul shared_swiglu",
    "share = matmul h1",
    "ffn = gated_add routed shared_out share",
)


def _pattern(
    mixer: Sequence[str], taken: str, ffn: Sequence[str], *, split: bool = False
) -> tuple[tuple[str, ...], set[str]]:
    """The operations of a layer, and what nothing else reads."""
    lines = ["h = rms_norm x", "qkv = matmul h", *mixer, f"out = matmul {taken}"]
    lines += ["x1 = add x out", "h1 = rms_norm x1", *ffn, "x2 = add x1 ffn"]
    for name in GATHERED if split else ():
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{name} = "))
        behind = [f" {line} ".replace(f" {name} ", f" whole_{name} ").strip() for line in lines]
        lines = [*lines[: at + 1], f"whole_{name} = gather {name}", *behind[at + 1 :]]
    return tuple(lines), {n for line in lines for n in line.partition(" = ")[0].split()} - {"x2"}


_PATTERNS = (
    *(_pattern(*_ATTENTION, ffn, split=True) for ffn in (_EXPERTS, _DENSE)),
    *(_pattern(*mixer, ffn) for mixer in _MIXERS for ffn in (_EXPERTS, _SHARED, _DENSE)),
)


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


def _mixer(
    g: Lowering, ops: Sequence[Op], made: Mapping[str, Op], v: Mapping[str, Value]
) -> HeadVectors | DeltaNet | None:
    """What stands between the first products and the output product, if the kernels take it."""
    if "decay" in made:
        return DeltaNet.of(g, made, v)
    h = HeadVectors.of(g, ops[2:], v)
    if h is None or not step_attention.takes(g, h) or not step_attention.plain(made["y"]):
        return None
    return h


def _matrices(
    g: Lowering, made: Mapping[str, Op], mixer: HeadVectors | DeltaNet
) -> dict[str, DeviceWeight] | None:
    """By role, if there are as many as the kernels take."""
    first = [g.matrix(w) for w in made["qkv"].weights]
    if isinstance(mixer, DeltaNet):  # channels, and what the convolution leaves alone
        first = [first[0], *fuse_adjacent(first[1:])]
    roles = ("q", "k", "v") if isinstance(mixer, HeadVectors) else ("q", "v")
    if len(first) != len(roles):
        return None
    found = dict(zip(roles, first, strict=True))
    of = {"out": "out", "z": "router", "gate_out": "gate", "up_out": "up", "shared_gate": "s_gate"}
    of |= {"shared_up": "s_up", "shared_out": "s_down", "share": "s_share"}
    for name, role in (of | {"each" if "z" in made else "ffn": "down"}).items():
        if name not in made:
            continue
        if len(made[name].weights) != 1:
            return None
        found[role] = g.matrix(made[name].weights[0])
    return found


def _layer(g: Lowering, ops: Sequence[Op], v: Mapping[str, Value]) -> Layer | None:
    """The layer, if the kernels take it."""
    maker = {value: op for op in ops for value in op.outputs}
    made = {name: maker[value] for name, value in v.items() if value in maker}
    mixer = _mixer(g, ops, made, v)
    if mixer is None or (m := _matrices(g, made, mixer)) is None:
        return None
    choice = made["ids"].operation if "ids" in v else None
    assert choice is None or isinstance(choice, TopK)
    if choice and (made["ids"].weights or not choice.plain):
        return None
    first, second = made["h"].operation, made["h1"].operation
    assert isinstance(first, RmsNorm)
    assert isinstance(second, RmsNorm)
    layer = Layer(
        mixer,
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
    floats = "router", "s_share"
    launch_shape = (
        all(w.layout.fused for name, w in m.items() if name not in floats)
        and all(m[name].layout.kind == "floats" for name in floats if name in m)
        and ("k" not in m or m["q"].layout == m["k"].layout)
        and m["gate"].layout == m["up"].layout
        and tuple(m[n].rows if n in m else 0 for n in "qkv") == layer.projected
        and layer.experts <= 512
        and layer.used <= 32
        and layer.attended % 256 == 0
        and m["down"].rows == layer.made
        and (layer.rows == 1 or layer.plain)
        and layer.rows <= g.gpu.multiprocessors
        and all(_alike(m[f"s_{n}"], m[n]) for n in ("gate", "up", "down") if layer.shared)
    )
    return layer if launch_shape else None


def _alike(shared: DeviceWeight, experts: DeviceWeight) -> bool:
    """Whether a shared expert's matrix is as one of the others'."""
    return (shared.layout, shared.rows, shared.columns) == (
        experts.layout,
        experts.rows,
        experts.columns,
    )


def _lower(
    g: Lowering, v: Mapping[str, Value], layer: Layer, plan: Mapping[str, Streaming]
) -> None:
    g.whole_layers += 1
    its, split = Launches(g, layer, plan, v), bool(layer.gathers)
    g.emit(its.projections)
    if its.came is not NOT_EXCHANGED:
        g.mark(v["x"])  # it is whole now
    if "channels" not in v:  # the others never lie there before the convolution
        g.mark(v["qkv"])
    g.emit(its.mixed, *(() if split else (v["x1"],)))
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
