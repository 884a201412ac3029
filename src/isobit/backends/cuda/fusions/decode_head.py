"""The last norm and the logits of one token, and the most likely, which the next step is given."""

from collections.abc import Mapping, Sequence
from functools import partial

from isobit.backends.cuda.device.layout import ACT_BYTES
from isobit.backends.cuda.device.load import DeviceWeight
from isobit.backends.cuda.device.memory import supers
from isobit.backends.cuda.device.protocol import Gpu
from isobit.backends.cuda.fusions.decode_memory import Part, Streaming, streaming, tiles_of_block
from isobit.backends.cuda.lowering import Claimed, Lowering
from isobit.backends.cuda.workspace import Pass
from isobit.model.graph import Op, Value
from isobit.numerics.ops import RmsNorm

_PATTERN = "h = rms_norm x", "wanted = select_rows h rows", "z = matmul wanted"
_BLOCKS = 1024  # of the kernel, at most


def claim(g: Lowering, ops: Sequence[Op]) -> Claimed | None:
    """See :mod:`isobit.backends.cuda.fusions`."""
    v = g.match(ops, _PATTERN, ("h", "wanted"))
    if v is None or len(ops[2].weights) != 1 or len(v["x"].shape.row) != 1:
        return None
    if g.readers.get(v["z"]):  # some of the logits, of one part of a split model
        return None
    matrix = g.matrix(ops[2].weights[0])
    if not matrix.layout.fused or g.gpu.multiprocessors > _BLOCKS:
        return None
    plan = _plan(matrix, g.gpu)
    launch_shape = plan.shared <= g.gpu.shared_most
    return (len(_PATTERN), partial(_lower, g, ops[0], v, matrix, plan)) if launch_shape else None


def _plan(matrix: DeviceWeight, gpu: Gpu) -> Streaming:
    n = supers(matrix.columns)
    tiles = tiles_of_block(gpu.multiprocessors, matrix.rows, n)
    return streaming(gpu, n * ACT_BYTES + 1024 + 256, Part(matrix, tiles))


def _lower(
    g: Lowering, op: Op, v: Mapping[str, Value], matrix: DeviceWeight, plan: Streaming
) -> None:
    assert isinstance(op.operation, RmsNorm)
    x, norm, eps = g.dense(v["x"]), g.vector(op.weights[0]), op.operation.eps
    logits, best = g.new(v["z"]), g.fixed("best", 2 * _BLOCKS)
    # decode.cuh asks for all shapes; this kernel needs one.
    shapes = {"HIDDEN": matrix.columns, "FFN": 256, "EXPERTS": 0, "USED": 1}
    shapes |= {"HEADS": 1, "KV_HEADS": 1, "HEAD_DIM": 256}

    def make(p: Pass) -> None:
        g.launch(
            "fusions/decode/decode_head",
            (g.gpu.multiprocessors,),
            (x.address, norm(), eps, matrix.address, matrix.rows, logits.address, best.address)
            + (p.inputs.tokens, p.inputs.generated),
            shapes | plan.defines,
            shared=plan.shared,
        )

    g.advances = True
    g.emit(make, v["z"])
