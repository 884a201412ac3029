"""Kernels of attention of many tokens on tensor cores: bits, then microseconds, then prompts.

usage: python benchmarks/cuda_attention.py OUT [--layers 48] [--profile KERNEL,...]

Geometry of Qwen3-30B-A3B. Some of each kernel's outputs are compared with the specification, and
all with the first's: random vectors, and such of the largest, smallest and no values. Then each is
timed at several depths, and in whole prompts. OUT: a folder for cuda_attention.json; the exit code
is 1 if a bit differs.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import synthetic
from batches import batch
from cuda.bindings import driver
from cuda_graphs import milliseconds, ok
from kernels import asked, compile_all

from isobit import numerics
from isobit.backends.cuda import CudaBackend
from isobit.backends.cuda.device.gpu import CudaGpu
from isobit.backends.cuda.ops import attention
from isobit.config import EngineConfig
from isobit.numerics import KV_PAGE

A3B, _ = synthetic.MODELS["30b-a3b"]
HEADS, KV_HEADS, HEAD = A3B.n_heads, A3B.n_kv_heads, A3B.head_dim
TIMED = [(n, depth) for n in (512, 2048) for depth in (0, 2048, 13952)]
PROMPTS = {512: 9, 2048: 5, 4096: 5, 16384: 3}  # tokens: times
F32 = np.float32


class Case:
    """Tokens behind some others, on the GPU: random vectors, or with edges some of extremes."""

    def __init__(self, gpu, rng, n, depth, *, edges=False):
        self.gpu, self.n, self.held = gpu, n, []
        keys = depth + n
        self.positions = np.arange(depth, keys, dtype=np.int32)
        q, d = vectors(rng, n, HEADS, edges=edges)
        self.q = q * d[..., None]
        q_int, dq = numerics.quantise(self.q, 2)
        self.k, self.dk = vectors(rng, keys, KV_HEADS, edges=edges)
        self.v, self.dv = vectors(rng, keys, KV_HEADS, edges=edges)
        pages = -(-keys // KV_PAGE)
        table = rng.permutation(pages).astype(np.int32)
        whole = pages * KV_PAGE
        k, v = (np.zeros((whole, KV_HEADS, HEAD), np.int16) for _ in "kv")
        dk, dv = (np.full((whole, KV_HEADS), np.nan, F32) for _ in "kv")
        for to, of in ((k, self.k), (v, self.v), (dk, self.dk), (dv, self.dv)):
            to[:keys] = of
        j = np.arange(KV_PAGE)
        slot = (j & ~15) | (j & 6) << 1 | (j & 8) >> 2 | (j & 1)
        by_slot = np.empty_like(j)
        by_slot[slot] = j

        def paged(x):
            out = np.empty((pages, *x.shape[1:]), x.dtype)
            out[table] = x
            return np.ascontiguousarray(out)

        def planes(x, order):  # [page][key][head][value] to [page][head][plane][...]
            two = np.stack(numerics.planes_of(x.astype(np.int32), 2)).astype(np.int8)
            return paged(two.transpose(1, *order))

        shape = pages, KV_PAGE, KV_HEADS
        cache = [
            planes(k.reshape(*shape, HEAD), (3, 0, 2, 4)),
            planes(v.reshape(*shape, HEAD)[:, by_slot], (3, 0, 4, 2)),
            *(paged(d.reshape(shape).transpose(0, 2, 1)) for d in (dk, dv)),
        ]
        where = self.positions, np.zeros(n, np.int32), table
        asked = q_int.astype(np.int16), dq * numerics.attention_scale(HEAD)
        self.asked = *map(self.put, (*asked, *where)), pages
        self.cache = [*map(self.put, cache)]
        self.out = self.new(4 * n * HEADS * HEAD)
        self.spans = {}

    def put(self, values):
        address = self.new(values.nbytes)
        self.gpu.upload(address, values)
        return address

    def new(self, nbytes):
        self.held.append(self.gpu.allocate(nbytes))
        return self.held[-1]

    def free(self):
        for address in self.held:
            self.gpu.free(address)

    def launch(self, way):
        if way.span not in self.spans:
            first = np.arange(0, self.n, way.span, dtype=np.int32)
            count = np.minimum(way.span, self.n - first).astype(np.int32)
            self.spans[way.span] = self.put(first), self.put(count)
        spans = self.spans[way.span]
        self.gpu.launch(
            f"ops/{way.kernel}",
            way.kernel,
            (KV_HEADS, -(-self.n // way.span), way.blocks),
            (*self.asked, *spans, HEADS, *self.cache, KV_HEADS, HEAD, self.out, 0, *way.apart),
            shared=way.shared,
            defines=defines(way),
        )

    def outputs(self, way):
        """Bit patterns."""
        out = np.full((self.n, HEADS, HEAD), 0x5B5B5B5B, np.uint32)
        self.gpu.upload(self.out, out)
        self.launch(way)
        self.gpu.download(self.out, out)
        return out

    def wrong(self, out):
        """Values of some rows and heads that are not the specification's."""
        rows, count = np.unique(np.r_[:12, self.n - 12 : self.n]), 0
        for h in (0, 3, HEADS - 1):
            of = (a[:, h // (HEADS // KV_HEADS)] for a in (self.k, self.dk, self.v, self.dv))
            expected = numerics.attention(
                np.ascontiguousarray(self.q[rows, h]),
                self.positions[rows],
                *map(np.ascontiguousarray, of),
            )
            count += np.count_nonzero(out[rows, h] != expected.view(np.uint32))
        return int(count)


def defines(way):
    """Definitions of a launch."""
    return {"PLANES": "2"} | {k: str(v) for k, v in way.defines.items()}


def vectors(rng, count, heads, *, edges):
    """16-bit integers and scales of head vectors."""
    q = rng.integers(-32639, 32640, (count, heads, HEAD)).astype(np.int16)
    d = np.full((count, heads), 1 / 19000, F32)  # scores of spread 1
    if edges:
        kind = rng.random((count, heads))
        q[kind < 0.3] = np.sign(q[kind < 0.3]) * 32639
        q[(kind > 0.3) & (kind < 0.4)] = 32639
        q[(kind > 0.4) & (kind < 0.5)] = -32639
        q[(kind > 0.5) & (kind < 0.6)] = 0
        d *= (10 ** rng.uniform(-3, 1, d.shape)).astype(F32)
        d[rng.random(d.shape) < 0.05] = 0
    return q, d


def checks(gpu, rng, ways, note):
    """How many values of each way are not the specification's, or not the first's."""
    wrong = 0
    for n, depth, edges in ((96, 0, True), (200, 1000, True), (300, 37, False), (2048, 3000, True)):
        case = Case(gpu, rng, n, depth, edges=edges)
        found = {name: case.outputs(way) for name, way in ways.items()}
        expected = next(iter(found.values()))
        beside = {name: int(np.count_nonzero(out != expected)) for name, out in found.items()}
        beside["specification"] = case.wrong(expected)
        case.free()
        note(f"{n} tokens behind {depth}{', edges' * edges}: values that differ", beside)
        wrong += sum(beside.values())
    return wrong


def times(gpu, rng, ways, note):
    """Microseconds of a launch, by way."""
    found = {}
    for n, depth in TIMED:
        case, launches = Case(gpu, rng, n, depth), 4 if depth else 20
        found[n, depth] = us = {}
        for name, way in (*ways.items(), *ways.items()):
            graph = gpu.capture(lambda way=way: [case.launch(way) for _ in range(launches)])
            took = 1e3 * milliseconds(gpu, graph, 7) / launches
            us[name] = min(took, us.get(name, took))
        note(f"{n} tokens behind {depth}, us", us)
        case.free()
    return found


def prompts(layers, ways, note):
    """Tokens a second of whole prompts; how many ways have other logits than the first."""
    weights = synthetic.weights("30b-a3b", layers)
    engine = EngineConfig(context=max(PROMPTS) + 64, max_sequences=1, chunk=2048)
    tokens = np.random.default_rng(5).integers(0, weights.config.vocab, max(PROMPTS))
    pages = np.arange(-(-engine.context // KV_PAGE), dtype=np.int32)[None]
    digests = []
    for name, way in ways.items():
        attention.ways, gpu = lambda *_, way=way: iter([way]), CudaGpu()
        compile_all(asked(weights, engine, gpu), gpu.arch)
        backend = CudaBackend(weights, engine, gpu)
        rates, logits = {}, []
        for n, repeats in PROMPTS.items():
            work, seconds = batch(tokens[:n], 0, pages, [n - 1]), []
            for _ in range(repeats):
                start = time.perf_counter()
                out = backend.forward(work)
                seconds.append(time.perf_counter() - start)
            logits.append(hashlib.sha256(np.array(out).tobytes()).hexdigest())
            rates[n] = [round(n / s) for s in sorted(seconds)]
        note(f"{name}: tokens a second of prompts", rates)
        digests.append(logits)
        backend.close()
    return sum(d != digests[0] for d in digests)


def local_bytes(gpu):
    """What a thread of each kernel that ran has spilled, and its registers."""
    kinds = driver.CUfunction_attribute
    for (name, _, _, stem, *defines), (kernel, _) in gpu._kernels.items():
        if "attention_" in stem:
            function = ok(driver.cuKernelGetFunction(kernel.handle))
            used = [
                ok(driver.cuFuncGetAttribute(kind, function))
                for kind in (
                    kinds.CU_FUNC_ATTRIBUTE_NUM_REGS,
                    kinds.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES,
                )
            ]
            print(name, dict(defines), "registers, local bytes:", used)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("out")
    p.add_argument("--commit", default="")
    p.add_argument("--layers", type=int, default=48)
    p.add_argument("--profile", help="only launch these, commas between, once each")
    a = p.parse_args()
    out, begin, gpu = Path(a.out), time.perf_counter(), CudaGpu()
    out.mkdir(parents=True, exist_ok=True)
    seed = np.random.SeedSequence().entropy
    rng, found = (
        np.random.default_rng(seed),
        {"device": gpu.name, "commit": a.commit, "seed": str(seed)},
    )

    def note(name, value):
        found[name] = value
        print(f"{time.perf_counter() - begin:6.1f} s  {name}: {value}", flush=True)
        (out / "cuda_attention.json").write_text(json.dumps(found, indent=1) + "\n")

    ways = {way.kernel: way for way in attention.ways(HEADS, KV_HEADS, HEAD, gpu)}
    kernels = {(f"ops/{w.kernel}", tuple(sorted(defines(w).items()))) for w in ways.values()}
    compile_all(kernels, gpu.arch)
    if a.profile:
        case = Case(gpu, rng, 2048, 2048)
        for name in a.profile.split(","):
            case.outputs(ways[name])
        return
    wrong = checks(gpu, rng, ways, note)
    local_bytes(gpu)
    us = times(gpu, rng, ways, note)
    if a.layers:
        wrong += prompts(a.layers, ways, note)
    for (n, depth), u in us.items():
        print(f"{n:>6} behind {depth:<7}" + "".join(f"{t:10.1f}" for t in u.values()))
    print("columns:", ", ".join(ways))
    note("bits that differ", wrong)
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
