"""Norms, alone and with what stands before and behind them."""

from isobit.model.graph import Value
from isobit.numerics.ops import Add, Combine, Heads, L2Norm, MatMul, RmsNorm, SelectRows
from tests.ops.harness import Case, Writer
from tests.ops.inputs import floats, values

from .products import one_hot

EPS = 1e-6


def rms_norm(g: Writer) -> Value:
    """Of every width around the 256 lanes of its sum."""
    for n in (2, 64, 100, 128, 255, 256, 257, 1000, 2048, 2304):
        x = values(g.rng, g.rows, n)
        x[3] = 0
        w = floats(values(g.rng, n))
        y = g.one(f"y{n}", RmsNorm(EPS), g.given(x), weights=[w])
    return y


def norm_between(g: Writer, n: int, added: str, rows: str) -> Value:
    """Alone, behind a sum, behind weighted experts; read by a product and more, by a product
    alone, or of chosen rows without what lies between."""
    k = 10
    x, more = values(g.rng, g.rows, n), values(g.rng, g.rows, k * n if added == "experts" else n)
    x[0, :7] = 1e-41
    x[0, 7:14], more[0, 7:14] = 2e-38, -1.5e-38  # a subnormal sum
    z = g.given(x)
    y = g.given(more)
    if added == "experts":
        shares = g.given(g.rng.random((g.rows, k)))
        y = g.one(None, Combine(), shares, g.one(None, Heads(0, k, n), y))
    if added != "nothing":
        z = g.one("sum", Add(), z, y)
    h = g.one("h", RmsNorm(EPS), z, weights=[floats(values(g.rng, n))])
    if rows == "wanted":
        h = g.one(None, SelectRows(), h, g.logit_rows)
    elif rows == "all":
        g.one("again", Add(), h, z)
    return g.one("read", MatMul(), h, weights=[one_hot(g.rng, 72, n)])


def what_more_than_the_head_reads(g: Writer) -> Value:
    """It is there for all rows, not for the wanted ones alone."""
    h = g.one("h", RmsNorm(EPS), g.given(values(g.rng, g.rows, 64)), weights=[g.vector(64)])
    wanted = g.one(None, SelectRows(), h, g.logit_rows)
    g.one("other", Add(), h, h)
    return g.one("y", MatMul(), wanted, weights=[floats(g.rng.standard_normal((8, 64)))])


def norm_of_vectors(g: Writer, normed: bool) -> Value:
    x = g.around_edges(150, normed)
    g.one("few", RmsNorm(EPS), g.heads(x, 0, 4, 24), weights=[g.vector(24)])
    return g.one("y", RmsNorm(EPS), g.heads(x, 10, 3, 40), weights=[g.vector(40)])


def l2_norm(g: Writer, normed: bool) -> Value:
    return g.one("y", L2Norm(EPS, 24**-0.5), g.heads(g.around_edges(96, normed), 0, 4, 24))


def read_in_pieces(g: Writer) -> Value:
    """Head vectors where a product left them, in a sum, a norm and chosen rows."""
    x = g.given(values(g.rng, g.rows, 600))
    a, b = (g.heads(x, at, 2, 64) for at in (0, 300))
    z = g.one("sum", Add(), a, b)
    n = g.one("norm", RmsNorm(EPS), b, weights=[g.vector(64)])
    return g.one("y", Add(), z, n)


WIDTHS = (64, 256, 512, 608, 2304)
CASES = (
    Case(rms_norm, lengths=(7,), cuts=((), (1,))),
    *(
        Case(
            norm_between,
            {"n": n, "added": added, "rows": rows},
            (5,),
            ((), (1,)),
            p,
            also=("unfused",),
        )
        for i, n in enumerate(WIDTHS)
        for j, added in enumerate(("nothing", "a value", "experts"))
        for m, rows in enumerate(("all", "product", "wanted"))
        for p in (1 + (i + j + m) % 2,)
    ),
    Case(
        what_more_than_the_head_reads,
        lengths=(5,),
        unsupported={"cpu": "rms_norm before select_rows: cannot be moved"},
    ),
    *(Case(norm_of_vectors, {"normed": n}) for n in (False, True)),
    *(Case(l2_norm, {"normed": n}) for n in (False, True)),
    Case(read_in_pieces, lengths=(5,), cuts=((),)),
)
