"""The kernels of a whole layer (decode_layer.py): their memory, definitions and launches."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
from isobit.backends.cuda.lowering import Lowering
from isobit.backends.cuda.workspace import NOT_EXCHANGED, Exchange, Pass
from isobit.model.graph import Op, Value

MERGE_SHARED = 4 * (512 * 38 + 16)
"""Bytes of MergeShared of decode_merge.cu."""
GATHERED = "y", "out", "swiglu", "ffn"
"""What the parts of a split model give one another."""
_BUFFER = 1024  # floats of a block's sum, in bytes


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


def planned(layer: Layer, g: Lowering) -> Mapping[str, Streaming] | None:
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


class Launches:
    """The launches of a layer, once its values have places."""

    def __init__(
        self, g: Lowering, layer: Layer, plan: Mapping[str, Streaming], v: Mapping[str, Value]
    ) -> None:
        h, n, rows = layer.h, layer.used, layer.rows
        self._g, self._layer, self._plan = g, layer, plan
        self.came = g.take_landing(v["x"])
        """How other parts' columns of the layer's input come."""
        self._x = x = g.dense(v["x"])  # every kernel works on it in place
        for name in ("x1", "x2"):
            g.put(v[name], x)
        self._qkv, self._results = g.new(v["qkv"]), TileResults(g, h)
        self._attention = g.slot("attention", h.heads * h.head_dim)
        self._logits = g.new(v["z"]) if layer.experts else None
        self._acts = g.slot("acts", ACT_BYTES // 4 * supers(layer.hidden))
        # Words with the number of a step, which is not 0.
        self.chosen = g.fixed("chosen", 2 * n * rows, zero=True, lasting=True)
        self._prediction = g.fixed("prediction", 2 * (1 + layer.experts * rows), zero=True)
        self._swiglu = g.new(v["swiglu"])
        self._exchanges = {name: g.exchange_of(op) for name, op in layer.gathers.items()}

    def of(self, name: str) -> Exchange:
        """How parts of a split model give one another what is GATHERED."""
        return self._exchanges.get(name, NOT_EXCHANGED)

    def _launch(
        self,
        kernel: str,
        arguments: tuple[int | float, ...],
        received: Exchange = NOT_EXCHANGED,
        sent: Exchange | None = None,
        *,
        blocks: int = 0,
        way: str = "",
    ) -> None:
        """``sent``: of a kernel that sends something, in a split model."""
        how, table = self._plan[kernel + way], received.arguments[0]
        ends: tuple[int, ...] = (table, received.site)
        if sent:
            ends = (table or sent.arguments[0], received.site, sent.site)
        self._g.launch(
            f"fusions/decode/{kernel}",
            (blocks or self._g.gpu.multiprocessors,),
            arguments + ends,
            self._layer.defines | how.defines | received.defines | (sent.sent if sent else {}),
            shared=how.shared,
        )

    def _own(self) -> int:
        """x from the first value that this part makes."""
        return self._x.address + 4 * self.of("out").first

    def projections(self, p: Pass) -> None:
        """q, k and v."""
        layer, x = self._layer, self._x.address
        matrices = (layer.matrices[role].address for role in "qkv")
        inputs = x, layer.norms[0](), layer.eps[0], *matrices, p.inputs.number
        self._launch(
            "decode_qkv", (*inputs, self._prediction.address, self._qkv.address), self.came
        )

    def attention(self, p: Pass) -> None:
        """Attention, and its output product."""
        g, h, m = self._g, self._layer.h, self._layer.matrices
        at, most = p.inputs, step_attention.tiles_at_once(h, g.gpu, self._layer.rows)
        most = most if p.many else min(most, step_attention.FEW_TILES)
        attend(g, h, p, self._qkv.address, self._results, most)
        (maxima, outputs), merged = self._results.addresses, self._attention.address
        if p.many:
            g.launch(
                "fusions/decode/decode_merge",
                (h.heads * h.head_dim // 32, self._layer.rows),
                (at.positions, maxima, outputs, g.tiles, merged, *self.of("y").arguments),
                step_attention.defines(h) | self.of("y").sent,
                shared=MERGE_SHARED,
            )
        router = m["router"].address if "router" in m else 0
        experts = (m[role].address for role in ("gate", "up", "down"))
        self._launch(
            "decode_attn_out",
            (merged, at.positions, at.number, maxima, 0 if p.many else outputs, g.tiles)
            + (m["out"].address, router, self._layer.norms[1](), *experts)
            + (m["gate"].matrix_bytes, m["down"].matrix_bytes, int(_ahead(self._layer, g)))
            + (self._prediction.address, self._x.address, self._own()),
            self.of("y"),
            self.of("out"),
            way="" if p.many else " alone",
        )

    def router(self, _: Pass) -> None:
        """The router's logits."""
        layer, logits = self._layer, self._logits
        assert logits is not None
        router = layer.matrices["router"].address
        self._launch(
            "decode_router",
            (self._x.address, layer.norms[1](), layer.eps[1], router, logits.address)
            + (self._acts.address,),
            self.of("out"),
            blocks=max(layer.experts, self._g.gpu.multiprocessors),
        )

    def gate_up(self, p: Pass) -> None:
        """The choice of experts, gate and up."""
        layer, logits, m = self._layer, self._logits, self._layer.matrices
        normed = self._acts.address, logits.address if logits else 0, int(layer.normalise)
        self._launch(
            layer.kernels[0],
            (*normed, self._x.address, layer.norms[1](), layer.eps[1], m["gate"].address)
            + (m["up"].address, p.inputs.number, self._prediction.address, self.chosen.address)
            + (self._swiglu.address,),
            NOT_EXCHANGED if layer.experts else self.of("out"),
            self.of("swiglu"),
        )

    def down(self, p: Pass) -> None:
        """Down, and the sum of experts."""
        down, number = self._layer.matrices["down"].address, p.inputs.number
        self._launch(
            self._layer.kernels[1],
            (self._swiglu.address, number, self.chosen.address, down, self._own()),
            self.of("swiglu"),
            self.of("ffn"),
        )


def _ahead(layer: Layer, g: Lowering) -> bool:
    """Whether predicted experts are fetched ahead: of one row, if they fill at most half of the
    device's shared cache. Of several rows it costs more than it gives (docs/performance.md)."""
    m, each = layer.matrices, ("gate", "up", "down")
    taken = layer.used * sum(m[role].matrix_bytes for role in each)
    return layer.rows == 1 and 2 * taken <= g.gpu.cache_bytes
