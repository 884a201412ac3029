"""Operations that keep something of a sequence."""

import numpy as np

from isobit.model.graph import Value
from isobit.numerics.ops import CausalConv, Decay, GatedDelta, Heads, L2Norm, Sigmoid
from tests.ops.harness import Case, Writer
from tests.ops.inputs import floats, values


def causal_conv(g: Writer, normed: bool) -> Value:
    taps = floats(g.rng.standard_normal((90, 4)))
    return g.one("y", CausalConv(), g.columns(g.around_edges(96, normed), 6, 90), weights=[taps])


def gated_delta(g: Writer, of: str, normed: bool) -> Value:
    x = g.random(96, normed)
    q, k = (g.one(None, L2Norm(1e-6), g.heads(x, at, 2, 8)) for at in (0, 16))
    v = g.heads(x, 32, 4, 11)  # columns that are no whole blocks
    beta = g.one(None, Sigmoid(), g.columns(x, 80, 4))
    weights = [g.vector(4), floats(-np.exp(g.rng.standard_normal(4)))]
    keep = g.one(None, Decay(), g.columns(x, 84, 4), weights=weights)
    operation = {
        "delta": GatedDelta(),
        "grouped": GatedDelta(grouped=True),
        "scan": GatedDelta(grouped=True, corrects=False),
    }[of]
    return g.one("y", operation, q, k, v, beta, keep)


def gated_delta_of_any_size(g: Writer, size: int, columns: int) -> Value:
    """More keys than a column has invocations, and fewer; states that vanish."""
    q, k = (
        g.one(None, L2Norm(1e-6), g.one(None, Heads(0, 2, size), g.random(2 * size)))
        for _ in range(2)
    )
    v = g.one(None, Heads(0, 4, columns), g.given(values(g.rng, g.rows, 4 * columns)))
    beta = g.given(g.rng.random((g.rows, 4)))
    keep = g.given(-(10 ** g.rng.uniform(-3, 2, (g.rows, 4))))
    return g.one("y", GatedDelta(), q, k, v, beta, keep)


CASES = (
    *(Case(causal_conv, {"normed": n}) for n in (False, True)),
    *(
        Case(gated_delta, {"of": of, "normed": n})
        for of in ("delta", "grouped", "scan")
        for n in (False, True)
    ),
    *(
        Case(gated_delta_of_any_size, {"size": size, "columns": n}, (9,), ((), (1, 4)))
        for size, n in ((2, 3), (4, 300), (16, 1), (64, 17), (512, 5))
    ),
)
