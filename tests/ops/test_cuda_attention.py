"""Attention of many tokens on tensor cores against the specification: emulated, and on a GPU if
any. What no token has stored is anything, and outputs lie between sentinels."""

import itertools

import numpy as np
import pytest

from isobit import numerics
from isobit.backends.cuda.ops import attention
from isobit.numerics import KV_PAGE

from .cuda_support import F32, Buffers, open_gpu, same

HEAD = 128


@pytest.fixture(params=["emulated", "cuda"])
def gpu(request):
    device = open_gpu(request.param)
    if request.param == "emulated":
        device.warpgroups = True
    yield device
    device.close()


def vectors(rng, count, heads):
    """Fixed-point head vectors and scales: some of the largest integers, of zeros, of no scale."""
    q = rng.integers(-32639, 32640, (count, heads, HEAD))
    kind = rng.random((count, heads))
    q[kind < 0.2] = np.sign(q[kind < 0.2]) * 32639
    q[(kind > 0.2) & (kind < 0.3)] = 32639
    q[(kind > 0.3) & (kind < 0.4)] = -32639
    q[(kind > 0.4) & (kind < 0.5)] = 0
    d = (10 ** rng.uniform(-6, -3, (count, heads))).astype(F32)
    d[rng.random((count, heads)) < 0.05] = 0
    return q.astype(np.int16), d


def slot(j):
    """Where a position of a tile lies among values (cache.cuh)."""
    return (j & ~15) | (j & 6) << 1 | (j & 8) >> 2 | (j & 1)


def cached(rng, sequences, kv_heads):
    """Caches of all sequences' vectors on pages in any order, and each sequence's pages."""
    used = [-(-len(k[0]) // KV_PAGE) for k, _ in sequences]
    pages = rng.permutation(sum(used) + 1).astype(np.int32)
    tables = np.split(pages[:-1], np.cumsum(used)[:-1])
    k = rng.integers(-128, 128, (len(pages), kv_heads, 2, KV_PAGE, HEAD), np.int8)
    v = rng.integers(-128, 128, (len(pages), kv_heads, 2, HEAD, KV_PAGE), np.int8)
    dk, dv = (np.full((len(pages), kv_heads, KV_PAGE), np.nan, F32) for _ in range(2))
    for table, (keys, values) in zip(tables, sequences, strict=True):
        for j in range(len(keys[0])):
            page, at = table[j // KV_PAGE], j % KV_PAGE
            for plane in (0, 1):
                k[page, :, plane, at] = numerics.planes_of(keys[0][j].astype(np.int32), 2)[plane]
                one = numerics.planes_of(values[0][j].astype(np.int32), 2)[plane]
                v[page, :, plane, :, slot(at)] = one
            dk[page, :, at], dv[page, :, at] = keys[1][j], values[1][j]
    return (k, v, dk, dv), tables


@pytest.mark.parametrize("kernel", ["attention_mma", "attention_wgmma", "attention_wgmma in turns"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "parts"),
    [
        (8, 1, [(0, 40)]),
        (10, 2, [(100, 30), (0, 3)]),
        (4, 4, [(60, 70)]),
        (16, 1, [(190, 20)]),
        (3, 1, [(580, 43)]),  # more tiles than are held, twice; the last span is one token
    ],
)
def test_many_tokens(gpu, rng, kernel, heads, kv_heads, parts):
    sequences = [[vectors(rng, first + n, kv_heads) for _ in "kv"] for first, n in parts]
    cache, tables = cached(rng, sequences, kv_heads)
    tokens = sum(n for _, n in parts)
    q = rng.standard_normal((tokens, heads, HEAD)) * 10 ** rng.uniform(-1, 3, (tokens, heads, 1))
    q = q.astype(F32)
    q[rng.random((tokens, heads)) < 0.1] = 0
    q_int, dq = numerics.quantise(q, 2)
    dq = dq * numerics.attention_scale(HEAD)
    each = max(map(len, tables))
    pages = np.zeros((len(parts), each), np.int32)
    for row, table in zip(pages, tables, strict=True):
        row[: len(table)] = table
    positions = np.concatenate([np.arange(f, f + n) for f, n in parts]).astype(np.int32)
    sequence = np.repeat(np.arange(len(parts)), [n for _, n in parts]).astype(np.int32)
    buffers = Buffers(gpu)
    out = buffers.new(4 * q.size)
    ways = {way.kernel: way for way in attention.ways(heads, kv_heads, HEAD, gpu)}
    turns = ((f"{k} in turns", attention.in_turns(way)) for k, way in ways.items())
    ways |= {k: way for k, way in turns if way}
    if kernel not in ways:
        pytest.skip("not run: this GPU has no products of warpgroups")
    way = ways[kernel]
    starts = np.cumsum([0, *(n for _, n in parts)])
    first = [range(s, e, way.span) for s, e in itertools.pairwise(starts)]
    count = [min(way.span, r.stop - s) for r in first for s in r]
    first = [s for r in first for s in r]
    put = buffers.put
    gpu.launch(
        f"ops/{way.kernel}",
        way.kernel,
        (kv_heads, len(first), way.blocks),
        (put(q_int.astype(np.int16)), put(dq), put(positions), put(sequence), put(pages), each)
        + (put(np.int32(first)), put(np.int32(count)), heads, *map(put, cache), kv_heads, HEAD)
        + (out, 0, *way.apart),
        shared=way.shared,
        defines={"PLANES": "2"} | {k: str(v) for k, v in way.defines.items()},
    )
    got = buffers.get(out, q.shape)
    buffers.check()
    for s, (keys, values) in enumerate(sequences):
        rows = sequence == s
        for h in range(heads):
            g = h // (heads // kv_heads)
            of = keys[0][:, g], keys[1][:, g], values[0][:, g], values[1][:, g]
            expected = numerics.attention(
                q[rows, h], positions[rows], *map(np.ascontiguousarray, of)
            )
            same(got[rows, h], expected)
