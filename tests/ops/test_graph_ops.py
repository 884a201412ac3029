"""Each kind of operation on each backend gives the specification's bits.

A case writes a small graph: rows of random values (an embedding), then the operation. The reference
backend runs it as specified; the others must give the same bits for any cut of the tokens.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest

from isobit.backends.base import Backend, Batch
from isobit.backends.cpu import CpuBackend
from isobit.backends.reference import ReferenceBackend
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable
from isobit.gguf import formats
from isobit.model.graph import Builder, Graph, Value
from isobit.model.weights import Weights
from isobit.numerics import RopeTable, Weight
from isobit.numerics.ops import (
    Add,
    Append,
    Attention,
    Bias,
    CausalConv,
    ClampedGate,
    Columns,
    Decay,
    Embedding,
    ExpertBias,
    ExpertMatMul,
    ExpertScale,
    GatedAdd,
    GatedDelta,
    Gather,
    GatherExperts,
    GeluGate,
    Heads,
    Join,
    L2Norm,
    MatMul,
    Multiply,
    ReluSquared,
    RmsNorm,
    Rope,
    Scale,
    SelectRows,
    Sigmoid,
    SigmoidGate,
    Silu,
    SiluGate,
    Softcap,
    TopK,
)
from isobit.numerics.rope_table import Yarn
from tests.helpers.synth import QWEN3_30B_A3B
from tests.model.test_split import Meeting
from tests.ops.wgpu_support import open_device

from .cuda_support import open_cuda


def wgpu(weights: Weights, engine: EngineConfig) -> Backend:
    from isobit.backends.wgpu import WgpuBackend  # noqa: PLC0415

    return WgpuBackend(weights, engine, open_device())


def emulated(weights: Weights, engine: EngineConfig) -> Backend:
    return open_cuda("emulated", weights, engine)


def cuda(weights: Weights, engine: EngineConfig) -> Backend:
    return open_cuda("cuda", weights, engine)


OPENERS: dict[str, Callable[[Weights, EngineConfig], Backend]] = {
    "cpu": CpuBackend,
    "emulated": emulated,
    "cuda": cuda,
    "wgpu": wgpu,
}
VOCABULARY = 200
EDGES = [0.0, -0.0, 1e-42, -1e-38, 88.5, -87.2, 100.0, -100.0, 1e30, -3e38]


def f32(name: str, values: np.ndarray) -> Weight:
    data = np.ascontiguousarray(values, np.float32)
    return Weight(name, formats.F32, data.shape, data.reshape(-1).view(np.uint8))


def silu(g: Builder, x: Value, rng: np.random.Generator) -> Value:
    return g.one("y", Silu(), x)


def sigmoid(g: Builder, x: Value, rng: np.random.Generator) -> Value:
    return g.one("y", Sigmoid(), x)


def silu_gate(g: Builder, x: Value, rng: np.random.Generator) -> Value:
    halves = [g.one(None, Heads(48 * i, 3, 16), x) for i in range(2)]
    return g.one("y", SiluGate(), *halves)


def sigmoid_gate(g: Builder, x: Value, rng: np.random.Generator) -> Value:
    gate = g.one(None, Heads(16, 3, 16, 32), x)  # every second head
    return g.one("y", SigmoidGate(), g.one(None, Columns(0, 48), x), gate)


def multiply(g: Builder, x: Value, rng: np.random.Generator) -> Value:
    return g.one("y", Multiply(), *(g.one(None, Columns(first, 40), x) for first in (1, 50)))


def join(g: Builder, x: Value, rng: np.random.Generator) -> Value:
    """Of vectors with gaps between them; the first are joined to two heads each."""
    few = g.one(None, Heads(3, 2, 9, 40), x)
    return g.one("y", Join(), few, g.one(None, Heads(0, 4, 11, 24), x))


def gated_add(g: Builder, x: Value, rng: np.random.Generator) -> Value:
    a, b = (g.one(None, Columns(first, 40), x) for first in (1, 50))
    return g.one("y", GatedAdd(), a, b, g.one(None, Columns(7, 1), x))


def rms_norm(g: Builder, x: Value, rng: np.random.Generator) -> Value:
    weight = f32("w", rng.standard_normal(24))
    return g.one("y", RmsNorm(1e-6), g.one(None, Heads(0, 4, 24), x), weights=[weight])


def l2_norm(g: Builder, x: Value, rng: np.random.Generator) -> Value:
    return g.one("y", L2Norm(1e-6, 24**-0.5), g.one(None, Heads(0, 4, 24), x))


def partial_rope(g: Builder, x: Value, rng: np.random.Generator) -> Value:
    return g.one("y", Rope(RopeTable(8, 1e4)), g.one(None, Heads(0, 4, 24), x), g.positions)


def rope_of_neighbours(g: Builder, x: Value, rng: np.random.Generator) -> Value:
    table = RopeTable(20, 1e4, factors=tuple(rng.uniform(0.5, 8, 10).tolist()))
    return g.one("y", Rope(table, neighbours=True), g.one(None, Heads(0, 4, 24), x), g.positions)


def yarn(g: Builder, x: Value, rng: np.random.Generator) -> Value:
    table = RopeTable(24, 1e4, yarn=Yarn(8.0, 64))
    return g.one("y", Rope(table), g.one(None, Heads(0, 4, 24), x), g.positions)


def bias(g: Builder, x: Value, rng: np.random.Generator) -> Value:
    return g.one("y", Bias(), x, weights=[f32("b", rng.standard_normal(96))])


def scale(g: Builder, x: Value, rng: np.random.Generator) -> Value:
    return g.one("y", Scale(), x, weights=[f32("s", rng.standard_normal(96))])


def scaled_gate(g: Builder, x: Value, rng: np.random.Generator) -> Value:
    """Two scaled products, both read by what follows."""
    s = [f32(name, np.exp(rng.standard_normal(48))) for name in "st"]
    gate, up = (
        g.one(None, Scale(), g.one(None, Columns(48 * i, 48), x), weights=[s[i]]) for i in (0, 1)
    )
    return g.one("y", SiluGate(), gate, up)


def expert_scale(g: Builder, x: Value, rng: np.random.Generator) -> Value:
    z = g.one(None, Columns(0, 16), x)
    _, ids = g.add((None, None), TopK(4, normalise=True), z)
    heads = g.one(None, Heads(0, 4, 24), x)
    return g.one("y", ExpertScale(), heads, ids, weights=[f32("s", rng.standard_normal(16))])


def decay(g: Builder, x: Value, rng: np.random.Generator) -> Value:
    weights = [f32("dt", rng.standard_normal(6)), f32("A", -np.exp(rng.standard_normal(6)))]
    return g.one("y", Decay(), g.one(None, Columns(3, 6), x), weights=weights)


def causal_conv(g: Builder, x: Value, rng: np.random.Generator) -> Value:
    taps = f32("taps", rng.standard_normal((90, 4)))
    return g.one("y", CausalConv(), g.one(None, Columns(6, 90), x), weights=[taps])


def gated_delta(
    g: Builder, x: Value, rng: np.random.Generator, operation: GatedDelta | None = None
) -> Value:
    q, k = (g.one(None, L2Norm(1e-6), g.one(None, Heads(at, 2, 8), x)) for at in (0, 16))
    v = g.one(None, Heads(32, 4, 11), x)  # columns that are no whole blocks
    beta = g.one(None, Sigmoid(), g.one(None, Columns(80, 4), x))
    weights = [f32("dt", rng.standard_normal(4)), f32("A", -np.exp(rng.standard_normal(4)))]
    g_ = g.one(None, Decay(), g.one(None, Columns(84, 4), x), weights=weights)
    return g.one("y", operation or GatedDelta(), q, k, v, beta, g_)


def relu_squared(g: Builder, x: Value, rng: np.random.Generator) -> Value:
    return g.one("y", ReluSquared(), g.one(None, Columns(5, 60), x))


def scan_without_corrections(g: Builder, x: Value, rng: np.random.Generator) -> Value:
    return gated_delta(g, x, rng, GatedDelta(grouped=True, corrects=False))


def grouped_gated_delta(g: Builder, x: Value, rng: np.random.Generator) -> Value:
    return gated_delta(g, x, rng, GatedDelta(grouped=True))


def attention(
    g: Builder,
    x: Value,
    rng: np.random.Generator,
    window: int | None = None,
    scale: float | None = None,
) -> Value:
    """Of four query heads, the last of which sees little but its sink."""
    q = g.one(None, Rope(RopeTable(12, 1e4)), g.one(None, Heads(0, 4, 12), x), g.positions)
    k, v = (g.one(None, Heads(at, 2, 12), x) for at in (48, 72))
    keys, values = g.add(None, Append(), k, v)
    sinks = f32("sinks", np.array([0, 3, -200, 30]))
    operation = Attention(window, scale)
    return g.one("y", operation, q, keys, values, g.positions, weights=[sinks])


def attention_through_a_window(g: Builder, x: Value, rng: np.random.Generator) -> Value:
    return attention(g, x, rng, int(rng.integers(1, 69)), scale=rng.uniform(0.01, 2))


def expert_bias(g: Builder, x: Value, rng: np.random.Generator) -> Value:
    _, ids = g.add(None, TopK(2, normalise=True), g.one(None, Columns(3, 5), x))
    stack = f32("stack", rng.standard_normal((5, 24, 96)))
    y = g.one(None, ExpertMatMul(), x, ids, weights=[stack])
    return g.one("y", ExpertBias(), y, ids, weights=[f32("b", rng.standard_normal((5, 24)))])


def routed(g: Builder, z: Value, rng: np.random.Generator, of: TopK) -> Value:
    """The weights of experts chosen so with biases of eighths; in the ids' places, too."""
    bias = f32("bias", np.rint(4 * rng.standard_normal(z.shape.width)) / 8)
    w, ids = g.add((None, None), of, z, weights=[bias])
    marks = f32("marks", 1 + np.arange(z.shape.width))
    row = g.one(None, Heads(0, of.k, 1), w)
    return g.one("y", ExpertScale(), row, ids, weights=[marks])


