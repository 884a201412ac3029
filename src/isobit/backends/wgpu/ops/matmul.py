"""Matrix products, of which there are as many launches as the weights have buffers."""

from collections.abc import Iterable

from isobit.backends.wgpu.device.gpu import MAX_GROUPS, Step
from isobit.backends.wgpu.device.layout import superblock_bytes, superblocks
from isobit.backends.wgpu.device.load import GRIDS, Matrix
from isobit.backends.wgpu.lowering import Lowering, Pass, Slot
from isobit.backends.wgpu.ops.top_k import CHUNK, SortedPairs
from isobit.model.graph import Op, Value

_LANES = 256  # of a workgroup of matmul.wgsl
_LANES_A_ROW = 8
_BLOCKS = ("bytes", "blocks", "formats")
_FEW = ("bytes", "blocks", "few_bits")
_READERS = {
    **{"Q4_K": ("q4_k",), "Q6_K": ("q6_k",)},
    **dict.fromkeys(("IQ4_NL", "IQ4_XS", "MXFP4"), ("bytes", "iq4")),
    **dict.fromkeys(("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q5_K"), _BLOCKS),
    **dict.fromkeys(("TQ1_0", "TQ2_0", "Q1_0", "Q2_0", "NVFP4", *GRIDS), _FEW),
}
"""The files that read a format's superblocks."""


def supports(op: Op) -> str | None:
    """See :mod:`isobit.backends.wgpu.ops`."""
    for w in op.weights:
        if w.format.quantized and w.format.name not in _READERS:
            return f"{w.name}: expected a format with shaders, got {w.format.name}"
    return None


def lower(g: Lowering, op: Op) -> None:
    """The products side by side."""
    multiply(g, g.matrix(op.weights), op.inputs[0], g.new(op.outputs[0]))


def multiply(g: Lowering, w: Matrix, x: Value, y: Slot, ids: Value | None = None) -> None:
    """Emit ``y = W x``, rows of w.rows; float weights read x, others its quantised form.

    With ``ids``, every row of x, or every row that it has for an id, times its matrix.
    """
    acts = g.acts(x, w.columns) if w.quantised else g.nothing
    floats = g.packed(x) if w.floats else None
    routing, each, top_k = g.nothing, 1, 1
    if ids is not None:
        routing, each = g.dense(ids), ids.shape.width
        top_k = each * w.columns // x.shape.width

    def steps(p: Pass) -> Iterable[Step]:
        pairs = p.rows(x.shape)
        which, groups = (0, pairs, 0, 1), -(-pairs // CHUNK)
        if ids is not None:
            at = SortedPairs.of(ids, p)
            which, groups = (1, at.pairs, at.groups_at, top_k), at.groups
        for s, part in ((one, part) for one in w.segments for part in one.parts):
            begin, end = (part.first, part.last) if s.matrices == 1 else (0, s.row_blocks)
            held = part.first, part.last, begin
            if floats is not None and not s.format.quantized:
                yield g.step(
                    "ops/matmul_floats",
                    (part.buffer, floats.slot, routing, y),
                    (w.columns, s.rows, *held, w.rows, s.column, floats.first, *which),
                    (min(end - begin, MAX_GROUPS), groups),
                    ("reduce", "sorted_pairs"),
                    FORMAT=s.format.ggml_type,
                )
                continue
            supers, size = superblocks(w.columns), superblock_bytes(s.format)
            lanes = min(_LANES_A_ROW, 1 << (supers - 1).bit_length())
            reader = _READERS[s.format.name]
            own = {"FORMAT": s.format.ggml_type} if "bytes" in reader else {}
            if "blocks" in reader:
                own["BYTES"] = size
            buffers = [part.buffer, acts, routing, y]
            if reader is _FEW:
                buffers.append(s.grid or g.nothing)
            yield g.step(
                "ops/matmul",
                buffers,
                (supers, s.rows, s.row_blocks, *held, w.rows, s.column, *which),
                (-(-(end - begin) // (_LANES // 8 // lanes)), groups),
                (g.device.dot, *reader, "sorted_pairs"),
                **own
                | {"LANES": _LANES, "SUPERS": lanes, "PLANES": g.planes, "TILE_VEC4": size // 2},
            )

    g.emit(steps, each)
