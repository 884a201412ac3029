"""Check and time the CUDA backend on a model: logits against the reference, decode, prefill.

usage: python benchmarks/cuda_decode.py MODEL.gguf OUT.json [--reference TOKENS] [--context N]
                                        [--depths 0,128,...] [--sequences 8,32]
"""

import argparse
import json
import time
from collections import defaultdict
from itertools import cycle
from pathlib import Path

import numpy as np
from batches import batch, origin
from cuda_graphs import milliseconds

from isobit.backends.cuda import CudaBackend
from isobit.backends.cuda.device.gpu import CudaGpu
from isobit.backends.cuda.fusions.step_attention import FEW_TILES
from isobit.backends.reference import ReferenceBackend
from isobit.config import EngineConfig
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights


class Recorder(CudaGpu):
    """Remembers launches while it captures, so that parts of a step can be timed apart."""

    def __init__(self):
        super().__init__()
        self.recorded = None
        self.steps = []
        self.routers = None  # that layers guess with in turn, if not with their own
        self.timeline = 0  # where kernels note their times

    def launch(self, *a, **k):
        if a[1] == "decode_attn_out" and self.routers is not None:
            a = (*a[:3], (*a[3][:7], next(self.routers), *a[3][8:]))
        if self.timeline and a[0].startswith("fusions/decode/"):
            k["defines"] = dict(k["defines"]) | {"TIMELINE": hex(self.timeline) + "ull"}
        if self.recorded is not None and self._queues:
            self.recorded.append((a, k))
        super().launch(*a, **k)

    def capture(self, queue):
        self.recorded = []
        graph = super().capture(queue)
        self.steps.append(self.recorded)
        self.recorded = None
        return graph


POINTS = ("start", "waited", "prologue", "products", "experts", "end")
KERNELS = ("qkv", "attn_out", "router", "gate_up", "down", "head", "attention", "merge")