def sigmoid_router(g: Builder, x: Value, rng: np.random.Generator) -> Value:
    p = g.one(None, Sigmoid(), x)
    return routed(g, p, rng, TopK(7, normalise=True, softmax=False))


def router_of_groups(g: Builder, x: Value, rng: np.random.Generator) -> Value:
    p = g.one(None, Sigmoid(), g.one(None, Columns(3, 90), x))
    return routed(g, p, rng, TopK(5, False, softmax=False, groups=6, groups_used=4))


def softmax_of_groups(g: Builder, x: Value, rng: np.random.Generator) -> Value:
    z = g.one(None, Columns(3, 90), x)
    return routed(g, z, rng, TopK(5, False, groups=6, groups_used=2))


def biased_softmax(g: Builder, x: Value, rng: np.random.Generator) -> Value:
    return routed(g, g.one(None, Columns(0, 40), x), rng, TopK(4, normalise=True))


def clamped_gate(g: Builder, x: Value, rng: np.random.Generator) -> Value:
    halves = [g.one(None, Heads(48 * i, 3, 16), x) for i in range(2)]
    return g.one("y", ClampedGate(1.5, 1.702), *halves)


def gelu_gate(g: Builder, x: Value, rng: np.random.Generator) -> Value:
    halves = [g.one(None, Heads(48 * i, 3, 16), x) for i in range(2)]
    return g.one("y", GeluGate(), *halves)


