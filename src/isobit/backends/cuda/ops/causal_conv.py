"""Causal convolution, each channel by itself."""

from isobit.backends.cuda.lowering import THREADS, Lowering, anything
from isobit.backends.cuda.workspace import Pass
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A channel of a sequence a thread."""
    (x,), (y,) = op.inputs, op.outputs
    channels, taps = op.weights[0].shape
    view, weight, state, to = (
        g.view(x, channels),
        g.vector(op.weights[0]),
        g.state(op),
        g.new(y),
    )

    def make(p: Pass) -> None:
        g.launch(
            "ops/causal_conv",
            (-(-channels // THREADS), p.sequences),
            (*view()[:2], weight(), channels, p.inputs.chunks, p.inputs.positions)
            + (state.address, to.address),
            {"TAPS": taps},
        )

    g.emit(make, y)
