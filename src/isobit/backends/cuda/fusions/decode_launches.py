"""The kernels of a whole layer (decode_layer.py): their memory, definitions and launches."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from isobit.backends.cuda.device.layout import ACT_BYTES
from isobit.backends.cuda.device.load import DeviceWeight
from isobit.backends.cuda.device.memory import supers
from isobit.backends.cuda.device.protocol import Gpu
from isobit.backends.cuda.fusions import step_attention
from isobit.backends.cuda.fusions.decode_memory import (
    WARPS,
    Part,
    Streaming,
    streaming,
    tiles_of_block,
)
from isobit.backends.cuda.fusions.delta_net import DeltaNet
from isobit.backends.cuda.fusions.head_vectors import HeadVectors
from isobit.backends.cuda.fusions.step_attention import TileResults, attend
from isobit.backends.cuda.lowering import Lowering
from isobit.backends.cuda.workspace import NOT_EXCHANGED, BufferView, Exchange, Pass
from isobit.model.graph import Op, Value

MERGE_SHARED = 4 * (512 * 38 + 16)
"""Bytes of MergeShared of decode_merge.cu."""
GATHERED = "y", "out", "swiglu", "ffn"
"""What the parts of a split model give one another."""
_BUFFER = 1024  # floats of a block's sum, in bytes
_MOST_OF_HALF = 4  # logits whose weights a thread of the router holds, if there are blocks enough


@dataclass(frozen=True, eq=False)
class Layer:
    """What the operations of a layer say."""

    mixer: HeadVectors | DeltaNet
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
    """q, k, v, out, router (with experts), gate, up, down; of a shared expert s_gate, s_up, s_down,
    and s_share, its gate. Of a delta net q is the convolution's, v what is left as it is."""
    rows: int
    gathers: Mapping[str, Op]
    """Of a split model: those of y, out, swiglu and ffn."""

    @property
    def attended(self) -> int:
        """Columns that attention's output product reads."""
        return self._whole("y", self.mixer.heads * self.mixer.head_dim)

    @property
    def shared(self) -> int:
        """Experts that every token goes to, beside those that are chosen."""
        return int("s_gate" in self.matrices)

    @property
    def slots(self) -> int:
        """Experts of a token."""
        return self.used + self.shared

    @property
    def plain(self) -> bool:
        """Whether it is of Qwen3's form."""
        plain = isinstance(self.mixer, HeadVectors) and not self.mixer.gated
        return plain and not self.shared

    @property
    def projected(self) -> tuple[int, int, int]:
        """Rows of q, k and v."""
        h = self.mixer
        if isinstance(h, DeltaNet):
            return h.channels, 0, h.rest
        kv = h.kv_heads * h.head_dim
        return (1 + h.gated) * h.heads * h.head_dim, kv, kv

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
        found: dict[str, str | int] = {"HEADS": self.mixer.heads, "KV_HEADS": self.mixer.kv_heads}
        found |= {"HEAD_DIM": self.mixer.head_dim} | shapes | {"USED": self.used} | rows | made
        return found | ({"SHARED": 1} if self.shared else {})

    @property
    def projecting(self) -> dict[str, str | int]:
        """The definitions that decode_qkv.cu asks for besides."""
        if self.plain:
            return {}
        q, k, v = self.projected
        found: dict[str, str | int] = {"Q_ROWS": q, "K_ROWS": k, "V_ROWS": v}
        return found | ({"TAPS": self.mixer.taps} if isinstance(self.mixer, DeltaNet) else {})

    @property
    def kind(self) -> dict[str, str | int]:
        """The definition of the router's format."""
        router = self.matrices.get("router")
        return {"ROUTER_KIND": f"KIND_{router.layout.format.name if router else 'F32'}"}

    @property
    def gating(self) -> dict[str, str | int]:
        """The definitions that decode_attn_out.cu asks for besides."""
        if isinstance(self.mixer, DeltaNet):
            return {"NORMED": 1}
        return {"GATED": 1} if self.mixer.gated else {}

    @property
    def logits(self) -> int:
        """Of the router, and of a shared expert's gate."""
        return self.experts + self.shared

    def routing(self, gpu: Gpu) -> tuple[int, int]:
        """Blocks of the router, which have one row each, and logits that half a block makes."""
        blocks = max(gpu.multiprocessors, self.rows * -(-self.logits // (2 * _MOST_OF_HALF)))
        return blocks, -(-self.logits // (2 * (blocks // self.rows)))


def planned(layer: Layer, g: Lowering) -> Mapping[str, Streaming] | None:
    """How each kernel is compiled and launched; None if one needs more than there is."""
    gpu, m, k, rows = g.gpu, layer.matrices, layer.slots, layer.rows
    hidden, ffn, attended = supers(layer.hidden), supers(layer.activated), supers(layer.attended)
    q_rows, k_rows, v_rows = layer.projected
    buffer = rows * _BUFFER
    whole = 4 * rows * layer.hidden if layer.gathers else 0  # WholeRows of decode.cuh
    kind = layer.kind

    # Of several rows with experts, a block behind attention has one (Share of decode.cuh).
    each = 1 if layer.experts else rows

    def part(role: str, outputs: int, n: int, of_block: int = each, prefix: str = "") -> Part:
        tiles = tiles_of_block(gpu.multiprocessors * of_block // rows, outputs, n)
        return Part(m[role], tiles, prefix, of_block * tiles)

    plan = partial(streaming, gpu)
    qkv = plan(
        rows * hidden * ACT_BYTES + buffer + whole,
        part("q", q_rows + k_rows, hidden, rows, "QK_"),
        part("v", v_rows, hidden, rows, "V_"),
    ).also(layer.projecting)
    out = plan(each * attended * ACT_BYTES + rows * 4 * WARPS, part("out", layer.made, attended))
    choosing = buffer + whole
    if layer.experts:
        choosing = 4 * (layer.experts + 2 * 32) + 2 * layer.experts
    gate_up = plan(
        each * hidden * ACT_BYTES + choosing + 17 * k + 8,
        part("gate", k * layer.ffn, 2 * hidden),
    )
    down = plan(each * k * ffn * ACT_BYTES + 8 * k, part("down", layer.made, k * ffn))
    # So little that decode_gate_up's block has room beside the router's (a block takes 1 KB more,
    # and whole 128 bytes), and so much that not two of the router's have room beside
    # decode_attn_out's: decode_gate_up's would have to wait for both.
    beside = (gpu.shared_most - 1024 - gate_up.shared) // 128 * 128 - 128
    _, of_half = layer.routing(gpu)
    least = (1 + 2 * of_half) * _BUFFER + whole // rows
    routing = Streaming(max(least, min(beside, gpu.shared_most * 2 // 5)), kind)
    routing = routing.also({"OF_HALF": of_half})
    if layer.shared:
        routing = routing.also({"SHARED_KIND": f"KIND_{m['s_share'].layout.format.name}"})
    # With few tiles, when some multiprocessors have their registers taken by attention: more
    # than half of the memory, where there is room, so that no multiprocessor takes two blocks.
    # The second is late, and keeps the router's and decode_gate_up's away: all wait for it.
    alone = max(gpu.shared_most // 2 + 1, gpu.shared_most - 2 * routing.shared + 1024)
    shared_left = gpu.shared_most - 3072 - max(qkv.shared, routing.shared)
    out = out.also(kind).also(layer.gating)
    found = {
        "decode_qkv": qkv,
        "decode_attn_out": out,
        "decode_attn_out alone": out.with_at_least(alone if alone <= shared_left else 0),
        "decode_router": routing,
        "decode_gate_up": gate_up.also(kind),
        "decode_down": down.also({"FFN": layer.activated}),
    }
    return found if all(p.shared <= gpu.shared_most for p in found.values()) else None


class Launches:
    """The launches of a layer, once its values have places."""

    def __init__(
        self, g: Lowering, layer: Layer, plan: Mapping[str, Streaming], v: Mapping[str, Value]
    ) -> None:
        h, n, rows = layer.mixer, layer.used, layer.rows
        self._g, self._layer, self._plan = g, layer, plan
        self.came = g.take_landing(v["x"])
        """How other parts' columns of the layer's input come."""
        self._x = x = g.dense(v["x"])  # every kernel works on it in place
        for name in ("x1", "x2"):
            g.put(v[name], x)
        self._qkv = g.new(v["qkv"])
        self._results = TileResults(g, h) if isinstance(h, HeadVectors) else None
        self._attention = g.slot("attention", h.heads * h.head_dim)
        if isinstance(h, DeltaNet):
            g.put(v["y"], BufferView(self._attention, h.heads * h.head_dim, h.head_dim))
        self._logits = g.slot("logits", layer.logits)
        if layer.experts:
            g.put(v["z"], BufferView(self._logits, layer.logits, layer.experts))
        self._acts = g.slot("acts", ACT_BYTES // 4 * supers(layer.hidden))
        # Words with the number of a step, which is not 0.
        self.chosen = g.fixed("chosen", 2 * n * rows, zero=True, lasting=True)
        self._prediction = g.fixed("prediction", 2 * (1 + layer.experts * rows), zero=True)
        self._swiglu = g.slot("swiglu", layer.slots * layer.ffn)
        g.put(v["swiglu"], BufferView(self._swiglu, layer.slots * layer.ffn, layer.ffn))
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
        """q, k and v, or what a delta net begins with."""
        layer, at, h = self._layer, p.inputs, self._layer.mixer
        inputs = self._x.address, layer.norms[0](), layer.eps[0], *map(self._matrix, "qkv")
        convolved: tuple[int, ...] = (0, 0, 0, 0)
        if isinstance(h, DeltaNet):
            convolved = h.weights[0](), at.chunks, at.positions, h.states[0].address
        outputs = at.number, self._prediction.address, self._qkv.address
        self._launch("decode_qkv", (*inputs, *outputs, *convolved), self.came)

    def _matrix(self, role: str) -> int:
        """The address of a matrix, if there is one."""
        found = self._layer.matrices.get(role)
        return found.address if found else 0

    def mixed(self, p: Pass) -> None:
        """Attention or the delta rule, and the output product."""
        layer, at, h, merged = self._layer, p.inputs, self._layer.mixer, self._attention.address
        tiles, gate = (0, 0), (0, 0, 0.0)
        if isinstance(h, DeltaNet):
            self._delta(h, p)
            gate = self._qkv.address + 4 * h.channels, h.weights[3](), h.eps[1]
        else:
            assert self._results is not None
            self._attend(h, self._results, p)
            maxima, outputs = self._results.addresses
            tiles = maxima, 0 if p.many else outputs
            if h.gated:
                gate = self._qkv.address + 4 * h.head_dim, 0, 0.0
        m = layer.matrices
        self._launch(
            "decode_attn_out",
            (merged, at.positions, at.number, *tiles, self._g.tiles, m["out"].address)
            + (self._matrix("router"), layer.norms[1](), *map(self._matrix, ("gate", "up", "down")))
            + (m["gate"].matrix_bytes, m["down"].matrix_bytes, int(_ahead(layer, self._g)))
            + (self._prediction.address, self._x.address, self._own(), *gate),
            self.of("y"),
            self.of("out"),
            way="" if p.many else " alone",
        )

    def _attend(self, h: HeadVectors, results: TileResults, p: Pass) -> None:
        g, at, rows = self._g, p.inputs, self._layer.rows
        most = step_attention.tiles_at_once(h, g.gpu, rows)
        most = most if p.many else min(most, step_attention.FEW_TILES)
        each_has_one = not p.many and most >= min(g.tiles, step_attention.FEW_TILES)
        buffers = 1 if each_has_one else step_attention.tile_buffers(h, g.gpu)
        attend(g, h, p, self._qkv.address, results, most, buffers)
        if p.many:
            g.launch(
                "fusions/decode/decode_merge",
                (h.heads * h.head_dim // 32, rows),
                (at.positions, *results.addresses, g.tiles, self._attention.address)
                + self.of("y").arguments,
                step_attention.defines(h) | self.of("y").sent,
                shared=MERGE_SHARED,
            )

    def _delta(self, h: DeltaNet, p: Pass) -> None:
        _, dt, a, _ = h.weights
        at, layer = p.inputs, self._layer
        self._g.launch(
            "fusions/decode/decode_delta",
            (h.blocks,),
            (self._qkv.address, dt(), a(), h.eps[0], *h.scales, at.chunks, at.positions)
            + (h.states[1].address, self._attention.address, self._matrix("router"))
            + (layer.norms[1](), at.number, self._prediction.address, self._x.address),
            layer.defines | layer.kind | {"TOGETHER": h.together},
        )

    def router(self, _: Pass) -> None:
        """The router's logits."""
        layer = self._layer
        self._launch(
            "decode_router",
            (self._x.address, layer.norms[1](), layer.eps[1], self._matrix("router"))
            + (self._matrix("s_share"), self._logits.address, self._acts.address),
            self.of("out"),
            blocks=layer.routing(self._g.gpu)[0],
        )

    def gate_up(self, p: Pass) -> None:
        """The choice of experts, gate and up."""
        layer = self._layer
        normed = self._acts.address, self._logits.address, int(layer.normalise)
        shared = map(self._matrix, ("s_gate", "s_up"))
        self._launch(
            "decode_gate_up",
            (*normed, self._x.address, layer.norms[1](), layer.eps[1], self._matrix("gate"))
            + (self._matrix("up"), *shared, p.inputs.number, _asked_early(layer, p))
            + (self._prediction.address,)
            + (self.chosen.address, self._swiglu.address),
            NOT_EXCHANGED if layer.experts else self.of("out"),
            self.of("swiglu"),
        )

    def down(self, p: Pass) -> None:
        """Down, and the sum of experts."""
        layer, number = self._layer, p.inputs.number
        share = self._logits.address + 4 * layer.experts
        shared = self._matrix("s_down"), share
        self._launch(
            "decode_down",
            (self._swiglu.address, number, self.chosen.address, self._matrix("down"), *shared)
            + (self._own(),),
            self.of("swiglu"),
            self.of("ffn"),
        )


def _asked_early(layer: Layer, p: Pass) -> int:
    """Steps of gate and up that are asked for before the router has ended: none where attention of
    few tiles is so soon done that they would be in the way (docs/performance.md)."""
    return int(p.many or layer.rows > 1)


def _ahead(layer: Layer, g: Lowering) -> bool:
    """Whether predicted experts are fetched ahead: of one row, if they fill at most half of the
    device's shared cache. Of several rows it costs more than it gives (docs/performance.md)."""
    m, each = layer.matrices, ("gate", "up", "down")
    taken = layer.used * sum(m[role].matrix_bytes for role in each)
    return layer.rows == 1 and 2 * taken <= g.gpu.cache_bytes
