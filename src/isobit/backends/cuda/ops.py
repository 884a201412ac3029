"""The operations of a pass as launches: shapes in, kernels out. Buffers are device addresses."""

from collections.abc import Sequence
from dataclasses import dataclass

from isobit.backends.cuda import memory
from isobit.backends.cuda.gpu import Gpu
from isobit.backends.cuda.layout import ACT_BYTES
from isobit.backends.cuda.load import DeviceWeight

_THREADS = 256
_WARPS = _THREADS // 32
_ITEMS = 8  # that share one read of a weight: CHUNK of matmul.cu
_TILED_ROWS, _TILED_SHARED = 32, 8 * 8 * ACT_BYTES + 8 * 8 * 32 * 4  # Shared of matmul.cu


@dataclass(frozen=True)
class Segments:
    """Which items each expert multiplies: ``order`` and ``offset`` of moe.cu's sort_pairs."""

    order: int
    offset: int
    divide: int
    """Item i reads activation row i // divide."""


class Ops:
    """Launches with the engine's number of activation planes."""

    def __init__(self, gpu: Gpu, planes: int) -> None:
        self._gpu = gpu
        self._planes = {"PLANES": str(planes)}

    def embed(self, table: DeviceWeight, tokens: int, count: int, y: int) -> None:
        """Rows ``tokens`` of the table: float32 [count, columns]."""
        self._gpu.launch(
            "embedding",
            "embed",
            (count, memory.supers(table.columns)),
            (table.address, tokens, table.columns, y),
            defines=table.layout.embedding_defines,
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
        stride = w.rows if row_stride is None else row_stride
        shared = 0
        tail: tuple[int, ...]
        if floats:
            blocks, tail = w.rows, (stride,)
        elif w.layout.kind == "tiled":
            blocks, tail, shared = -(-w.rows // _TILED_ROWS), (w.rows, stride), _TILED_SHARED
        else:
            per_row = w.columns // w.layout.format.block_size
            blocks, tail = -(-w.rows // _WARPS), (w.rows, stride, per_row)
        stem, kernel, defines = w.layout.matmul
        self._gpu.launch(
            stem,
            kernel,
            (blocks, w.matrices if segments else 1, chunks),
            (*head, *middle, *tail),
            shared=shared,
            defines=defines | self._planes,
        )

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
        self, logits: int, experts: int, k: int, normalise: bool, tokens: int, ids: int, weights: int
    ) -> None:
        """The k experts of each token and their weights."""
        self._gpu.launch(
            "moe",
            "router_top_k",
            (tokens,),
            (logits, experts, k, int(normalise), ids, weights),
            shared=4 * experts,
            defines=self._planes,
        )

    def sort_pairs(self, ids: int, pairs: int, experts: int, order: int, offset: int) -> None:
        """Pairs (token, rank) by expert."""
        self._gpu.launch(
            "moe",
            "sort_pairs",
            (1,),
            (ids, pairs, experts, order, offset),
            shared=4 * experts,
            defines=self._planes,
        )

    def combine(self, weights: int, y: int, k: int, n: int, tokens: int, out: int) -> None:
        """Add a token's k expert outputs in rank order."""
        self._gpu.launch(
            "moe", "combine", (tokens,), (weights, y, k, n, out), defines=self._planes
        )

    def attention(self, kernel: str, grid: Sequence[int], arguments: Sequence[int | float]) -> None:
        """A kernel of attention.cu."""
        self._gpu.launch("attention", kernel, grid, arguments, defines=self._planes)

    def _pointwise(
        self, kernel: str, grid: Sequence[int], arguments: Sequence[int | float]
    ) -> None:
        self._gpu.launch("pointwise", kernel, grid, arguments, defines=self._planes)
