"""Operations on each value by itself, and rotations."""

from collections.abc import Callable

import numpy as np

from isobit.model.graph import Value
from isobit.numerics import RopeTable
from isobit.numerics.ops import (
    Add,
    Bias,
    ClampedGate,
    Decay,
    GatedAdd,
    GeluGate,
    Join,
    MatMul,
    Multiply,
    ReluSquared,
    Rope,
    Scale,
    Sigmoid,
    SigmoidGate,
    Silu,
    SiluGate,
    Softcap,
)
from isobit.numerics.rope_table import Yarn
from tests.ops.harness import Case, Writer
from tests.ops.inputs import EDGES, edge_rows, floats, values

from .products import one_hot


def silu(g: Writer, normed: bool) -> Value:
    return g.one("y", Silu(), g.around_edges(96, normed))


def sigmoid(g: Writer, normed: bool) -> Value:
    return g.one("y", Sigmoid(), g.around_edges(96, normed))


def exponential(g: Writer) -> Value:
    """x / (1 + exp(-x)), whose sum is exp(-x) where that is large."""
    every = g.rng.integers(0, 1 << 32, (g.rows, 300), dtype=np.uint32).view(np.float32)
    every[::2] = g.rng.uniform(-89, -17, every[::2].shape)
    every[1 : 1 + len(EDGES), 0] = EDGES
    g.one("large", Silu(), g.given(every))
    return g.one("y", Sigmoid(), g.given(g.rng.uniform(-89, 20, (g.rows, 300))))


def _halves(g: Writer, x: Value) -> list[Value]:
    return [g.heads(x, 48 * i, 3, 16) for i in range(2)]


def silu_gate(g: Writer, normed: bool) -> Value:
    return g.one("y", SiluGate(), *_halves(g, g.around_edges(96, normed)))


def gelu_gate(g: Writer, normed: bool) -> Value:
    return g.one("y", GeluGate(), *_halves(g, g.around_edges(96, normed)))


def clamped_gate(g: Writer, normed: bool) -> Value:
    return g.one("y", ClampedGate(1.5, 1.702), *_halves(g, g.around_edges(96, normed)))


def sigmoid_gate(g: Writer, normed: bool) -> Value:
    x = g.around_edges(96, normed)
    gate = g.heads(x, 16, 3, 16, 32)  # every second head
    return g.one("y", SigmoidGate(), g.columns(x, 0, 48), gate)


def relu_squared(g: Writer, normed: bool) -> Value:
    return g.one("y", ReluSquared(), g.columns(g.around_edges(96, normed), 5, 60))


def multiply(g: Writer, normed: bool) -> Value:
    x = g.around_edges(96, normed)
    return g.one("y", Multiply(), *(g.columns(x, first, 40) for first in (1, 50)))


def gated_add(g: Writer, normed: bool) -> Value:
    x = g.around_edges(96, normed)
    a, b = (g.columns(x, first, 40) for first in (1, 50))
    return g.one("y", GatedAdd(), a, b, g.columns(x, 7, 1))


def join(g: Writer, normed: bool) -> Value:
    """Of vectors with gaps between them; the first are joined to two heads each."""
    x = g.around_edges(96, normed)
    return g.one("y", Join(), g.heads(x, 3, 2, 9, 40), g.heads(x, 0, 4, 11, 24))


def bias(g: Writer, normed: bool) -> Value:
    return g.one("y", Bias(), g.around_edges(96, normed), weights=[g.vector(96)])


def scale(g: Writer, normed: bool) -> Value:
    return g.one("y", Scale(), g.around_edges(96, normed), weights=[g.vector(96)])


def scaled_gate(g: Writer, normed: bool) -> Value:
    """Two scaled products, both read by what follows."""
    x = g.around_edges(96, normed)
    s = [floats(np.exp(g.rng.standard_normal(48))) for _ in range(2)]
    halves = (g.one(None, Scale(), g.columns(x, 48 * i, 48), weights=[s[i]]) for i in (0, 1))
    return g.one("y", SiluGate(), *halves)


def softcap(g: Writer, normed: bool) -> Value:
    x = g.around_edges(96, normed)
    return g.one("y", Softcap(2.5), g.one(None, Add(), x, x))  # of which some are infinite


def decay(g: Writer, normed: bool) -> Value:
    weights = [g.vector(6), floats(-np.exp(g.rng.standard_normal(6)))]
    return g.one("y", Decay(), g.columns(g.random(96, normed), 3, 6), weights=weights)


def rope(g: Writer, size: int, how: str, neighbours: bool) -> Value:
    """Of whole vectors, of the first values of each, with scalings."""
    table = RopeTable(size, 1e6)
    if how == "partial":
        table = RopeTable(size // 3 // 2 * 2, 1e4)
    elif how == "yarn":
        table = RopeTable(size, 1e4, yarn=Yarn(8.0, 64))
    elif how == "factors":
        factors = g.rng.uniform(0.5, 8, size // 2 - 2)
        table = RopeTable(size - 4, 1e4, factors=tuple(factors.tolist()))
    x = g.around_edges(4 * size, normed=True)
    return g.one("y", Rope(table, neighbours), g.heads(x, 0, 4, size), g.positions)


def gated_rows(g: Writer, gate: Callable[..., Value], n: int) -> Value:
    """A row's gate, then a product that reads it: zeros, ends of the exponential, NaN."""
    gates, ups = g.rng.uniform(-100, 100, (g.rows, n)), values(g.rng, g.rows, n)
    gates[0, : len(EDGES)] = EDGES
    gates[1, : n // 2], ups[1, n // 2 :] = 0, -0.0
    ups[2, 3], ups[3, n - 1] = np.inf, np.nan
    gates[4 : 4 + 14], ups[4 : 4 + 14] = 88, edge_rows(g.rng, n)
    y = g.one("y", gate(), g.given(gates), g.given(ups))
    g.one("read", MatMul(), y, weights=[one_hot(g.rng, 40, n)])
    return y


def in_turns(g: Writer, n: int) -> Value:
    """Values that wait for others, which have no name, and are made one from another."""
    x = g.random(96, normed=True)
    waiting = [g.one(None, Silu(), x) for _ in range(n)]
    made = [g.one(None, Sigmoid(), x) for _ in range(n)]
    last = g.one(None, Silu(), g.one(None, Silu(), g.one(None, Sigmoid(), x)))
    for y in (*waiting, *made):
        last = g.one(None, Add(), g.one(None, Silu(), last), y)
    return g.one("y", Add(), last, x)


ROPES = ((2, "whole"), (6, "whole"), (200, "whole"), (24, "partial"), (40, "partial"))
ROPES += ((24, "yarn"), (24, "factors"))
BOTH = (silu, sigmoid, silu_gate, gelu_gate, clamped_gate, sigmoid_gate, multiply, gated_add, join)
BOTH += (bias, relu_squared, scale, scaled_gate, softcap, decay)
CASES = (
    *(Case(f, {"normed": n}) for f in BOTH for n in (False, True)),
    Case(exponential, cuts=((),)),
    *(Case(in_turns, {"n": n}, (5,), ((),)) for n in (1, 2)),
    *(
        Case(gated_rows, {"gate": SiluGate, "n": n}, (20,), ((), (1, 7)), p, finite=True)
        for n in (32, 256, 608, 768)
        for p in (1, 2)
    ),
    *(
        Case(rope, {"size": size, "how": how, "neighbours": n}, (12, 5))
        for size, how in ROPES
        for n in (False, True)
    ),
    Case(rope, {"size": 128, "how": "far", "neighbours": False}, (3,), first=5000),
)