def softcap(g: Builder, x: Value, rng: np.random.Generator) -> Value:
    return g.one("y", Softcap(2.5), g.one(None, Add(), x, x))  # of which some are infinite


CASES = (
    gelu_gate,
    softcap,
    silu,
    sigmoid,
    relu_squared,
    silu_gate,
    sigmoid_gate,
    multiply,
    join,
    gated_add,
    rms_norm,
    l2_norm,
    partial_rope,
    rope_of_neighbours,
    yarn,
    bias,
    attention,
    attention_through_a_window,
    expert_bias,
    clamped_gate,
    scale,
    scaled_gate,
    expert_scale,
    sigmoid_router,
    router_of_groups,
    softmax_of_groups,
    biased_softmax,
)
STATEFUL = (causal_conv, gated_delta, grouped_gated_delta, scan_without_corrections)
WITHOUT_EDGES = {*STATEFUL[1:], decay, attention, attention_through_a_window, expert_bias}


def graph(case: Callable[..., Value], rng: np.random.Generator, *, normed: bool = False) -> Graph:
    g = Builder("case")
    table = rng.standard_normal((VOCABULARY, 96)) * np.exp(rng.standard_normal((VOCABULARY, 1)))
    if case not in WITHOUT_EDGES:
        table[: len(EDGES)] = rng.permuted(np.resize(EDGES, (len(EDGES), 96)), axis=1)
    x = g.one("x", Embedding(), g.tokens, weights=[f32("table", table)])
    of = x
    if normed:  # what a norm gives lies elsewhere
        of = g.one(None, RmsNorm(1e-6), x, weights=[f32("first", rng.standard_normal(96))])
    case(g, of, rng)
    end = g.one("end", RmsNorm(1e-6), x, weights=[f32("norm", np.ones(96))])
    wanted = g.one(None, SelectRows(), end, g.logit_rows)
    return g.graph(g.one("lm_head", MatMul(), wanted, weights=[f32("head", table)]))


