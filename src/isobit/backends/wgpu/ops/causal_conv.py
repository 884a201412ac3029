"""Causal convolution of the tokens of each sequence, whose last rows are kept."""

from collections.abc import Iterable

from isobit.backends.wgpu.device.gpu import Step
from isobit.backends.wgpu.device.layout import superblocks
from isobit.backends.wgpu.lowering import Lowering, Pass, anything
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A channel of a run of tokens an invocation."""
    (x,), (y,) = op.inputs, op.outputs
    channels, taps = op.weights[0].shape
    at, taps_at = g.rows(x, channels), g.vector(op.weights[0])
    buffers = at.slot, g.vectors, g.batch, g.state(op), g.new(y)

    def steps(p: Pass) -> Iterable[Step]:
        parameters = channels, taps, at.first, at.stride, taps_at, g.at(p).runs
        yield g.step("ops/causal_conv", buffers, parameters, (superblocks(channels), p.runs))

    g.emit(steps)
