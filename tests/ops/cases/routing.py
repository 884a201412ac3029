"""The choice of experts, and what is made of what they give."""

import numpy as np

from isobit.model.graph import Value
from isobit.numerics.ops import Combine, ExpertScale, Heads, Sigmoid, TopK
from tests.ops.harness import Case, Stages, Writer
from tests.ops.inputs import floats, values


def top_k(g: Writer, experts: int, k: int, normalise: bool) -> Value:
    """Ties everywhere, at the border and of zeros of both signs; experts of probability 0."""
    z = values(g.rng, g.rows, experts) / np.float32(1e6)
    z[0] = 0
    z[1] = g.rng.integers(0, 3, experts)
    z[2] = np.where(np.arange(experts) == experts - 1, 80, -80)
    z[3] = np.round(g.rng.standard_normal(experts) * 4)
    z[4], z[4, experts // 2] = g.rng.standard_normal(experts), 500
    z[5] = -np.abs(z[5]) - 200
    z[6] = np.where(g.rng.random(experts) < 0.5, np.float32(-0.0), np.float32(0))
    z[7:] = g.rng.standard_normal(z[7:].shape) * 4
    shares, _ = g.add(("shares", "ids"), TopK(k, normalise), g.given(z))
    return shares


def top_k_of_numbers_that_are_not_finite(g: Writer, broken: float) -> Value:
    z = g.rng.standard_normal((g.rows, 16))
    z[0, 5] = broken
    z[1] = broken
    return g.add(("shares", "ids"), TopK(4, normalise=True), g.given(z))[0]


def still_a_choice(stages: Stages) -> None:
    """Of four different experts of 16."""
    for ids in stages["ids"]:
        assert len(set(ids.tolist())) == 4
        assert ((ids >= 0) & (ids < 16)).all()


def biased(g: Writer, z: Value, of: TopK) -> Value:
    """The weights of experts chosen so with biases of eighths; in the ids' places, too."""
    bias = floats(np.rint(4 * g.rng.standard_normal(z.shape.width)) / 8)
    w, ids = g.add((None, None), of, z, weights=[bias])
    marks = floats(1 + np.arange(z.shape.width))
    return g.one("y", ExpertScale(), g.one(None, Heads(0, of.k, 1), w), ids, weights=[marks])


def sigmoid_router(g: Writer, normed: bool) -> Value:
    p = g.one(None, Sigmoid(), g.around_edges(96, normed))
    return biased(g, p, TopK(7, normalise=True, softmax=False))


def router_of_groups(g: Writer, normed: bool) -> Value:
    p = g.one(None, Sigmoid(), g.columns(g.around_edges(96, normed), 3, 90))
    return biased(g, p, TopK(5, normalise=False, softmax=False, groups=6, groups_used=4))


def softmax_of_groups(g: Writer, normed: bool) -> Value:
    z = g.columns(g.around_edges(96, normed), 3, 90)
    return biased(g, z, TopK(5, normalise=False, groups=6, groups_used=2))


def biased_softmax(g: Writer, normed: bool) -> Value:
    return biased(g, g.columns(g.around_edges(96, normed), 0, 40), TopK(4, normalise=True))


def expert_scale(g: Writer, normed: bool) -> Value:
    x = g.around_edges(96, normed)
    _, ids = g.add((None, None), TopK(4, normalise=True), g.columns(x, 0, 16))
    return g.one("y", ExpertScale(), g.heads(x, 0, 4, 24), ids, weights=[g.vector(16)])


def combine(g: Writer, k: int, n: int) -> Value:
    """In the order of ranks; 0 + w * -0 is +0."""
    shares, y = values(g.rng, g.rows, k), values(g.rng, g.rows, k * n)
    y[0], y[1] = -0.0, 1
    shares[1] = np.resize([1e8, 1, -1e8], k)
    return g.one("y", Combine(), g.given(shares), g.one(None, Heads(0, k, n), g.given(y)))


SIZES = ((1, 1), (4, 4), (16, 4), (128, 8), (300, 7), (300, 64))
CASES = (
    *(
        Case(top_k, {"experts": e, "k": k, "normalise": normalise}, (12,), ((), (1,)))
        for e, k in SIZES
        for normalise in (False, True)
    ),
    Case(
        top_k,
        {"experts": 80, "k": 65, "normalise": True},
        (9,),
        ((),),
        unsupported=dict.fromkeys(
            ("wgpu", "emulated", "cuda"), "top_k: expected at most 64 experts"
        ),
    ),
    *(
        Case(top_k_of_numbers_that_are_not_finite, {"broken": x}, (3,), ((),), holds=still_a_choice)
        for x in (np.nan, np.inf)
    ),
    *(
        Case(f, {"normed": n})
        for f in (sigmoid_router, router_of_groups, softmax_of_groups, biased_softmax, expert_scale)
        for n in (False, True)
    ),
    *(Case(combine, {"k": k, "n": n}, (4,), ((),)) for k, n in ((1, 5), (4, 256), (8, 2048))),
)