def stage(
    backend: Backend, tokens: np.ndarray, sequence: np.ndarray, cuts: list[int]
) -> np.ndarray:
    """The stage y of all tokens, sequences side by side, cut into passes."""
    found: dict[int, list[np.ndarray]] = {s: [] for s in np.unique(sequence).tolist()}
    pages = np.arange(2 * 4, dtype=np.int32).reshape(2, 4)
    for first, last in pairwise(cuts):
        rows = [np.flatnonzero(sequence == s)[first:last] for s in found]
        at = np.concatenate(rows)
        positions = np.concatenate([np.arange(first, first + len(r)) for r in rows])
        batch = Batch(
            tokens[at],
            positions.astype(np.int32),
            sequence[at],
            pages,
            np.arange(len(rows), dtype=np.int32),  # of single tokens all, as in a step
            np.array([1, 0], np.int32),
        )
        taken: list[np.ndarray] = []
        backend.forward(batch, lambda _s, _l, v, to=taken: to.append(np.array(v)), frozenset({"y"}))
        for s, parts in found.items():
            parts.append(taken[0][sequence[at] == s])
    return np.concatenate([np.concatenate(parts) for parts in found.values()])


@pytest.mark.parametrize(
    ("name", "threads"), [("cpu", 1), ("cpu", 3), ("emulated", 1), ("cuda", 1), ("wgpu", 1)]
)
@pytest.mark.parametrize("case", [*CASES, decay, *STATEFUL], ids=lambda c: c.__name__)
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
def test_operation(  # type: ignore[no-untyped-def]
    name: str, case: Callable[..., Value], threads: int, normed: bool, rng
) -> None:
    weights = Weights(QWEN3_30B_A3B, graph(case, rng, normed=normed))
    engine = EngineConfig(max_sequences=2, context=256, threads=threads)
    tokens = rng.integers(0, VOCABULARY, 2 * 70).astype(np.int32)
    tokens[: len(EDGES)] = np.arange(len(EDGES))
    sequence = np.repeat(np.arange(2, dtype=np.int32), 70)
    with np.errstate(all="ignore"):
        expected = stage(ReferenceBackend(weights, engine), tokens, sequence, [0, 70])
        assert len(np.unique(expected)) > 300
        for cuts in ([0, 70], [0, 1, 2, 5, 33, 70]):
            got = stage(OPENERS[name](weights, engine), tokens, sequence, cuts)
            same = got.view(np.uint32) == expected.view(np.uint32)
            assert (same | (np.isnan(got) & np.isnan(expected))).all(), np.argwhere(~same)[:5]


def gathered(g: Builder, x: Value, rank: int) -> Value:
    """Of each of three parts other columns of the row: parts' ranges and sizes differ."""
    parts = (((0, 5), (31, 40)), ((5, 30),), ((30, 31),))
    size = (14, 25, 1)[rank]
    return g.one("y", Gather(parts, rank), g.one(None, Heads(7 * rank, 3, size), x))


def gathered_experts(g: Builder, x: Value, rank: int) -> Value:
    """The same from the part that has a row's expert, of which one has but one."""
    _, ids = g.add(None, TopK(3, normalise=True), g.one(None, Columns(0, 8), x))
    mine = g.one(None, Heads(8 + 9 * rank, 3, 20), x)
    return g.one("y", GatherExperts((0, 3, 4, 8), rank), mine, ids)


