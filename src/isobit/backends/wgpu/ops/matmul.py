"""Matrix products, of which there are as many launches as the weights have buffers."""

from collections.abc import Iterable

from isobit.backends.wgpu.device import MAX_GROUPS, Step
from isobit.backends.wgpu.layout import superblock_bytes, superblocks
from isobit.backends.wgpu.load import Matrix, Part, Segment
from isobit.backends.wgpu.lowering import Lowering, Pass, Slot, anything
from isobit.backends.wgpu.ops.top_k import CHUNK, Plan
from isobit.model.graph import Op, Value

_LANES = 256  # of a workgroup of matmul.wgsl
_LANES_A_ROW = 8
_FAST = {"Q4_K": "q4_k", "Q6_K": "q6_k"}

supports = anything


def lower(op: Op, g: Lowering) -> None:
    """The products side by side."""
    multiply(g, g.matrix(op.weights), op.inputs[0], g.new(op.outputs[0]))


def multiply(g: Lowering, w: Matrix, x: Value, y: Slot, ids: Value | None = None) -> None:
    """Emit ``y = W x``, rows of w.rows; float weights read x, others its quantised form.

    With ``ids``, every row of x, or every row that it has for an id, times its matrix.
    """
    acts = g.acts(x, w.columns) if w.quantised else g.nothing
    floats = g.packed(x) if w.floats else None
    plan, each, divide = g.nothing, 1, 1
    if ids is not None:
        plan, each = g.dense(ids), ids.shape.width
        divide = each * w.columns // x.shape.width

    def steps(p: Pass) -> Iterable[Step]:
        items = p.rows(x.shape)
        tail, groups = (0, items, 0, 1), -(-items // CHUNK)
        if ids is not None:
            at = Plan.of(ids, p)
            tail, groups = (1, at.pairs, at.entries, divide), at.groups
        for segment in w.segments:
            for part in segment.parts:
                if segment.format.quantized:
                    yield _quantised(g, w, segment, part, (acts, plan, y), tail, groups)
                elif floats is not None:
                    data, tail_ = (floats.slot, plan, y), (floats.first, *tail)
                    yield _floats(g, w, segment, part, data, tail_, groups)

    g.emit(steps, each)


def _quantised(
    g: Lowering,
    w: Matrix,
    segment: Segment,
    part: Part,
    data: tuple[Slot, ...],
    tail: tuple[int, ...],
    groups: int,
) -> Step:
    supers = superblocks(w.columns)
    lanes = 1
    while lanes < min(supers, _LANES_A_ROW):
        lanes *= 2
    name, size = segment.format.name, superblock_bytes(segment.format)
    constants = {"LANES": _LANES, "SUPERS": lanes, "PLANES": g.planes, "TILE": size // 2}
    if name not in _FAST:
        constants |= {"FORMAT": segment.format.ggml_type, "BYTES": size}
    start, end = (part.first, part.last) if segment.matrices == 1 else (0, segment.units)
    return g.step(
        "ops/matmul",
        (part.buffer, *data),
        (
            *(supers, segment.rows, segment.units, part.first, part.last, start, w.rows),
            *(segment.column, *tail),
        ),
        (-(-(end - start) // (_LANES // 8 // lanes)), groups),
        (g.device.dot, _FAST.get(name, "formats"), "items"),
        "",
        **constants,
    )


def _floats(
    g: Lowering,
    w: Matrix,
    segment: Segment,
    part: Part,
    data: tuple[Slot, ...],
    tail: tuple[int, ...],
    groups: int,
) -> Step:
    start, end = (part.first, part.last) if segment.matrices == 1 else (0, segment.units)
    return g.step(
        "ops/matmul_floats",
        (part.buffer, *data),
        (
            *(w.columns, segment.rows, part.first, part.last, start, w.rows, segment.column),
            *tail,
        ),
        (min(end - start, MAX_GROUPS), groups),
        ("reduce", "items"),
        FORMAT=segment.format.ggml_type,
    )
