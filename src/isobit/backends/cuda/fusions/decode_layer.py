"""A whole layer of one token in six launches: norm and q, k, v; attention; its output product; the
router; gate and up; down. With many tiles of keys a seventh merges them (decode/*.cu). Of a split
model they also send what they make to the other parts, and get what those made.

Only for layers of Qwen3's form whose matrices are tiled Q4_K and Q6_K. Of several rows (ROWS), the
same launches read each weight once for all of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from isobit.backends.cuda.device.layout import ACT_BYTES
from isobit.backends.cuda.device.load import DeviceWeight
from isobit.backends.cuda.device.memory import supers
from isobit.backends.cuda.fusions import step_attention
from isobit.backends.cuda.fusions.decode_memory import (
    WARPS,
    Part,
    Streaming,
    streaming,
    tiles_of_block,
)
from isobit.backends.cuda.fusions.head_vectors import HeadVectors
from isobit.backends.cuda.fusions.step_attention import TileResults, attend
from isobit.backends.cuda.lowering import Claimed, Lowering
from isobit.backends.cuda.workspace import (
    NOT_EXCHANGED,
    Exchange,
    Pass,
    Slot,
    Source,
    TracePoint,
)
from isobit.model.graph import Op, Value
from isobit.numerics.ops import RmsNorm, TopK

MERGE_SHARED = 4 * (512 * 38 + 16)
"""Bytes of MergeShared of decode_merge.cu."""
_BUFFER = 1024  # floats of a block's sum, in bytes


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
_GATHERED = "y", "out", "swiglu", "ffn"


@dataclass(frozen=True, eq=False)
class Layer:
    """What the operations of a layer say."""

    h: HeadVectors
    hidden: int
    ffn: int
    experts: int
    """0 for a dense feed-forward."""
    used: int
    """1 for a dense feed-forward."""
    normalise: bool
    eps: tuple[float, float]
    norms: tuple[Callable[[], int], Callable[[], int]]
    """Of attention and of the feed-forward."""
    matrices: Mapping[str, DeviceWeight]
    """q, k, v, out, router (with experts), gate, up, down."""
    rows: int
    gathers: Mapping[str, Op]
    """Of a split model: those of y, out, swiglu and ffn."""

    @property
    def attended(self) -> int:
        """Columns that attention's output product reads."""
        return self._whole("y", self.h.heads * self.h.head_dim)

    @property
    def activated(self) -> int:
        """Columns that down reads."""
        return self._whole("swiglu", self.ffn)

    def _whole(self, name: str, here: int) -> int:
        return self.gathers[name].outputs[0].shape.row[-1] if self.gathers else here

    @property
    def made(self) -> int:
        """Rows of attention's output product, and of down."""
        return self.matrices["out"].rows

    @property
    def defines(self) -> dict[str, str | int]:
        """The definitions that decode.cuh asks for."""
        shapes = {"HIDDEN": self.hidden, "FFN": self.ffn, "EXPERTS": self.experts}
        rows = {"ROWS": self.rows} if self.rows > 1 else {}
        made = {"MADE": self.made} if self.gathers else {}
        return step_attention.defines(self.h) | shapes | {"USED": self.used} | rows | made

    @property
    def kernels(self) -> tuple[str, str]:
        """Of the feed-forward."""
        of = "decode" if self.rows == 1 else "rows"
        return f"{of}_gate_up", f"{of}_down"


def claim(g: Lowering, ops: Sequence[Op]) -> Claimed | None:
    """See :mod:`isobit.backends.cuda.fusions`."""
    for pattern, inner in _PATTERNS:
        v = g.match(ops, pattern, inner)
        if v is None or not g.dies(v["x"], ops[: len(pattern)]):
            continue
        taken = ops[: len(pattern)]
        layer = _layer(g, taken, v)
        if layer is not None and (plan := _plan(layer, g)) is not None:
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
        gathers={n: maker[v[f"whole_{n}"]] for n in _GATHERED if f"whole_{n}" in v},
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


