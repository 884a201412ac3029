"""Values that are parts of others: some columns of a row, head vectors that lie apart in it."""

from isobit.model.graph import Value
from isobit.numerics.ops import (
    Append,
    Attention,
    CausalConv,
    Columns,
    Combine,
    ExpertMatMul,
    Heads,
    MatMul,
    Silu,
)
from tests.ops.harness import Case, Writer
from tests.ops.inputs import floats, values, weight

from .products import NAMED, routed


def products_of_parts(g: Writer, fmt: str) -> Value:
    """Of columns; of head vectors as a row, and of columns of these."""
    x = g.given(values(g.rng, g.rows, 1100))
    apart = g.heads(x, 3, 5, 128, 200)
    whole = g.columns(apart, 0, 640)
    parts = g.columns(x, 0, 256), g.columns(x, 301, 256), whole, g.columns(whole, 128, 256)
    for i, part in enumerate(parts):
        w = weight(g.rng, NAMED[fmt], 24, part.shape.width)
        y = g.one(f"y{i}", MatMul(), part, weights=[w])
    g.one("heads of heads", Silu(), g.heads(apart, 64, 3, 32, 128))
    return y


def experts_of_parts(g: Writer, fmt: str) -> Value:
    """Head vectors, each to an expert, and then to another; and as a row, to a product."""
    _, ids = routed(g, 4, 3)
    x = g.given(values(g.rng, g.rows, 800))
    first, second = (weight(g.rng, NAMED[fmt], 4, n, 256) for n in (256, 40))
    for i, part in enumerate((g.heads(x, 0, 3, 256), g.heads(x, 9, 3, 256, 260))):
        y = g.one(f"first{i}", ExpertMatMul(), part, ids, weights=[first])
        g.one(f"second{i}", ExpertMatMul(), y, ids, weights=[second])
        w = weight(g.rng, NAMED[fmt], 24, 768)
        y = g.one(f"y{i}", MatMul(), g.columns(y, 0, 768), weights=[w])
    return y


def parts_that_are_stages(g: Writer) -> Value:
    x = g.random(96)
    g.one("heads", Heads(5, 3, 16, 20), x)
    return g.one("y", Silu(), g.one("columns", Columns(3, 40), x))


def combined_heads(g: Writer) -> Value:
    x = g.random(400)
    return g.one("y", Combine(), g.columns(x, 0, 4), g.heads(x, 5, 4, 50, 60))


def convolved_heads(g: Writer) -> Value:
    taps = floats(g.rng.standard_normal((200, 4)))
    return g.one("y", CausalConv(), g.heads(g.random(400), 5, 4, 50, 60), weights=[taps])


def attention_of_heads(g: Writer) -> Value:
    x = g.random(400)
    kv = g.add((None, None), Append(), g.heads(x, 1, 2, 16, 20), g.heads(x, 50, 2, 16, 20))
    return g.one("y", Attention(), g.heads(x, 200, 4, 16, 18), *kv, g.positions)


CASES = (
    *(
        Case(f, {"fmt": name}, (9, 3), ((), (1,)))
        for f in (products_of_parts, experts_of_parts)
        for name in ("F32", "Q8_0")
    ),
    *(
        Case(f, lengths=(9, 3), cuts=((), (1,)))
        for f in (parts_that_are_stages, combined_heads, convolved_heads, attention_of_heads)
    ),
)