def timeline(gpu, decoder, pages, position):
    """Print when block 0 of each kernel of the last layer passed each point of it."""
    gpu.timeline = buffer = gpu.allocate(1 << 20)
    graph = CudaGpu.capture(gpu, lambda: queue(decoder, many=position >= 64 * FEW_TILES))
    gpu.timeline = 0
    for _ in range(3):
        gpu.upload(buffer, np.zeros(80 * 256, np.uint64))
        begin_at(decoder, position, pages)
        gpu.replay(graph)
        out = np.empty((80, 256), np.uint64)
        gpu.download(buffer, out)
    begin = int(out[1][out[1] > 0].min())  # qkv has waited
    rows = []
    for k, times in enumerate(out):
        t = np.sort(times[times > 0].astype(np.int64)) - begin
        if t.size:
            rows.append((int(t[len(t) // 2]), int(t[0]), int(t[-1]), t.size, k))
    print(f"position {position}, ns: first, median, last block")
    for median, first, last, n, k in sorted(rows):
        name = f"{KERNELS[k // 10]} {POINTS[k % 10]}"
        print(f"  {first:7d} {median:7d} {last:7d}  {name:20s} {n} blocks")


def queue(decoder, *, many):
    """Queue a step."""
    decoder._queue(decoder._pass(many=many))


def begin_at(decoder, position, pages):
    """Set a step up."""
    one = np.ones(1, np.int32)
    decoder._set(one, position * one, pages, 0 * one)
    decoder._count()


def guesses(gpu, decoder, c):
    """Of the experts that the last step chose, the part that it had guessed."""
    words = np.empty((c.n_layers, 1 + c.n_experts), np.uint64)
    chosen = np.empty((c.n_layers, c.n_experts_used), np.uint64)
    for name, rows in (("prediction", words), ("chosen", chosen)):
        slots = [s for s in decoder._g.slots if s.name == name]
        for slot, row in zip(slots, rows, strict=True):
            gpu.download(slot.address, row)
    logits = (words[:, 1:] >> np.uint64(32)).astype(np.uint32).view(np.float32)
    first = np.argsort(-logits, axis=1)[:, : c.n_experts_used]
    ids = (chosen >> np.uint64(16) & np.uint64(0xFFFF)).astype(int)
    return float(np.mean([np.isin(a, b).mean() for a, b in zip(ids, first, strict=True)]))


def time_wrong_guesses(gpu, backend, c, pages, note):
    """Time steps in which layers guess with the next layer's router: one of four, of two, all."""
    decoder, resident = backend._programs.one, backend._programs.resident
    names = [f"blk.{i}.ffn_gate_inp.weight" for i in range(c.n_layers)]
    own = [resident.weights.matrices[name].address for name in names]
    right, others = decoder.graphs[1, False], own[1:] + own[:1]
    for every in (4, 2, 1):
        layers = enumerate(zip(own, others, strict=True))
        gpu.routers = cycle([pair[i % every == 0] for i, pair in layers])
        decoder.graphs.made[1, False] = gpu.capture(lambda: queue(decoder, many=False))
        gpu.steps.pop()
        at, first = np.full(1, 128, np.int32), np.ones(1, np.int32)
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            backend.greedy(first, at, pages, 64)
            seconds.append((time.perf_counter() - start) / 64)
        note(f"1/{every} of layers guess wrongly: guessed", guesses(gpu, decoder, c))
        note(f"1/{every} of layers guess wrongly: step", 1e6 * min(seconds), "us")
    gpu.routers, decoder.graphs.made[1, False] = None, right


def kernel_times(gpu, step, label, note):
    """Time the launches of one kernel of a step after one another, for each kernel."""
    kinds = defaultdict(list)
    for launch in step:
        grid, arguments = launch[0][2:4]
        weight = (launch[1].get("defines") or {}).get("WEIGHT", "")
        name = launch[0][1]
        if name == "batch_matmul":  # units and superblocks say which product it is
            name += f" {weight[5:]} {arguments[3]}x{arguments[4]}"
        elif name == "matmul_mma":
            name += f" {grid}"
        kinds[name].append(launch)
    total = 0.0
    for kind, launches in kinds.items():

        def queue(launches=launches):
            for args, kwargs in launches:
                gpu.launch(*args, **kwargs)

        us = 1e3 * milliseconds(gpu, CudaGpu.capture(gpu, queue)) / len(launches)
        total += us * len(launches)
        note(f"{label}: {kind} x {len(launches)}", us, "us each")
    note(f"{label}: sum of the kernels", total, "us")


def main():
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("out")
    p.add_argument("--reference", type=int, default=0)
    p.add_argument("--context", type=int, default=4096)
    p.add_argument("--planes", type=int, default=2)
    p.add_argument("--depths", default="0,128,1024,4000")
    p.add_argument("--sequences", default="")
    p.add_argument("--commit", default="")
    a = p.parse_args()
    found = {}

    def note(name, value, unit=""):
        found[name] = value
        shown = f"{value:10.2f}" if isinstance(value, float) else str(value)
        print(f"{name:<44} {shown} {unit}", flush=True)

    most = max([1, *map(int, filter(None, a.sequences.split(",")))])
    engine = EngineConfig(
        activation_bits=8 * a.planes, context=a.context, max_sequences=most, chunk=512
    )
    weights = Weights.from_file(GGUFFile.open(a.model))
    c = weights.config
    gpu = Recorder()
    start = time.perf_counter()
    backend = CudaBackend(weights, engine, gpu)
    gpu.synchronise()
    note("load seconds", time.perf_counter() - start, "s")
    note("plan", str(backend.plan))
    free, total = gpu.memory()
    note("used GB", (total - free) / 1e9)
    pages = np.random.default_rng().permutation(-(-a.context // 64)).astype(np.int32)[None]
    rng = np.random.default_rng()
    tokens = rng.integers(0, c.vocab, 512).astype(np.int32)

    none = frozenset()
    if a.reference:
        reference = ReferenceBackend(weights, engine)
        part = tokens[: a.reference]
        every = list(range(len(part)))
        start = time.perf_counter()
        theirs = reference.forward(batch(part, 0, pages, every))
        note("reference seconds", time.perf_counter() - start, "s")
        ours = backend.forward(batch(part, 0, pages, every), lambda *_: None, none)
        same = np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))
        note("bits equal to the reference", bool(same), f"({len(part)} tokens)")
    decoder = backend._programs.one
    for many in (False, True):  # in the order of gpu.steps
        decoder.graphs[1, many]
    fused = any(s.name == "chosen" for s in decoder._g.slots)
    if fused:
        backend.forward(batch(tokens[:100], 0, pages))
        equal = True
        for i in range(100, 108):
            one = batch(tokens[i : i + 1], i, pages, [0])
            plain = backend.forward(one, lambda *_: None, none)
            captured = backend.forward(one)
            equal &= np.array_equal(plain.view(np.uint32), captured.view(np.uint32))
        note("decode graph equal to kernel by kernel", bool(equal))
        depths = [d for d in map(int, a.depths.split(",")) if d + 64 <= a.context]
        for depth in depths:
            backend.greedy(np.array([1], np.int32), np.array([depth], np.int32), pages, 2)
            gpu.synchronise()
            start = time.perf_counter()
            backend.greedy(np.array([1], np.int32), np.array([depth], np.int32), pages, 64)
            seconds = (time.perf_counter() - start) / 64
            note(f"decode at depth {depth}: step", 1e6 * seconds, "us")
            note(f"decode at depth {depth}: rate", 1 / seconds, "tok/s")
            if c.n_experts:
                note(f"decode at depth {depth}: guessed", guesses(gpu, decoder, c))
        if c.n_experts:
            time_wrong_guesses(gpu, backend, c, pages, note)
        start = time.perf_counter()
        for i in range(32):
            backend.forward(batch([1], 128 + i, pages, [0]))
        note("decode with logits to the host", 32 / (time.perf_counter() - start), "tok/s")
        for depth in depths:
            begin_at(decoder, depth, pages)
            step = gpu.steps[depth >= 64 * FEW_TILES]
            kernel_times(gpu, step, f"depth {depth}", note)
    else:
        begin_at(decoder, 100, pages)
        kernel_times(gpu, gpu.steps[0], "depth 100", note)
    begin_at(decoder, 100, pages)
    note("graph of a step", 1e3 * milliseconds(gpu, decoder.graphs[1, False]), "us")
    for n in map(int, filter(None, a.sequences.split(","))):
        assert n > 1, "one sequence is what the depths time"
        table = np.arange(5 * n, dtype=np.int32).reshape(n, 5)
        at = np.full(n, 128, np.int32)
        for i in range(n):
            part = rng.integers(0, c.vocab, 128).tolist()
            backend.forward(batch(part, 0, table[i : i + 1]))
        backend.greedy(tokens[:n], at, table, 2)
        gpu.synchronise()
        start = time.perf_counter()
        backend.greedy(tokens[:n], at, table, 64)
        seconds = (time.perf_counter() - start) / 64
        note(f"{n} sequences: step", 1e6 * seconds, "us")
        note(f"{n} sequences: rate", n / seconds, "tok/s")
        kernel_times(gpu, gpu.steps[-1], f"{n} sequences", note)
    if fused:
        for depth in depths:
            timeline(gpu, decoder, pages, depth)
    for n in (16, 128, 512):
        work = batch(tokens[:n], 0, pages, [n - 1])
        backend.forward(work, lambda *_: None, none)
        start = time.perf_counter()
        for _ in range(2):
            backend.forward(work, lambda *_: None, none)
        note(f"prefill {n}", 2 * n / (time.perf_counter() - start), "tok/s")
    gpu.recorded = []
    backend.forward(work, lambda *_: None, none)
    launches, gpu.recorded = gpu.recorded, None
    kernel_times(gpu, launches, "prefill 512", note)
    Path(a.out).write_text(
        json.dumps(origin(a.model, a.commit) | {"device": gpu.name} | found, indent=1)
    )


main()
