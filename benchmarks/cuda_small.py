"""Time the operations between matrix products on the GPU, each alone; bits first.

usage: python benchmarks/cuda_small.py OUT [ONLY]

Geometry of Qwen3-30B-A3B. Each launch is timed in a graph of 20 of them, as prompts run it (one
after the other) and as steps do (overlapped), beside what reading and writing its bytes once would
take at 4.2 TB/s. OUT: a folder. ONLY: a part of an operation's name.
"""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
from cuda_graphs import milliseconds
from synthetic import MODELS

from isobit import numerics
from isobit.backends.cuda.device.gpu import CudaGpu
from isobit.backends.cuda.device.layout import ACT_BYTES
from isobit.backends.cuda.ops import attention, rms_norm
from isobit.backends.cuda.ops import top_k as topk
from isobit.numerics import KV_PAGE

F32, I32 = np.float32, np.int32
SIZES = 8, 64, 512, 2048
A3B, _ = MODELS["30b-a3b"]
HIDDEN, EXPERTS, K, FFN = A3B.hidden, A3B.n_experts, A3B.n_experts_used, A3B.ffn
HEADS, KV_HEADS, HEAD = A3B.n_heads, A3B.n_kv_heads, A3B.head_dim
LAUNCHES, RATE, CHECKED = 20, 4.2e6, 24  # bytes a microsecond; rows compared with the specification
EPS = F32(1e-6)


class Device:
    """Arrays on the GPU, and launches to be timed."""

    def __init__(self):
        self.gpu, self.held, self.results = CudaGpu(), [], []

    def put(self, values):
        self.held.append(self.gpu.allocate(values.nbytes))
        self.gpu.upload(self.held[-1], values)
        return self.held[-1]

    def new(self, nbytes):
        """For results."""
        self.held.append(self.gpu.allocate(nbytes))
        self.results.append((self.held[-1], nbytes))
        return self.held[-1]

    def clear(self):
        """Overwrite what is there of results."""
        for address, nbytes in self.results:
            self.gpu.upload(address, np.full(nbytes, 0x5B, np.uint8))

    def get(self, address, shape, dtype=F32):
        out = np.empty(shape, dtype)
        self.gpu.download(address, out)
        return out

    def free(self):
        while self.held:
            self.gpu.free(self.held.pop())
        self.results = []

    def launch(self, kernel, grid, arguments, shared=0, overlap=False, **defines):
        file, _, entry = kernel.partition(".")
        texts = {"PLANES": "2"} | {name: str(v) for name, v in defines.items()}
        entry = entry or file.rpartition("/")[2]
        how = {"shared": shared, "defines": texts, "overlap": overlap}
        self.gpu.launch(file, entry, grid, arguments, **how)

    def microseconds(self, queue):
        """Of one of the launches in a graph, the median."""
        graph = self.gpu.capture(lambda: [queue() for _ in range(LAUNCHES)])
        return 1e3 * milliseconds(self.gpu, graph) / LAUNCHES


