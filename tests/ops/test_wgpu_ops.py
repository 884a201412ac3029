"""Every operation and fusion of wgpu against the specification, bit for bit.

Small graphs run on both; every value that has a name is compared. Buffers have sentinels behind
them and are filled with a pattern first; inputs are new every time.
"""

import numpy as np
import pytest

from isobit.backends.base import Batch
from isobit.backends.wgpu import fusions
from isobit.backends.wgpu.layout import Stack, superblocks
from isobit.backends.wgpu.lowering import ACT_WORDS, Pass
from isobit.backends.wgpu.ops.top_k import Plan
from isobit.errors import BackendUnavailable
from isobit.gguf.formats import FORMATS
from isobit.numerics import RopeTable, Weight
from isobit.numerics.ops import (
    Add,
    Append,
    Attention,
    Combine,
    ExpertMatMul,
    GatedDelta,
    Heads,
    L2Norm,
    MatMul,
    RmsNorm,
    Rope,
    SelectRows,
    SiluGate,
    TopK,
)

from .cases import edge_rows, extreme_weight, powers_weight, values, weight
from .wgpu_support import F32, Graphs, Guards, open_device, same, same_acts

EPS = 1e-6


@pytest.fixture
def device(monkeypatch):
    device = open_device()
    guards = Guards(device, monkeypatch)
    yield device
    guards.check()


@pytest.fixture(params=["fused", "op by op"])
def claims(request, monkeypatch):
    """Also without fusions."""
    monkeypatch.setattr(fusions, "CLAIMS", fusions.CLAIMS if request.param == "fused" else ())
    return fusions.CLAIMS


def by_name(name):
    return next(f for f in FORMATS.values() if f.name == name)


def vector(name, x):
    return Weight(name, FORMATS[0], x.shape, x.astype(F32).view(np.uint8))


def multiply(device, weights, x, planes):
    """``x @ W.T`` with matrices joined along their rows."""
    g = Graphs(device, planes)
    return g.check(g.one("y", MatMul(), g.given(x), weights=weights))[0]


ONE_PLANE = ("Q4_K", "Q6_K", "Q5_1", "Q3_K", "IQ4_NL", "IQ4_XS", "MXFP4", "IQ2_S", "NVFP4")
FORMATS_AND_PLANES = [(f.name, 2) for f in FORMATS.values()] + [(name, 1) for name in ONE_PLANE]


@pytest.mark.parametrize(("name", "planes"), FORMATS_AND_PLANES)
def test_matmul(device, rng, name, planes):
    """Two groups of tokens, two of rows, more superblocks than lanes; a part of each; the edges:
    extreme codes, sub-scales and activations make the largest integers that can occur."""
    fmt = by_name(name)
    wide, narrow = (
        n - n % fmt.block_size for n in ((2880, 1056) if fmt.block_size < 256 else (2304, 1280))
    )
    for rows, columns, tokens in ((40, wide, 9), (13, narrow, 1)):
        multiply(device, [weight(rng, fmt, rows, columns)], values(rng, tokens, columns), planes)
    if fmt.quantized:
        x = edge_rows(rng, 1280)
        x = x[np.abs(x).max(axis=1) < 1e30]
        for byte in (0x00, 0xFF, 0x88):
            multiply(device, [extreme_weight(fmt, byte, 3, 1280)], x, planes)


def test_every_scale_of_mxfp4(device, rng):
    w = powers_weight(rng, 320)
    x = (
        rng.standard_normal((6, 320)) * np.float64(10) ** [[-28], [-8], [-2], [0], [2], [9]]
    ).astype(F32)
    for planes in (1, 2):
        g = Graphs(device, planes)
        y = g.one("y", MatMul(), g.given(x), weights=[w])
        with np.errstate(over="ignore", invalid="ignore"):
            _, ours, theirs = g.run(y)
        got, expected = ours["y"], theirs["y"]
        assert (np.abs(expected) < 1e-38).any()
        assert not np.isfinite(expected).all()
        finite = np.isfinite(expected)
        assert np.array_equal(np.isfinite(got), finite)
        same(got[finite], expected[finite])


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0"])
def test_matmul_without_the_packed_dot_product(device, rng, name, monkeypatch):
    monkeypatch.setattr(device, "dot", "dot_plain")
    multiply(device, [weight(rng, by_name(name), 9, 512)], values(rng, 3, 512), 2)


