"""Every wgpu operation against the specification, bit for bit.

Outputs have sentinels behind them and are filled with a pattern first; inputs are new every time.
"""

import numpy as np
import pytest

from isobit import numerics
from isobit.backends.wgpu.layout import Stack, readable, superblocks
from isobit.backends.wgpu.load import load_matrix
from isobit.backends.wgpu.memory import ACT_BYTES, record_bytes, words_of
from isobit.backends.wgpu.ops import BatchAt, CachePart, Heads, Ops
from isobit.errors import BackendUnavailable
from isobit.gguf.formats import FORMATS
from isobit.numerics import TILE, Weight

from .cases import edge_rows, extreme_weight, powers_weight, values, weight
from .wgpu_support import F32, Buffers, open_device, packed, same, same_acts

ACT = ACT_BYTES // 4
EPS = F32(1e-6)


@pytest.fixture
def device():
    return open_device()


@pytest.fixture
def b(device):
    return Buffers(device)


def by_name(name):
    return next(f for f in FORMATS.values() if f.name == name)


def multiply(device, b, weights, x, planes):
    """``x @ W.T`` with matrices joined along their rows, on the device."""
    w = load_matrix(device, weights)
    y = b.new(len(x), w.rows)
    steps = Ops(device, planes).matmul(w, b.put(x), 0, b.put(packed(x, planes)), y, items=len(x))
    device.run(steps)
    return b.get(y, (len(x), w.rows))


ONE_PLANE = ("Q4_K", "Q6_K", "Q5_1", "Q3_K", "IQ4_NL", "IQ4_XS", "MXFP4")
FORMATS_AND_PLANES = [(f.name, 2) for f in FORMATS.values() if readable(f)] + [
    (name, 1) for name in ONE_PLANE
]


@pytest.mark.parametrize(("name", "planes"), FORMATS_AND_PLANES)
def test_matmul(device, b, rng, name, planes):
    """Two groups of tokens, two of rows, more superblocks than lanes; a part of each; the edges:
    extreme codes, sub-scales and activations make the largest integers that can occur."""
    fmt = by_name(name)
    small = fmt.block_size <= 32
    wide, narrow = (2880, 1056) if small else (2304, 1280)
    for rows, columns, tokens in ((40, wide, 9), (13, narrow, 1)):
        w, x = weight(rng, fmt, rows, columns), values(rng, tokens, columns)
        same(multiply(device, b, [w], x, planes), numerics.matmul(w, x, planes))
    if fmt.quantized:
        x = edge_rows(rng, 1280)
        x = x[np.abs(x).max(axis=1) < 1e30]
        for byte in (0x00, 0xFF, 0x88):
            w = extreme_weight(fmt, byte, 3, 1280)
            same(multiply(device, b, [w], x, planes), numerics.matmul(w, x, planes))


def test_every_scale_of_mxfp4(device, b, rng):
    w = powers_weight(rng, 320)
    x = (
        rng.standard_normal((6, 320)) * np.float64(10) ** [[-28], [-8], [-2], [0], [2], [9]]
    ).astype(F32)
    for planes in (1, 2):
        with np.errstate(over="ignore", invalid="ignore"):
            expected = numerics.matmul(w, x, planes)
        assert (np.abs(expected) < 1e-38).any()
        assert not np.isfinite(expected).all()
        got = multiply(device, b, [w], x, planes)
        finite = np.isfinite(expected)
        assert np.array_equal(np.isfinite(got), finite)
        same(got[finite], expected[finite])


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0"])
def test_matmul_without_the_packed_dot_product(device, b, rng, name, monkeypatch):
    monkeypatch.setattr(device, "dot", "dot_plain")
    w, x = weight(rng, by_name(name), 9, 512), values(rng, 3, 512)
    same(multiply(device, b, [w], x, 2), numerics.matmul(w, x, 2))