def acts_agree(blocks, x):
    """Whether blocks of rows are x quantised: planes, sums and scale."""
    rows, supers = x.shape[0], -(-x.shape[1] // 256)
    blocks = blocks.reshape(rows, supers, ACT_BYTES)
    q, d = numerics.quantise_rows(x, 2)
    q = q.reshape(rows, supers, 256).astype(I32)
    planes = [p.reshape(rows, supers, 256) for p in numerics.planes_of(q, 2)]
    got = [blocks[..., 256 * p : 256 * (p + 1)].view(np.int8) for p in (0, 1)]
    sums = np.ascontiguousarray(blocks[..., 544:576]).view(I32)
    scale = np.ascontiguousarray(blocks[..., 536:540]).view(F32)[..., 0]
    return (
        all(np.array_equal(a, b) for a, b in zip(got, planes, strict=True))
        and np.array_equal(sums, q.reshape(rows, supers, 8, 32).sum(-1))
        and same(scale, d.reshape(scale.shape))
    )


def same(a, b):
    return np.array_equal(a.view(np.uint32), np.ascontiguousarray(b).view(np.uint32))


def some(n):
    """Rows to compare: the first and the last."""
    return np.unique(np.r_[: min(n, CHECKED // 2), max(0, n - CHECKED // 2) : n])


# Each gives its ways to launch by name, a check, and the bytes it reads and writes. A check is a
# generator: it goes before a launch, and then says whether the results are right.


def norm(at, rng, n, experts):
    added = K if experts else 1
    x, more, w = floats(rng, n, HIDDEN), floats(rng, n, added, HIDDEN), floats(rng, HIDDEN)
    shares = rng.random((n, added)).astype(F32)
    y, acts, place = at.new(4 * n * HIDDEN), at.new(n * HIDDEN // 256 * ACT_BYTES), at.put(x)
    by = at.put(shares) if experts else 0
    arguments = place, at.put(more), by, 0, 0, 0, at.put(w), float(EPS), y, acts, 0, 0, 0
    how = dict(rms_norm.defines(HIDDEN, added, weighted=experts))
    few = how.pop("AT_ONCE")

    def check():
        at.gpu.upload(place, x)
        yield
        rows = some(n)
        z = x + (numerics.combine(shares, more) if experts else more[:, 0])
        expected = numerics.rms_norm(z[rows], w, EPS)
        blocks = at.get(acts, (n, HIDDEN // 256, ACT_BYTES), np.uint8)[rows]
        yield (
            same(at.get(place, x.shape), z)
            and same(at.get(y, x.shape)[rows], expected)
            and acts_agree(blocks, expected)
        )

    def way(**more):
        return lambda **o: at.launch("ops/norm_quantise", (n,), arguments, **how, **more, **o)

    return {"": way(AT_ONCE=few)}, check, n * (4 * HIDDEN * (3 + added) + HIDDEN // 256 * 696)


def router(at, rng, n):
    w, x = floats(rng, EXPERTS, HIDDEN), floats(rng, n, HIDDEN)
    y = at.new(4 * n * EXPERTS)
    weights, inputs = at.put(w), at.put(x)

    def check():
        yield
        rows = some(n)
        lanes = np.zeros((len(rows), EXPERTS, 256), F32)
        for k in range(0, HIDDEN, 256):
            lanes = lanes + w[None, :, k : k + 256] * x[rows, None, k : k + 256]
        while lanes.shape[-1] > 1:
            half = lanes.shape[-1] // 2
            lanes = lanes[..., :half] + lanes[..., half:]
        yield same(at.get(y, (n, EXPERTS))[rows], lanes[..., 0])

    def way(rows, filled, **more):
        blocks = EXPERTS // (2 * rows)
        each = -(-n // max(1, filled * at.gpu.multiprocessors // blocks))
        arguments = weights, inputs, HIDDEN, n, each, y, EXPERTS, EXPERTS, 0
        how = {"WEIGHT": "KIND_F32", "ROWS": rows, "SUPERS": HIDDEN // 256, "TOGETHER": 2}
        how["shared"] = 8192 * rows + 4096 * (HIDDEN // 256)
        grid = blocks, -(-n // each)
        return lambda **o: at.launch("ops/matmul_dense", grid, arguments, **how, **more, **o)

    ways = {"": way(8, 1), "4 rows": way(4, 1)}
    return ways, check, 4 * (EXPERTS * HIDDEN + n * (HIDDEN + EXPERTS))


def experts(at, rng, n):
    z = floats(rng, n, EXPERTS) * F32(3)
    ids, weights = at.new(4 * n * K), at.new(4 * n * K)
    order, offset, groups = at.new(4 * n * K), at.new(4 * (EXPERTS + 1)), at.new(16 * (n * K + 1))
    logits = at.put(z)
    places = order, offset, groups, at.new(4), 8
    chosen = logits, n, EXPERTS, K, 1, 1, 0, 1, 1, ids, weights
    parts = {"PARTS": EXPERTS // 32}
    blocks, words = topk.sorting(n, EXPERTS)

    def check():
        yield
        wanted, by, _ = numerics.top_k(z, K, normalise=True)
        counts = np.cumsum(np.bincount(wanted.reshape(-1), minlength=EXPERTS))
        yield (
            np.array_equal(at.get(ids, (n, K), I32), wanted)
            and same(at.get(weights, (n, K)), by)
            and np.array_equal(
                at.get(order, (n * K,), I32), np.argsort(wanted.reshape(-1), kind="stable")
            )
            and np.array_equal(at.get(offset, (EXPERTS + 1,), I32), [0, *counts])
        )

    def top_k(**o):
        at.launch("ops/top_k.router_top_k", (-(-n // 8),), chosen, **parts, **o)

    def sort(**o):
        arguments = ids, n, K, EXPERTS, *places
        at.launch("ops/top_k.sort_pairs", (blocks,), arguments, shared=4 * words, **parts, **o)

    def both(**o):
        top_k(**o)
        sort(**o)

    ways = {"": both, "only top k": top_k, "only sort": sort}
    return ways, check, 4 * n * (EXPERTS + 4 * K)


def swiglu(at, rng, n):
    rows = n * K
    gate, up = floats(rng, rows, FFN), floats(rng, rows, FFN)
    acts = at.new(rows * FFN // 256 * ACT_BYTES)
    arguments = at.put(gate), at.put(up), FFN, rows, acts

    def check():
        yield
        at_rows = some(rows)
        blocks = at.get(acts, (rows, FFN // 256, ACT_BYTES), np.uint8)[at_rows]
        yield acts_agree(blocks, numerics.silu_gate(gate[at_rows], up[at_rows]))

    def way(**o):
        grid = (-(-rows * (FFN // 256) // 8),)
        at.launch("ops/silu_gate.swiglu_quantise", grid, arguments, **o)

    return {"": way}, check, rows * (8 * FFN + FFN // 256 * 696)


def quantise(at, rng, n):
    width = HEADS * HEAD
    x = floats(rng, n, width)
    acts = at.new(n * width // 256 * ACT_BYTES)
    arguments = at.put(x), width, width, 1, width, n, acts, 0, 0

    def check():
        yield
        rows = some(n)
        yield acts_agree(
            at.get(acts, (n, width // 256, ACT_BYTES), np.uint8)[rows],
            np.ascontiguousarray(x[rows]),
        )

    def way(**o):
        at.launch("ops/quantise", (-(-n * (width // 256) // 8),), arguments, **o)

    return {"": way}, check, n * (4 * width + width // 256 * 696)


class Prompt:
    """Head vectors of a prompt's tokens, on the GPU and as the specification has them."""

    def __init__(self, at, rng, n):
        self.at, self.n, self.pages, every = at, n, -(-n // KV_PAGE), HEADS + 2 * KV_HEADS
        self.qkv, self.norms = floats(rng, n, every, HEAD), [floats(rng, HEAD) for _ in range(2)]
        self.turns = numerics.rope_table(numerics.inverse_frequencies(HEAD, 1e6), 0, n)
        self.q_int, self.dq = at.new(2 * n * HEADS * HEAD), at.new(4 * n * HEADS)
        self.cache = [at.new(2 * self.pages * KV_HEADS * KV_PAGE * HEAD) for _ in range(2)]
        self.cache += [at.put(np.zeros(self.pages * KV_HEADS * KV_PAGE, F32)) for _ in range(2)]
        where = np.arange(n, dtype=I32), np.zeros(n, I32), np.arange(self.pages, dtype=I32)
        self.where = [*map(at.put, where), self.pages]
        arguments = at.put(self.qkv), *map(at.put, self.norms), float(EPS)
        arguments += (*map(at.put, self.turns), *self.where, float(numerics.attention_scale(HEAD)))
        self.arguments = *arguments, self.q_int, self.dq, *self.cache, n

    def store(self, **o):
        how = {"HEADS": HEADS, "KV_HEADS": KV_HEADS, "HEAD_DIM": HEAD}
        blocks = -(-self.n * (HEADS + 2 * KV_HEADS) // 8)
        self.at.launch("fusions/head_vectors", (blocks,), self.arguments, **how, **o)

    def heads(self, rows):
        """q, k and v, normed and rotated."""
        cos, sin = (t[rows] for t in self.turns)
        q, k, v = np.split(self.qkv[rows], [HEADS, HEADS + KV_HEADS], axis=1)
        return *(
            numerics.rope(numerics.rms_norm(a, w, EPS), cos, sin)
            for a, w in zip((q, k), self.norms, strict=True)
        ), v


def head_vectors(at, rng, n):
    prompt = Prompt(at, rng, n)

    def check():
        yield
        rows = some(n)
        (qi, _), (ki, dk), (vi, dv) = (
            numerics.quantise(np.ascontiguousarray(a), 2) for a in prompt.heads(rows)
        )
        page, slot = rows // KV_PAGE, rows % KV_PAGE
        shape = prompt.pages, KV_HEADS, 2
        keys = at.get(prompt.cache[0], (*shape, KV_PAGE, HEAD), np.int8).astype(I32)
        keys = (256 * keys[:, :, 0] + keys[:, :, 1])[page, :, slot]
        place = (slot & ~15) | (slot & 6) << 1 | (slot & 8) >> 2 | (slot & 1)
        values = at.get(prompt.cache[1], (*shape, HEAD, KV_PAGE), np.int8).astype(I32)
        values = (256 * values[:, :, 0] + values[:, :, 1])[page, :, :, place]
        scales = (
            at.get(c, (prompt.pages, KV_HEADS, KV_PAGE))[page, :, slot] for c in prompt.cache[2:]
        )
        yield (
            np.array_equal(at.get(prompt.q_int, (n, HEADS, HEAD), np.int16)[rows], qi)
            and np.array_equal(keys, ki)
            and np.array_equal(values, vi)
            and all(same(a, b.reshape(a.shape)) for a, b in zip(scales, (dk, dv), strict=True))
        )

    return {"": prompt.store}, check, n * HEAD * 6 * (HEADS + 2 * KV_HEADS)


def attend(at, rng, n):
    prompt, out = Prompt(at, rng, n), at.new(4 * n * HEADS * HEAD)
    group = HEADS // KV_HEADS

    def check():
        prompt.store()
        yield
        rows = some(n)
        got = at.get(out, (n, HEADS, HEAD))[rows]
        q, k, v = prompt.heads(np.arange(n))
        right = True
        for h in (0, HEADS - 1):
            keys, values = (np.ascontiguousarray(a[:, h // group]) for a in (k, v))
            (ki, dk), (vi, dv) = numerics.quantise(keys, 2), numerics.quantise(values, 2)
            cached = ki.astype(np.int16), dk, vi.astype(np.int16), dv
            mine = np.ascontiguousarray(q[rows, h])
            right &= same(got[:, h], numerics.attention(mine, rows.astype(I32), *cached))
        yield right

    def launch(way, **o):
        first = np.arange(0, n, way.span, dtype=I32)
        if way.span not in spans:
            spans[way.span] = [*map(at.put, (first, np.minimum(way.span, n - first).astype(I32)))]
        arguments = prompt.q_int, prompt.dq, *prompt.where, *spans[way.span], HEADS
        arguments += (*prompt.cache, KV_HEADS, HEAD, out, 0, *way.apart)
        grid = KV_HEADS, len(first), way.blocks
        at.launch(f"ops/{way.kernel}", grid, arguments, way.shared, **way.defines, **o)

    spans = {}
    every = attention.ways(HEADS, KV_HEADS, HEAD, at.gpu)
    ways = {way.kernel: partial(launch, way) for way in every}
    return ways, check, n * HEAD * 6 * (HEADS + KV_HEADS)


def floats(rng, *shape):
    return rng.standard_normal(shape, dtype=F32)


CASES = {
    "norm_quantise of a sum": lambda *a: norm(*a, experts=False),
    "norm_quantise of experts": lambda *a: norm(*a, experts=True),
    "router product": router,
    "top k and sort": experts,
    "swiglu_quantise": swiglu,
    "quantise": quantise,
    "head_vectors": head_vectors,
    "attention_mma": attend,
}


def main():
    out, only = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""
    out.mkdir(parents=True, exist_ok=True)
    seed = np.random.SeedSequence().entropy
    rng, at, wrong, rows = np.random.default_rng(seed), Device(), [], []
    for name, case in CASES.items():
        for n in SIZES:
            if only not in name or (name == "attention_mma" and n < 64):
                continue
            ways, check, nbytes = case(at, rng, n)
            for way, launch in ways.items():
                if not way.startswith("only"):
                    at.clear()
                    checking = check()
                    next(checking)
                    launch()
                    if not next(checking):
                        wrong.append(f"{name}, {n} tokens, {way}")
                both = [at.microseconds(lambda o=o: launch(overlap=o)) for o in (False, True)]
                rows.append([name, n, way, *both, nbytes / RATE])
                print(f"{name:<26}{way:<22}{n:>6}" + "".join(f"{t:9.2f}" for t in rows[-1][3:]))
            at.free()
    columns = ["operation", "tokens", "way", "us", "us overlapped", "us of its bytes"]
    found = {"device": at.gpu.name, "seed": str(seed), "wrong": wrong, "columns": columns}
    (out / "cuda_small.json").write_text(json.dumps(found | {"rows": rows}, indent=1) + "\n")
    print("columns: operation, way, tokens, us one after the other, us overlapped, us of its bytes")
    print("bits differ from the specification: " + "; ".join(wrong) if wrong else "all bits agree")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
