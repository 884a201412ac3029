"""Cases of the sizes of models, which are timed once their bits were right."""

import numpy as np

from isobit.model.graph import Value
from isobit.numerics import RopeTable
from isobit.numerics.ops import MatMul, RmsNorm, Rope, TopK
from tests.ops.harness import Case, Writer
from tests.ops.inputs import weight

from .attention import attention
from .products import NAMED


def product(g: Writer, fmt: str, rows: int, columns: int) -> Value:
    x = g.given(g.rng.standard_normal((g.rows, columns)))
    return g.one("y", MatMul(), x, weights=[weight(g.rng, NAMED[fmt], rows, columns)])


def norm(g: Writer, n: int) -> Value:
    return g.one("y", RmsNorm(1e-6), g.random(n), weights=[g.vector(n)])


def rotation(g: Writer, size: int, heads: int) -> Value:
    x = g.heads(g.random(size * heads), 0, heads, size)
    return g.one("y", Rope(RopeTable(size, 1e6)), x, g.positions)


def router(g: Writer, experts: int, k: int) -> Value:
    z = g.given(np.asarray(g.rng.standard_normal((g.rows, experts)), np.float32))
    return g.add(("shares", "ids"), TopK(k, normalise=True), z)[0]


TIMED = (
    *(
        Case(product, {"fmt": fmt, "rows": 2048, "columns": 2048}, (tokens,), ((),), finite=True)
        for fmt in ("Q4_K", "Q6_K", "Q8_0", "IQ4_XS", "MXFP4", "F16")
        for tokens in (1, 8, 128)
    ),
    *(Case(norm, {"n": 2048}, (tokens,), ((),)) for tokens in (1, 128)),
    *(Case(rotation, {"size": 128, "heads": 32}, (tokens,), ((),)) for tokens in (1, 128)),
    *(Case(router, {"experts": 128, "k": 8}, (tokens,), ((),)) for tokens in (1, 128)),
    *(
        Case(attention, {"size": 128, "heads": 8, "kv_heads": 1}, (depth + 1,), ((depth,),))
        for depth in (128, 1024)
    ),
)