@pytest.mark.parametrize("limit", [1 << 30, 9_000])
def test_matmul_of_joined_matrices(device, b, rng, limit, monkeypatch):
    """q, k and v of other formats side by side, also divided between buffers."""
    monkeypatch.setattr(device, "binding_bytes", limit)
    names, rows = ("Q4_K", "Q4_K", "Q6_K", "F16"), (40, 13, 24, 11)
    ws = [weight(rng, by_name(n), r, 512) for n, r in zip(names, rows, strict=True)]
    x = values(rng, 5, 512)
    if limit == 9_000:
        segments = load_matrix(device, ws).segments
        assert [len(s.parts) for s in segments] == [3, 2, 2]
    expected = np.concatenate([numerics.matmul(w, x, 2) for w in ws], axis=1)
    same(multiply(device, b, ws, x, 2), expected)


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q5_0", "BF16"])
@pytest.mark.parametrize("tokens", [1, 9])
def test_matmul_of_experts(device, b, rng, name, tokens, monkeypatch):
    """Gate and up joined, each expert's pairs together, the stack divided inside an expert."""
    experts, rows, columns, k = 5, 20, 512, 3
    ws = [weight(rng, by_name(name), experts, rows, columns) for _ in range(2)]
    stack = Stack(tuple(ws))
    monkeypatch.setattr(device, "binding_bytes", stack.unit_bytes * (2 * stack.units - 1))
    x = values(rng, tokens, columns)
    z = rng.standard_normal((tokens, experts)).astype(F32)
    z[:, 3] = -100  # nobody's expert
    z[:, 0] = 5  # everybody's
    ids, expected_weights, _ = numerics.top_k(z, k)

    ops = Ops(device, 2)
    plan = b.new(5 * tokens * k + experts)
    router_weights = b.new(tokens, k)
    steps, spread = ops.top_k(
        b.put(z),
        b.new(tokens, experts),
        router_weights,
        plan,
        experts=experts,
        k=k,
        normalise=True,
        tokens=tokens,
    )
    w = load_matrix(device, ws)
    assert len(w.segments[0].parts) == 3
    y = b.new(tokens * k, 2 * rows)
    acts = b.put(packed(x, 2))
    steps += ops.matmul(w, b.put(x), 0, acts, y, items=tokens * k, experts=spread)
    device.run(steps)
    assert np.array_equal(b.get(plan, (tokens, k), np.int32), ids)
    same(b.get(router_weights, (tokens, k)), expected_weights)
    got = b.get(y, (tokens, k, 2 * rows))
    for t in range(tokens):
        for r in range(k):
            for i, one in enumerate(ws):
                expected = numerics.matmul(one.expert(ids[t, r]), x[t : t + 1], 2)[0]
                same(got[t, r, i * rows : (i + 1) * rows], expected)


def test_plan_holds_every_pair_once(device, b, rng):
    """Many tokens, uneven experts: groups of at most 8 items, all of one expert."""
    tokens, experts, k = 300, 40, 4
    z = (rng.standard_normal((tokens, experts)) + np.linspace(0, 4, experts)).astype(F32)
    plan = b.new(5 * tokens * k + experts)
    steps, spread = Ops(device, 2).top_k(
        b.put(z),
        b.new(tokens, experts),
        b.new(tokens, k),
        plan,
        experts=experts,
        k=k,
        normalise=True,
        tokens=tokens,
    )
    device.run(steps)
    words = b.get(plan, (5 * tokens * k,), np.int32)
    ids = words[: tokens * k]
    entries = words[spread.entries : spread.entries + 3 * spread.groups].reshape(-1, 3)
    found = []
    for expert, first, count in entries:
        assert 0 <= count <= 8
        items = words[first : first + count]
        assert (ids[items] == expert).all()
        found += items.tolist()
    assert sorted(found) == list(range(tokens * k))