@pytest.mark.parametrize("case", [gathered, gathered_experts], ids=lambda c: c.__name__)
@pytest.mark.parametrize("threads", [1, 2])
def test_parts_of_a_value_are_put_together(  # type: ignore[no-untyped-def]
    case: Callable[..., Value], threads: int, rng
) -> None:
    """Three parts that run side by side, each a thread here; their memory holds a few rows."""
    engine = EngineConfig(max_sequences=2, context=256, threads=threads)
    seed, meeting = int(rng.integers(1 << 32)), Meeting(3)
    tokens = rng.integers(0, VOCABULARY, 2 * 20).astype(np.int32)
    sequence = np.repeat(np.arange(2, dtype=np.int32), 20)
    memory = np.zeros(4 * 64 + 2 * 3 * 4 * 300, np.uint8)

    def backends(rank: int) -> Iterator[Backend]:
        weights = Weights(
            QWEN3_30B_A3B,
            graph(lambda g, x, _: case(g, x, rank), np.random.default_rng(seed)),
        )
        yield ReferenceBackend(weights, engine, exchange=meeting.exchange(rank))
        yield CpuBackend(weights, engine, exchange=(memory, rank, 3))

    def part(rank: int) -> list[np.ndarray]:
        found = []
        with np.errstate(all="ignore"):
            for backend in backends(rank):
                found.append(stage(backend, tokens, sequence, [0, 1, 20]))
                backend.close()
        return found

    with ThreadPoolExecutor(3) as pool:
        every = [y.view(np.uint32) for found in pool.map(part, range(3)) for y in found]
    assert len(np.unique(every[0])) > 300
    assert all(np.array_equal(y, every[0]) for y in every)


def test_an_infinity_stays_under_a_softcap(rng: np.random.Generator) -> None:
    """So that a model that overflows is refused, and its logits are not taken for finite ones."""
    weights = Weights(QWEN3_30B_A3B, graph(softcap, rng))
    tokens = np.arange(len(EDGES), dtype=np.int32)
    backend = ReferenceBackend(weights, EngineConfig(max_sequences=2, context=256))
    with np.errstate(all="ignore"):
        y = stage(backend, tokens, 0 * tokens, [0, len(EDGES)])
    assert np.isneginf(y).sum() == 96  # one of the edges in each column
    assert (np.abs(y[np.isfinite(y)]) <= 2.5).all()


@pytest.mark.parametrize("name", OPENERS)
def test_a_sequence_begins_without_what_another_left(name: str, rng) -> None:  # type: ignore[no-untyped-def]
    for case in STATEFUL:
        weights = Weights(QWEN3_30B_A3B, graph(case, rng))
        engine = EngineConfig(max_sequences=2, context=256, threads=1)
        backend = OPENERS[name](weights, engine)
        tokens = rng.integers(0, VOCABULARY, 40).astype(np.int32)
        sequence = np.repeat(np.arange(2, dtype=np.int32), 20)
        first = stage(backend, tokens, sequence, [0, 20])
        stage(backend, tokens[::-1].copy(), sequence, [0, 7, 20])
        again = stage(backend, tokens, sequence, [0, 20])
        assert np.array_equal(again.view(np.uint32), first.view(np.uint32))


def test_an_operation_that_a_backend_lacks_is_named() -> None:
    @dataclass(frozen=True)
    class Unheard(Add):
        kind = "unheard_of"

    g = Builder("case")
    x = g.one("x", Embedding(), g.tokens, weights=[f32("table", np.ones((3, 4)))])
    with g.layer(7):
        x = g.one("y", Unheard(), x, x)
    wanted = g.one(None, SelectRows(), g.one(None, Silu(), x), g.logit_rows)
    head = g.one("lm_head", MatMul(), wanted, weights=[f32("head", np.ones((2, 4)))])
    weights = Weights(QWEN3_30B_A3B, g.graph(head))
    with pytest.raises(
        BackendUnavailable, match=r"^cpu: unheard_of of layer 7 is not implemented$"
    ):
        CpuBackend(weights, EngineConfig(context=64))