def _plan(layer: Layer, g: Lowering) -> Mapping[str, Streaming] | None:
    """How each kernel is compiled and launched; None if one needs more than there is."""
    gpu, h, m, k, rows = g.gpu, layer.h, layer.matrices, layer.used, layer.rows
    hidden, ffn = supers(layer.hidden), supers(layer.activated)
    heads, kv, attended = h.heads * h.head_dim, h.kv_heads * h.head_dim, supers(layer.attended)
    acts, buffer = rows * hidden * ACT_BYTES, rows * _BUFFER
    whole = 4 * rows * layer.hidden if layer.gathers else 0  # WholeRows of decode.cuh
    router = m["router"].layout.format.name if "router" in m else "F32"
    kind: dict[str, str | int] = {"ROUTER_KIND": f"KIND_{router}"}
    # So much that a multiprocessor takes one block of the router beside decode_attn_out's, not
    # two: decode_gate_up's block, which has room beside one, would have to wait for both.
    routing = Streaming(max(2 * buffer + whole, gpu.shared_most * 2 // 5), kind)

    def plan(fixed: int, *parts: Part) -> Streaming:
        return streaming(gpu, fixed, *parts)

    def part(role: str, outputs: int, n: int, prefix: str = "") -> Part:
        tiles = tiles_of_block(gpu, outputs, n)
        return Part(m[role], tiles, prefix, rows * tiles)

    qkv = plan(
        acts + buffer + whole, part("q", heads + kv, hidden, "QK_"), part("v", kv, hidden, "V_")
    )
    out = plan(rows * (attended * ACT_BYTES + 4 * WARPS), part("out", layer.made, attended))
    # With few tiles, when some multiprocessors have their registers taken by attention: more
    # than half of the memory, where there is room, so that no multiprocessor takes two blocks.
    # The second is late, and keeps the router's and decode_gate_up's away: all wait for it.
    half = gpu.shared_most // 2 + 1
    headroom = gpu.shared_most - 3072 - max(qkv.shared, routing.shared)
    gate_up, down = layer.kernels
    pairs = rows * k
    places = (
        32 + 9 * pairs + rows * pairs + 3 * layer.experts + 3 * 4 * WARPS
    )  # of expert_slots.cuh
    if rows == 1:
        choosing = (
            4 * WARPS * (layer.experts + 1) + 2 * layer.experts
            if layer.experts
            else _BUFFER + whole
        )
        choosing += 17 * k + 8
    else:
        choosing = 4 * WARPS * (layer.experts + 1) + places if layer.experts else buffer + whole
        choosing += 8 * pairs
    # Each pair of a row and an expert has products of its own, of as many units as a block may have
    # of one expert; tiles are at most those of as many experts as pairs.
    units = 2 * tiles_of_block(gpu, pairs * layer.ffn if layer.experts else layer.ffn, hidden)
    of_gate_up = pairs * 2 * tiles_of_block(gpu, layer.ffn, hidden) if rows > 1 else units
    each = pairs if layer.experts else 1  # that share a group of rows of down
    downs = tiles_of_block(gpu, layer.made, each * ffn)
    found = {
        "decode_qkv": qkv,
        "decode_attn_out": out.also(kind),
        "decode_attn_out alone": out.also(kind).with_at_least(half if half <= headroom else 0),
        "decode_router": routing,
        gate_up: plan(acts + choosing, Part(m["gate"], units, products=of_gate_up)).also(kind),
        down: plan(
            pairs * ffn * ACT_BYTES + 8 * pairs + (places if rows > 1 else 0),
            Part(m["down"], downs, products=downs if layer.experts else rows * downs),
        ).also({"FFN": layer.activated}),
    }
    return found if all(p.shared <= gpu.shared_most for p in found.values()) else None


def _lower(
    g: Lowering, v: Mapping[str, Value], layer: Layer, plan: Mapping[str, Streaming]
) -> None:
    h, m, n, rows = layer.h, layer.matrices, layer.used, layer.rows
    g.whole_layers += 1
    (norm, ffn_norm), (eps, ffn_eps) = layer.norms, layer.eps
    came = g.take_landing(v["x"])
    x = g.dense(v["x"])  # every kernel works on it in place
    for name in ("x1", "x2"):
        g.put(v[name], x)
    qkv, results = g.new(v["qkv"]), TileResults(g, h)
    attention = g.slot("attention", h.heads * h.head_dim)
    logits = g.new(v["z"]) if layer.experts else None
    acts = g.slot("acts", ACT_BYTES // 4 * supers(layer.hidden))
    # Words with the number of a step, which is not 0.
    chosen = g.fixed("chosen", 2 * n * rows, zero=True, lasting=True)
    prediction = g.fixed("prediction", 2 * (1 + layer.experts * rows), zero=True)
    swiglu = g.new(v["swiglu"])
    ahead = int(_ahead(layer, g))
    gate_up_kernel, down_kernel = layer.kernels
    exchanges = {name: g.exchange_of(op) for name, op in layer.gathers.items()}
    of_y, of_out, of_swiglu, of_ffn = (exchanges.get(n, NOT_EXCHANGED) for n in _GATHERED)

    def launch(
        kernel: str,
        arguments: tuple[int | float, ...],
        received: Exchange = NOT_EXCHANGED,
        sent: Exchange | None = None,
        *,
        blocks: int = 0,
        way: str = "",
    ) -> None:
        how = plan[kernel + way]
        g.launch(
            f"fusions/decode/{kernel}",
            (blocks or g.gpu.multiprocessors,),
            arguments + both(received, sent),
            layer.defines | how.defines | received.defines | (sent.sent if sent else {}),
            shared=how.shared,
        )

    def both(received: Exchange, sent: Exchange | None) -> tuple[int, ...]:
        """Arguments of a kernel that receives, and if ``sent`` is given may send."""
        table = max(received.arguments[0], sent.arguments[0] if sent else 0)
        return (table, received.site, *((sent.site,) if sent else ()))

    def own() -> int:
        """x from the first value that this part makes."""
        return x.address + 4 * of_out.first

    def projections(p: Pass) -> None:
        matrices = (m[role].address for role in "qkv")
        launch(
            "decode_qkv",
            (x.address, norm(), eps, *matrices, p.inputs.number, prediction.address, qkv.address),
            came,
        )

    def attention_block(p: Pass) -> None:
        at, most = p.inputs, step_attention.tiles_at_once(h, g.gpu, rows)
        attend(
            g, h, p, qkv.address, results, most if p.many else min(most, step_attention.FEW_TILES)
        )
        if p.many:
            g.launch(
                "fusions/decode/decode_merge",
                (h.heads * h.head_dim // 32, rows),
                (at.positions, *results.addresses, g.tiles, attention.address, *of_y.arguments),
                step_attention.defines(h) | of_y.sent,
                shared=MERGE_SHARED,
            )
        maxima, outputs = results.addresses
        experts = (m[role].address for role in ("gate", "up", "down"))
        launch(
            "decode_attn_out",
            (attention.address, at.positions, at.number, maxima, 0 if p.many else outputs, g.tiles)
            + (m["out"].address, m["router"].address if "router" in m else 0, ffn_norm(), *experts)
            + (m["gate"].matrix_bytes, m["down"].matrix_bytes, ahead, prediction.address)
            + (x.address, own()),
            of_y,
            of_out,
            way="" if p.many else " alone",
        )

    def router(_: Pass) -> None:
        assert logits is not None
        launch(
            "decode_router",
            (x.address, ffn_norm(), ffn_eps, m["router"].address, logits.address, acts.address),
            of_out,
            blocks=max(layer.experts, g.gpu.multiprocessors),
        )

    def gate_up(p: Pass) -> None:
        launch(
            gate_up_kernel,
            (acts.address, logits.address if logits else 0, int(layer.normalise), x.address)
            + (ffn_norm(), ffn_eps, m["gate"].address, m["up"].address, p.inputs.number)
            + (prediction.address, chosen.address, swiglu.address),
            NOT_EXCHANGED if layer.experts else of_out,
            of_swiglu,
        )

    def down(p: Pass) -> None:
        launch(
            down_kernel,
            (swiglu.address, p.inputs.number, chosen.address, m["down"].address, own()),
            of_swiglu,
            of_ffn,
        )

    g.emit(projections)
    if came is not NOT_EXCHANGED:
        g.mark(v["x"])  # it is whole now
    g.mark(v["qkv"])
    g.emit(attention_block, *(() if layer.gathers else (v["x1"],)))
    if layer.experts:
        g.emit(router, v["z"])
    g.emit(gate_up)
    if layer.gathers:
        g.mark(v["x1"])
    if layer.experts:
        for name, taken in (("shares", _shares), ("ids", _ids)):
            read = partial(_read_chosen, chosen, (rows, n), taken)
            g.made.append(TracePoint(v[name], read, True))
    g.mark(v["swiglu"])
    g.emit(down, *(() if layer.gathers else (v["x2"],)))
    if layer.gathers:
        g.lands(v["x2"], of_ffn)


def _ahead(layer: Layer, g: Lowering) -> bool:
    """Whether predicted experts are fetched ahead: of one row, if they fill at most half of the
    device's shared cache. Of several rows it costs more than it gives (docs/performance.md)."""
    m, each = layer.matrices, ("gate", "up", "down")
    taken = layer.used * sum(m[role].matrix_bytes for role in each)
    return layer.rows == 1 and 2 * taken <= g.gpu.cache_bytes


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
    return (words >> np.uint64(16) & np.uint64(0xFFFF)).astype(np.int32)