def test_rope_of_the_first_values(device, rng):
    g = Graphs(device)
    heads = g.one("heads", Heads(0, 2, 40), g.given(values(rng, 5, 80)))
    g.check(g.one("rotated", Rope(RopeTable(24, 1e4)), heads, g.positions))


@pytest.mark.parametrize("limit", [1 << 30, 9_000])
def test_matmul_of_joined_matrices(device, rng, limit, monkeypatch):
    """q, k and v of other formats side by side, also divided between buffers."""
    monkeypatch.setattr(device, "binding_bytes", limit)
    names, rows = ("Q4_K", "Q4_K", "Q6_K", "F16"), (40, 13, 24, 11)
    ws = [weight(rng, by_name(n), r, 512) for n, r in zip(names, rows, strict=True)]
    ours = multiply(device, ws, values(rng, 5, 512), 2)
    (matrix,) = ours._g.matrices
    parts = [len(s.parts) for s in matrix.segments]
    assert parts == ([3, 2, 2] if limit == 9_000 else [1, 1, 1])


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q5_0", "BF16"])
@pytest.mark.parametrize("tokens", [1, 9])
def test_experts(device, rng, claims, name, tokens, monkeypatch):
    """Gate and up joined, SwiGLU, down and the sum by rank; each expert's pairs together, the stack
    divided inside an expert."""
    experts, rows, columns, k = 5, 32, 512, 3
    gate, up = (weight(rng, by_name(name), experts, rows, columns) for _ in range(2))
    down = weight(rng, by_name("F16"), experts, columns, rows)
    stack = Stack((gate, up) if claims else (gate,))
    monkeypatch.setattr(device, "binding_bytes", stack.unit_bytes * (2 * stack.units - 1))
    z = rng.standard_normal((tokens, experts)).astype(F32)
    z[:, 3] = -100  # nobody's expert
    z[:, 0] = 5  # everybody's
    g = Graphs(device)
    x = g.given(values(rng, tokens, columns))
    shares, ids = g.add(("shares", "ids"), TopK(k, normalise=True), g.given(z, "logits"))
    parts = [g.one(n, ExpertMatMul(), x, ids, weights=[w]) for n, w in (("gate", gate), ("up", up))]
    y = g.one("down", ExpertMatMul(), g.one("silu", SiluGate(), *parts), ids, weights=[down])
    ours, _ = g.check(g.one("out", Combine(), shares, y))
    assert len(ours._g.matrices[0].segments[0].parts) == 3
    assert len(ours._g.matrices) == (2 if claims else 3)


def test_plan_holds_every_pair_once(device, rng):
    """Many tokens, uneven experts: groups of at most 8 items, all of one expert."""
    tokens, experts, k = 300, 40, 4
    z = (rng.standard_normal((tokens, experts)) + np.linspace(0, 4, experts)).astype(F32)
    g = Graphs(device, context=512)
    shares, ids = g.add(("shares", "ids"), TopK(k, normalise=True), g.given(z))
    ours, _ = g.check(shares)
    at = Plan.of(ids, Pass(tokens, 1, 1))
    words = device.read(ours._g.places[ids].slot.buffer, np.int32, 5 * tokens * k)
    entries = words[at.entries : at.entries + 3 * at.groups].reshape(-1, 3)
    found = []
    for expert, first, count in entries:
        assert 0 <= count <= 8
        items = words[first : first + count]
        assert (words[items] == expert).all()
        found += items.tolist()
    assert sorted(found) == list(range(tokens * k))


