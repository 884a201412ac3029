"""The operations of a pass as launches: shapes in, kernels out. Buffers are device addresses."""

from collections.abc import Sequence
from dataclasses import dataclass

from isobit.backends.cuda import memory
from isobit.backends.cuda.gpu import Gpu
from isobit.backends.cuda.layout import ACT_BYTES
from isobit.backends.cuda.load import DeviceWeight
from isobit.config import ModelConfig
from isobit.numerics import TILE

_THREADS = 256
_WARPS = _THREADS // 32
_ITEMS = 8  # that share one read of a weight: CHUNK of matmul.cu
NORM_SHARED = 47 << 10  # bytes of a row that norm_quantise may keep beside its own 1 KiB
_MMA_FROM = 8  # items a matrix, on average, from which tensor cores pay
_TILED_ROWS, _TILED_SHARED = 32, 8 * 8 * ACT_BYTES + 8 * 8 * 32 * 4  # Shared of matmul.cu
_MMA_TOKENS, _MMA_ROWS = 32, 128  # TOKENS and ROWS of matmul_mma.cu
_HEAD_PASS = _THREADS // 2  # PASS of attention.cu


MMA_ROWS = 16
"""Tokens of one query head in one tensor-core product of attention_mma.cu."""


def span_length(c: ModelConfig) -> int:
    """Tokens a block of attention_mma.cu takes; 0 if it does not know this head_dim."""
    if c.head_dim not in (64, 96, 128):
        return 0
    return MMA_ROWS * (_WARPS // min(c.n_heads // c.n_kv_heads, _WARPS))


@dataclass(frozen=True)
class Segments:
    """Which items each expert multiplies: ``order`` and ``offset`` of moe.cu's sort_pairs."""

    order: int
    offset: int
    divide: int
    """Item i reads activation row i // divide."""


def _pays_on_tensor_cores(w: DeviceWeight, items: int, segments: Segments | None) -> bool:
    return w.layout.fused and items > _MMA_FROM * (w.matrices if segments else 1)


class Ops:
    """Launches with the engine's number of activation planes; ``overlap`` as in Gpu.launch."""

    def __init__(self, gpu: Gpu, planes: int, *, overlap: bool = False) -> None:
        self._gpu, self._overlap = gpu, overlap
        self._planes = {"PLANES": str(planes)}

    def embed(self, table: DeviceWeight, tokens: int, count: int, y: int) -> None:
        """Rows ``tokens`` of the table: float32 [count, columns]."""
        self._gpu.launch(
            "embedding",
            "embed",
            (count, memory.supers(table.columns)),
            (table.address, tokens, table.columns, y),
            defines=table.layout.embedding_defines,
            overlap=self._overlap,
        )

    def matmul(
        self,
        w: DeviceWeight,
        x: int,
        acts: int,
        y: int,
        items: int,
        *,
        segments: Segments | None = None,
        row_stride: int | None = None,
    ) -> None:
        """``y = W x`` for each item; float weights read ``x``, quantised ones ``acts``.

        y: float32 [items, row_stride], of which w.rows values a row are written.
        """
        stride = w.rows if row_stride is None else row_stride
        if _pays_on_tensor_cores(w, items, segments):
            self._matmul_mma(w, acts, y, items, segments, stride)
            return
        chunks = -(-items // _ITEMS)
        if segments is None:
            order, offset, divide = 0, 0, 1
        else:
            order, offset, divide = segments.order, segments.offset, segments.divide
            chunks = min(chunks, -(-2 * items // (_ITEMS * w.matrices)))
        floats = w.layout.kind == "floats"
        supers = memory.supers(w.columns)
        head = (w.address, w.matrix_bytes, x if floats else acts, w.columns if floats else supers)
        middle = (order, offset, divide, items, y)
        shared = 0
        tail: tuple[int, ...]
        if floats:
            per_block = 8 if items > 8 * _ITEMS else 1
            blocks, tail = -(-w.rows // per_block), (w.rows, stride)
        elif w.layout.kind == "tiled":
            blocks, tail, shared = -(-w.rows // _TILED_ROWS), (w.rows, stride), _TILED_SHARED
        else:
            per_row = w.columns // w.layout.format.block_size
            blocks, tail = -(-w.rows // _WARPS), (w.rows, stride, per_row)
        stem, kernel, defines = w.layout.matmul
        if floats:
            defines = defines | {"ROWS": str(per_block)}
        self._gpu.launch(
            stem,
            kernel,
            (blocks, w.matrices if segments else 1, chunks),
            (*head, *middle, *tail),
            shared=shared,
            defines=defines | self._planes,
            overlap=self._overlap,
        )

    def gate_up(
        self,
        gate: DeviceWeight,
        up: DeviceWeight,
        x: int,
        acts: int,
        y: tuple[int, int],
        items: int,
        segments: Segments | None,
    ) -> None:
        """Both products of the same items, in one launch if the two lie side by side."""
        if gate.followed_by(up) and _pays_on_tensor_cores(gate, items, segments):
            step = (y[1] - y[0]) // 4
            self._matmul_mma(gate, acts, y[0], items, segments, gate.rows, rounds=2, y_step=step)
            return
        for w, to in zip((gate, up), y, strict=True):
            self.matmul(w, x, acts, to, items, segments=segments)

    def _matmul_mma(
        self,
        w: DeviceWeight,
        acts: int,
        y: int,
        items: int,
        segments: Segments | None,
        stride: int,
        *,
        rounds: int = 1,
        y_step: int = 0,
    ) -> None:
        at = segments or Segments(0, 0, 1)
        matrices = w.matrices if segments else 1
        stage = _MMA_TOKENS * ACT_BYTES + _MMA_ROWS * w.layout.format.block_bytes
        self._gpu.launch(
            "matmul_mma",
            "matmul_mma",
            (-(-w.rows // _MMA_ROWS), matrices * rounds, -(-items // (matrices * _MMA_TOKENS))),
            (w.address, w.matrix_bytes, acts, memory.supers(w.columns))
            + (at.order, at.offset, at.divide, items, y, w.rows, stride, matrices, y_step),
            shared=2 * stage,
            defines={f"MMA_{w.layout.format.name}": "1"} | self._planes,
            overlap=self._overlap,
        )

    def norm_quantise(
        self,
        x: int,
        residual: int,
        weight: int,
        eps: float,
        n: int,
        rows: int,
        y: int,
        acts: int,
        *,
        experts: tuple[int, int] = (0, 1),
    ) -> None:
        """Rows of n float32: x += residual (unless 0), y = norm of x, acts = y quantised.

        experts: weights and their number a row, if the residual is a weighted sum of that many.
        """
        if 4 * n <= NORM_SHARED:
            arguments = (x, residual, *experts, weight, eps, n, y, acts)
            self._pointwise("norm_quantise", (rows,), arguments, shared=4 * n)
            return
        if experts[0]:
            self.combine(experts[0], residual, experts[1], n, rows, 0, x)
        elif residual:
            self.add(x, residual, rows * n, x)
        self.rms_norm(x, weight, eps, n, rows, y)
        self.quantise(y, n, rows, acts)

    def swiglu_quantise(self, gate: int, up: int, n: int, rows: int, acts: int) -> None:
        """SwiGLU of rows of n float32, quantised."""
        blocks = -(-rows * memory.supers(n) // _WARPS)
        self._pointwise("swiglu_quantise", (blocks,), (gate, up, n, rows, acts))

    def rms_norm(self, x: int, weight: int, eps: float, n: int, rows: int, y: int) -> None:
        """Rows of n float32."""
        self._pointwise("rms_norm", (rows,), (x, weight, eps, n, y))

    def quantise(self, x: int, n: int, rows: int, acts: int) -> None:
        """Rows of n float32 to superblocks of activations."""
        blocks = -(-rows * memory.supers(n) // _WARPS)
        self._pointwise("quantise_rows", (blocks,), (x, n, rows, acts))

    def swiglu(self, gate: int, up: int, n: int, y: int) -> None:
        """``n`` float32 values."""
        self._pointwise("swiglu", (min(-(-n // _THREADS), 4096),), (gate, up, n, y))

    def add(self, x: int, y: int, n: int, out: int) -> None:
        """``n`` float32 values."""
        self._pointwise("add_rows", (min(-(-n // _THREADS), 4096),), (x, y, n, out))

    def gather(self, x: int, rows: int, count: int, n: int, y: int) -> None:
        """Rows ``rows`` (int32 [count]) of x, n float32 each."""
        self._pointwise("gather_rows", (count,), (x, rows, n, y))

    def router_top_k(
        self,
        logits: int,
        experts: int,
        k: int,
        normalise: bool,
        tokens: int,
        ids: int,
        weights: int,
    ) -> None:
        """The k experts of each token and their weights."""
        self._gpu.launch(
            "moe",
            "router_top_k",
            (tokens,),
            (logits, experts, k, int(normalise), ids, weights),
            shared=4 * experts,
            defines=self._planes,
            overlap=self._overlap,
        )

    def sort_pairs(
        self,
        ids: int,
        pairs: int,
        experts: int,
        order: int,
        offset: int,
        groups: tuple[int, int] = (0, 0),
    ) -> None:
        """Pairs (token, rank) by expert; for batch_matmul.cu also in groups, and their number."""
        parts = max(1, min(8, (40 << 10) // (4 * experts), -(-pairs // 32)))
        self._gpu.launch(
            "moe",
            "sort_pairs",
            (1,),
            (ids, pairs, experts, parts, order, offset, *groups),
            shared=4 * experts * parts,
            defines=self._planes,
            overlap=self._overlap,
        )

    def combine(
        self, weights: int, y: int, k: int, n: int, tokens: int, out: int, x: int = 0
    ) -> None:
        """Add a token's k expert outputs in rank order: to out, and on to x (each unless 0)."""
        self._gpu.launch(
            "moe",
            "combine",
            (tokens,),
            (weights, y, k, n, out, x),
            defines=self._planes,
            overlap=self._overlap,
        )

    def attention(
        self, kernel: str, head_dim: int, grid: Sequence[int], arguments: Sequence[int | float]
    ) -> None:
        """A kernel of attention.cu; ``arguments`` are those after head_dim."""
        room = {"HEAD_ROOM": str(-(-head_dim // _HEAD_PASS) * _HEAD_PASS)}
        defines = room | self._planes
        self._gpu.launch("attention", kernel, grid, (head_dim, *arguments), defines=defines)

    def attention_mma(self, c: ModelConfig, spans: int, arguments: Sequence[int | float]) -> None:
        """The kernel of attention_mma.cu."""
        group = c.n_heads // c.n_kv_heads
        tile_bytes = 2 * TILE * (c.head_dim + 16) + 2 * c.head_dim * (TILE + 16) + 8 * TILE
        stage = 2 if 4 * tile_bytes <= self._gpu.shared_most else 1  # tiles; two stages are held
        self._gpu.launch(
            "attention_mma",
            "attention_mma",
            (spans, c.n_kv_heads, -(-group // _WARPS)),
            arguments,
            shared=2 * stage * tile_bytes,
            defines={"HEAD": str(c.head_dim), "STAGE": str(stage)} | self._planes,
            overlap=self._overlap,
        )

    def _pointwise(
        self,
        kernel: str,
        grid: Sequence[int],
        arguments: Sequence[int | float],
        *,
        shared: int = 0,
    ) -> None:
        self._gpu.launch("pointwise", kernel, grid, arguments, shared=shared, defines=self._planes)