@pytest.mark.parametrize(("experts", "k"), [(16, 4), (128, 8), (300, 64), (4, 4)])
@pytest.mark.parametrize("normalise", [True, False])
def test_router(device, b, rng, experts, k, normalise):
    z = rng.standard_normal((6, experts)).astype(F32) * 4
    z[1] = np.round(z[1])  # ties
    z[2] = 0
    z[3, experts // 2] = 500  # all others have probability 0
    z[4] = -np.abs(z[4]) - 200
    z[5] = np.where(rng.random(experts) < 0.5, F32(-0.0), F32(0))
    ids, router_weights = b.new(5 * 6 * k + experts), b.new(6, k)
    steps, _ = Ops(device, 2).top_k(
        b.put(z),
        b.new(6, experts),
        router_weights,
        ids,
        experts=experts,
        k=k,
        normalise=normalise,
        tokens=6,
    )
    device.run(steps)
    expected_ids, expected_weights, _ = numerics.top_k(z, k, normalise=normalise)
    assert np.array_equal(b.get(ids, (6, k), np.int32), expected_ids)
    same(b.get(router_weights, (6, k)), expected_weights)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_router_of_logits_that_are_not_finite(device, b, rng, broken):
    z = rng.standard_normal((2, 16)).astype(F32)
    z[0, 5] = broken
    z[1] = broken
    plan = b.new(5 * 2 * 4 + 16)
    steps, _ = Ops(device, 2).top_k(
        b.put(z),
        b.new(2, 16),
        b.new(2, 4),
        plan,
        experts=16,
        k=4,
        normalise=True,
        tokens=2,
    )
    device.run(steps)
    for ids in b.get(plan, (2, 4), np.int32):
        assert len(set(ids.tolist())) == 4
        assert ((ids >= 0) & (ids < 16)).all()


@pytest.mark.parametrize("n", [64, 256, 600, 2048])
def test_norm(device, b, rng, n, planes):
    """Alone, behind a sum, behind weighted experts, and of chosen rows."""
    rows, k = 3, 5
    x, w = values(rng, rows, n), values(rng, n)
    one, many = values(rng, rows, n), values(rng, rows, k, n)
    x[0, :7] = F32(1e-41)
    x[0, 7:14], one[0, 7:14] = F32(2e-38), F32(-1.5e-38)  # a subnormal sum
    shares = rng.random((rows, k)).astype(F32)
    chosen = np.array([2, 0, 2], np.int32)
    combined = numerics.combine(shares, many)
    cases = [
        ({}, x, None),
        ({"output": b.put(one), "outputs": 1}, x + one, one),
        (
            {"output": b.put(many), "outputs": k, "router_weights": b.put(shares)},
            x + combined,
            combined,
        ),
        ({"batch": b.put(np.r_[9, chosen].astype(np.int32)), "rows_at": 1}, x[chosen], None),
    ]
    ops, state_in, vectors = Ops(device, planes), b.put(x), b.put(np.r_[F32(7), w])
    for arguments, expected_x, expected_o in cases:
        state, acts = b.new(3, rows, n), b.new(rows, superblocks(n), ACT)
        device.run(
            [
                ops.norm(
                    state_in,
                    state,
                    vectors,
                    acts,
                    n=n,
                    rows=rows,
                    region=rows * n,
                    weight_at=1,
                    eps=EPS,
                    **arguments,
                )
            ]
        )
        h = numerics.rms_norm(expected_x, w, EPS)
        got = b.get(state, (3, rows, n))
        same(got[0], expected_x)
        same(got[1], h)
        if expected_o is not None:
            same(got[2], expected_o)
        same_acts(b.get(acts, (rows, superblocks(n), ACT), np.uint32), h, planes)


@pytest.mark.parametrize("n", [256, 600])
def test_swiglu(device, b, rng, n, planes):
    gate, up = rng.uniform(-100, 100, (4, n)).astype(F32), values(rng, 4, n)
    gate[0, :6] = [0.0, -0.0, 88.5, -88.5, 87.0, -87.0]
    gate[1, :256] = 0  # a block of zeros
    up[2, 3], up[3, 255] = np.inf, np.nan
    result, acts = b.new(4, n), b.new(4, superblocks(n), ACT)
    gate_up = b.put(np.concatenate([gate, up], axis=1))
    device.run([Ops(device, planes).swiglu(gate_up, result, acts, n=n, rows=4)])
    with np.errstate(invalid="ignore"):
        expected = numerics.silu_gate(gate, up)
    finite = np.isfinite(expected)
    got = b.get(result, (4, n))
    same(got[finite], expected[finite])
    assert not np.isfinite(got[~finite]).any()
    same_acts(b.get(acts, (4, superblocks(n), ACT), np.uint32), expected, planes)


SHAPES = [(128, 4, 2, 2), (80, 3, 1, 1), (10, 4, 4, 3), (512, 2, 1, 1)]


@pytest.mark.parametrize(("head_dim", "heads", "kv_heads", "together"), SHAPES)
def test_attention(device, b, rng, head_dim, heads, kv_heads, together, planes):
    """Two sequences on scattered pages, the second going on from a page that is in the cache.

    ``together`` key-value heads share a buffer of the cache; tiles are computed in two portions.
    """
    lengths, pages = (140, 5), np.array([[3, 0, 2], [1, 4, 2]], np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)
    sequence = np.repeat([0, 1], lengths).astype(np.int32)
    n, n_pages, tiles = len(positions), 5, 3
    qkv = values(rng, n, heads + 2 * kv_heads, head_dim)
    qkv[3, -1] = 0  # a value vector of zeros
    norms = [rng.standard_normal(head_dim).astype(F32) for _ in range(2)]
    turn = numerics.rope_table(numerics.inverse_frequencies(head_dim, 1e4), 0, 192)
    cos, sin = (t[positions] for t in turn)

    ops, h = Ops(device, planes), Heads(heads, kv_heads, head_dim)
    at = BatchAt.of(n, 2, head_dim)
    slots = pages[sequence, positions // TILE] * TILE + positions % TILE
    rows = np.array([139, 144], np.int32)
    parts = (positions, slots, sequence * 3, rows, np.concatenate([cos, sin], 1).view(np.int32))
    batch = b.put(np.concatenate([p.reshape(-1) for p in (*parts, pages)]).astype(np.int32))
    record = record_bytes(head_dim) // 4
    cache = [
        CachePart(
            b.new(n_pages, min(together, kv_heads - i), record), i, min(together, kv_heads - i)
        )
        for i in range(0, kv_heads, together)
    ]
    rope = b.new(n, heads + kv_heads, head_dim)
    queries = b.new(n, heads, 2 * words_of(head_dim) + 1)
    half = n // 2
    partial = b.new(n - half, heads, tiles, head_dim + 2)
    width = heads * head_dim
    result, acts = b.new(n, width), b.new(n, superblocks(width), ACT)
    vectors = b.put(np.concatenate(norms))
    steps = [
        ops.head_vectors(
            h,
            part,
            b.put(qkv),
            vectors,
            batch,
            rope,
            queries,
            q_norm_at=0,
            k_norm_at=head_dim,
            eps=EPS,
            at=at,
            tokens=n,
        )
        for part in cache
    ]
    for first, some in ((0, half), (half, n - half)):
        where = {"first": first, "tokens": some, "tiles": tiles}
        steps += [ops.attention(h, p, queries, batch, partial, at=at, **where) for p in cache]
        steps.append(ops.merge(h, partial, batch, result, acts, **where))
    device.run(steps)

    q, k, v = np.split(qkv, [heads, heads + kv_heads], axis=1)
    q = numerics.rope(numerics.rms_norm(q, norms[0], EPS), cos, sin)
    k = numerics.rope(numerics.rms_norm(k, norms[1], EPS), cos, sin)
    same(b.get(rope, q.shape), q)
    same(b.get(rope, k.shape, at=q.size), k)
    expected = np.empty_like(q)
    for s in (0, 1):
        mine = np.flatnonzero(sequence == s)
        for head in range(heads):
            g = head * kv_heads // heads
            ki, dk = numerics.quantise(np.ascontiguousarray(k[mine, g]), 2)
            vi, dv = numerics.quantise(np.ascontiguousarray(v[mine, g]), 2)
            expected[mine, head] = numerics.attention(
                np.ascontiguousarray(q[mine, head]),
                positions[mine],
                ki.astype(np.int16),
                dk,
                vi.astype(np.int16),
                dv,
            )
    expected = expected.reshape(n, width)
    same(b.get(result, (n, width)), expected)
    same_acts(b.get(acts, (n, superblocks(width), ACT), np.uint32), expected, planes)


def test_formats_without_shaders_are_refused(device):
    for fmt in FORMATS.values():
        if not readable(fmt):
            w = Weight("blk.0.w", fmt, (8, 256), np.zeros(8 * fmt.nbytes(256), np.uint8))
            with pytest.raises(BackendUnavailable, match=rf"blk\.0\.w: .* got {fmt.name}; the cpu"):
                load_matrix(device, [w])