@pytest.mark.parametrize(("experts", "k"), [(16, 4), (128, 8), (300, 64), (4, 4)])
@pytest.mark.parametrize("normalise", [True, False])
def test_router(device, rng, experts, k, normalise):
    z = rng.standard_normal((6, experts)).astype(F32) * 4
    z[1] = np.round(z[1])  # ties
    z[2] = 0
    z[3, experts // 2] = 500  # all others have probability 0
    z[4] = -np.abs(z[4]) - 200
    z[5] = np.where(rng.random(experts) < 0.5, F32(-0.0), F32(0))
    g = Graphs(device)
    g.check(g.add(("shares", "ids"), TopK(k, normalise), g.given(z))[0])


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_router_of_logits_that_are_not_finite(device, rng, broken):
    z = rng.standard_normal((2, 16)).astype(F32)
    z[0, 5] = broken
    z[1] = broken
    g = Graphs(device)
    shares, _ = g.add(("shares", "ids"), TopK(4, normalise=True), g.given(z))
    for ids in g.run(shares, reference=False)[1]["ids"]:
        assert len(set(ids.tolist())) == 4
        assert ((ids >= 0) & (ids < 16)).all()


def test_more_experts_than_the_kernel_chooses(device, rng):
    g = Graphs(device)
    shares, _ = g.add(("shares", "ids"), TopK(65, normalise=True), g.given(values(rng, 1, 80)))
    with pytest.raises(BackendUnavailable, match="top_k: expected at most 64 experts a token"):
        g.check(shares)


@pytest.mark.parametrize("n", [64, 256, 600, 2048])
@pytest.mark.parametrize("added", ["nothing", "a value", "experts"])
@pytest.mark.parametrize("rows", ["all", "wanted"])
def test_norm(device, rng, claims, n, planes, added, rows):
    """Alone, behind a sum, behind weighted experts; of chosen rows without what lies between."""
    tokens, k = 3, 5
    x, w = values(rng, tokens, n), values(rng, n)
    o = values(rng, tokens, n) if added == "a value" else values(rng, tokens, k * n)
    x[0, :7] = F32(1e-41)
    x[0, 7:14], o[0, 7:14] = F32(2e-38), F32(-1.5e-38)  # a subnormal sum
    g = Graphs(device, planes)
    z = g.given(x)
    y = g.given(o, "addend")
    if added == "experts":
        shares = g.given(rng.random((tokens, k)).astype(F32), "shares")
        y = g.one("combined", Combine(), shares, g.one("experts", Heads(0, k, n), y))
    if added != "nothing":
        z = g.one("sum", Add(), z, y)
    h = g.one("h", RmsNorm(EPS), z, weights=[vector("w", w)])
    if rows == "all":
        h = g.one("again", Add(), h, z)
    ours, found = g.check(h)
    if rows == "all":
        acts = device.read(
            ours._g.scratch("acts", 0).buffer, np.uint32, tokens * superblocks(n) * ACT_WORDS
        )
        same_acts(acts.reshape(tokens, superblocks(n), ACT_WORDS), found["h"], planes)


def test_what_more_than_the_logits_read_is_there_for_all_rows(device, rng):
    g = Graphs(device)
    h = g.one(
        "h", RmsNorm(EPS), g.given(values(rng, 3, 64)), weights=[vector("w", values(rng, 64))]
    )
    wanted = g.one(None, SelectRows(), h, g.logit_rows)
    g.one("other", Add(), h, h)
    g.check(g.one("y", SiluGate(), wanted, wanted), select=False)


def test_norm_of_head_vectors(device, rng):
    g = Graphs(device)
    heads = g.one("heads", Heads(10, 3, 40), g.given(values(rng, 5, 150)))
    g.check(g.one("h", RmsNorm(EPS), heads, weights=[vector("w", values(rng, 40))]))


@pytest.mark.parametrize("n", [256, 600])
def test_silu_gate(device, rng, n, planes):
    gate, up = rng.uniform(-100, 100, (4, n)).astype(F32), values(rng, 4, n)
    gate[0, :6] = [0.0, -0.0, 88.5, -88.5, 87.0, -87.0]
    gate[1, :256] = 0  # a block of zeros
    up[2, 3], up[3, 255] = np.inf, np.nan
    g = Graphs(device, planes)
    with np.errstate(invalid="ignore"):
        ours, got, expected = g.run(g.one("y", SiluGate(), g.given(gate), g.given(up, "up")))
    finite = np.isfinite(expected["y"])
    same(got["y"][finite], expected["y"][finite])
    assert not np.isfinite(got["y"][~finite]).any()
    shape = 4, superblocks(n), ACT_WORDS
    acts = device.read(ours._g.scratch("acts", 0).buffer, np.uint32, int(np.prod(shape)))
    same_acts(acts.reshape(shape), expected["y"], planes)


def test_what_is_read_in_pieces(device, rng):
    """Head vectors where a product left them, in a sum, a norm and chosen rows."""
    g = Graphs(device)
    x = g.given(values(rng, 5, 600))
    a, b = (g.one(n, Heads(at, 2, 64), x) for n, at in (("a", 0), ("b", 300)))
    z = g.one("sum", Add(), a, b)
    n = g.one("norm", RmsNorm(EPS), b, weights=[vector("w", values(rng, 64))])
    g.one("end", Add(), z, n)
    g.check(b)


SHAPES = [(128, 4, 2, 2), (80, 3, 1, 1), (10, 4, 4, 3), (512, 2, 1, 1)]


@pytest.mark.parametrize(("head_dim", "heads", "kv_heads", "together"), SHAPES)
def test_attention(device, rng, claims, head_dim, heads, kv_heads, together, planes, monkeypatch):
    """Two sequences on scattered pages; ``together`` key-value heads share a buffer of the cache,
    and tokens take several passes and portions."""
    lengths, pages = (140, 5), np.array([[3, 0, 2], [1, 4, 5]], np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)
    sequence = np.repeat([0, 1], lengths).astype(np.int32)
    tokens = len(positions)
    qkv = values(rng, tokens, (heads + 2 * kv_heads) * head_dim)
    qkv[3, -head_dim:] = 0  # a value vector of zeros
    page = 4 * (256 * -(-head_dim // 4) + 128)
    monkeypatch.setattr(device, "binding_bytes", 6 * page * together)
    g = Graphs(device, planes, context=192, sequences=2)
    x, table = g.given(qkv), RopeTable(head_dim, 1e4)
    at, rotated = 0, []
    for name, count in (("q", heads), ("k", kv_heads)):
        y = g.one(None, Heads(at, count, head_dim), x)
        y = g.one(None, RmsNorm(EPS), y, weights=[vector(name, values(rng, head_dim))])
        rotated.append(g.one(name, Rope(table), y, g.positions))
        at += count * head_dim
    v = g.one(None, Heads(at, kv_heads, head_dim), x)
    keys, stored = g.add(None, Append(), rotated[1], v)
    y = g.one("attention", Attention(), rotated[0], keys, stored, g.positions)
    w = weight(rng, by_name("Q8_0"), 8, heads * head_dim) if heads * head_dim % 32 == 0 else None
    y = g.one("out", MatMul(), y, weights=[w]) if w else y
    token_ids = np.arange(tokens, dtype=np.int32)
    rows = np.array([139, 144, 3], np.int32)
    ours, _ = g.check(y, Batch(token_ids, positions, sequence, pages, rows))
    heads_of = [part.heads for part in ours._g.caches[keys].parts]
    assert sum(heads_of) == kv_heads
    assert heads_of[0] == together


@pytest.mark.parametrize(("size", "columns"), [(2, 3), (4, 300), (16, 1), (64, 17), (512, 5)])
def test_delta_rule_of_any_size(device, rng, size, columns):
    """More keys than a column has invocations, and fewer; states that vanish."""
    g = Graphs(device, sequences=1)
    q, k = (g.given(rng.standard_normal((9, 2 * size)), f"of {c}") for c in "qk")
    v = g.given(values(rng, 9, 4 * columns), "of v")
    beta = g.given(rng.random((9, 4)), "beta")
    decay = g.given(-(10 ** rng.uniform(-3, 2, (9, 4))), "decay")
    q, k = (g.one(None, L2Norm(EPS), g.one(None, Heads(0, 2, size), x)) for x in (q, k))
    y = g.one("y", GatedDelta(), q, k, g.one(None, Heads(0, 4, columns), v), beta, decay)
    g.check(y)
