"""A model over several GPUs beside one: bits first, then how fast each is, what a lost GPU does,
and a model that does not fit one GPU.

usage: python benchmarks/cuda_parts.py MODEL OUT [--seconds 470] [--parts 2] [--layers N]

MODEL is a GGUF file, or 30b-a3b: that geometry with synthetic weights (synthetic.py), which needs
no file. Every stage is a process that is ended when its time is over, so that one that hangs loses
only itself; OUT/STAGE.json is written as figures come, the table comes last. With fewer GPUs than
parts all parts run on the first, which shows bits and no speed. The exit code is 1 if a bit differs
or a stage has not ended well.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import synthetic
from batches import batch, origin
from cuda.bindings import driver
from kernels import asked, compile_all

from isobit.backends.base import LOGITS, Batch
from isobit.backends.cpu import CpuBackend
from isobit.backends.cuda import CudaBackend
from isobit.backends.cuda.device.gpu import CudaGpu
from isobit.backends.cuda.parts import CudaPartsBackend
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable
from isobit.gguf.reader import GGUFFile
from isobit.model.parallel.split import split
from isobit.model.weights import Weights

LARGE = "235b-a22b"
STAGES = {  # seconds that each may take
    "compile": 150,
    "few_layers": 60,
    "bits": 110,
    "rates": 110,
    "lost": 60,
    "one_plane": 90,
    "large": 150,
    "timeline": 60,
    "marks": 100,
    "nccl": 30,
}
FEW, TIMED = 4, 8  # layers
DEPTH, STEPS = 128, 32


def opened(name, layers):
    """A model's weights."""
    if name in synthetic.MODELS:
        return synthetic.weights(name, layers)
    return Weights.from_file(GGUFFile.open(Path(name)))


def devices(parts):
    """A device for each part; the first for all, if there are not as many."""
    driver.cuInit(0)
    found = driver.cuDeviceGetCount()[1]
    return [CudaGpu(r if found >= parts else 0) for r in range(parts)]


class Notes:
    """What a stage found, kept in a file as it comes."""

    def __init__(self, a):
        self._path, self._start = Path(a.out) / f"{a.stage}.json", time.perf_counter()
        self.found = {}

    def __call__(self, key, value):
        self.found[key] = value
        self.found["seconds"] = round(time.perf_counter() - self._start, 1)
        self._path.write_text(json.dumps(self.found, indent=1) + "\n")
        print(f"  {self.found['seconds']:6.1f} s  {key}: {str(value)[:160]}", flush=True)


# Compilation


def compile_for_all(a, note):
    """Every kernel of every stage, by all cores."""
    gpu = devices(1)[0]
    kernels = {("device/repack", ()), ("ops/add", ())}
    large = "large" in a.only and gpu_count() >= a.parts
    for name in dict.fromkeys((a.model, LARGE) if large else (a.model,)):
        weights = opened(name, 8)
        graphs = [weights.graph] + [split(weights.graph, r, a.parts).graph for r in range(a.parts)]
        for planes in (2, 1):
            engine = EngineConfig(8 * planes, context=1024, max_sequences=32, chunk=2048)
            for graph in graphs:
                kernels |= asked(Weights(weights.config, graph), engine, gpu)
    note("kernels", len(kernels))
    note("MB", compile_all(kernels, gpu.arch) / 1e6)


def gpu_count():
    """How many there are."""
    driver.cuInit(0)
    return driver.cuDeviceGetCount()[1]


# Bits


class Texts:
    """Sequences of random tokens, each with pages of its own."""

    def __init__(self, rng, vocab, sequences, pages):
        self.rng, self.vocab = rng, vocab
        self.pages = np.arange(sequences * pages, dtype=np.int32).reshape(sequences, pages)
        self.ends = np.zeros(sequences, np.int32)

    def prompt(self, s, n, rows=1):
        """Tokens of one sequence, and logits of the last."""
        start, self.ends[s] = int(self.ends[s]), self.ends[s] + n
        return batch(self._ids(n), start, self.pages[s : s + 1], range(n - rows, n))

    def step(self):
        """A token of every sequence."""
        at, each = self.ends.copy(), np.arange(len(self.ends), dtype=np.int32)
        self.ends += 1
        return Batch(self._ids(len(at)), at, each, self.pages, each)

    def _ids(self, n):
        return self.rng.integers(0, self.vocab, n).astype(np.int32)


def differ(a, b):
    """Logits of other bits."""
    return int(np.count_nonzero(a.view(np.uint32) != b.view(np.uint32)))


def kinds(rng, vocab):
    """(name, batches) of every way to run."""
    for n, steps in ((4, 64), (1, 64), (2, 8), (3, 8), (8, 8), (32, 4)):
        texts = Texts(rng, vocab, n, 4)
        prompts = [texts.prompt(s, int(rng.integers(2, 90))) for s in range(n)]
        yield f"{n} prompts, {steps} steps", prompts + [texts.step() for _ in range(steps)]
    texts = Texts(rng, vocab, 1, 12)
    yield "a prompt of 600", [texts.prompt(0, 600, rows=3), texts.prompt(0, 70)]


def check(note, backends, seconds):
    """Logits of the split model beside one GPU's and, for some seconds, the CPU's."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    note("seed", seed)
    vocab = backends["split"].limits.vocabulary
    wrong, cpu_seconds = 0, 0.0
    for name, batches in kinds(np.random.default_rng(seed), vocab):
        counts, cpu = {"logits": 0, "differ from one GPU": 0}, "cpu" in backends
        counts |= {"of the CPU's": 0, "differ from the CPU": 0} if cpu else {}
        for b in batches:
            mine = backends["split"].forward(b)
            counts["logits"] += mine.size
            if "one" in backends:
                counts["differ from one GPU"] += differ(mine, backends["one"].forward(b))
            cpu = cpu and cpu_seconds < seconds
            if cpu:
                begun = time.perf_counter()
                counts["of the CPU's"] += mine.size
                counts["differ from the CPU"] += differ(mine, backends["cpu"].forward(b))
                cpu_seconds += time.perf_counter() - begun
        note(name, counts)
        wrong += counts["differ from one GPU"] + counts.get("differ from the CPU", 0)
    counts = {}
    for n in (2, 1) if "one" in backends else ():
        at, start = np.arange(1, n + 1, dtype=np.int32), np.zeros(n, np.int32)
        pages = np.arange(2 * n, dtype=np.int32).reshape(n, 2)
        chosen = [backends[k].greedy(at, start, pages, 48) for k in ("split", "one")]
        counts[f"of {n}"] = int(np.count_nonzero(chosen[0] != chosen[1]))
        if "cpu" in backends:
            few = backends["cpu"].greedy(at, start, pages, 8)
            counts[f"of {n}, from the CPU's"] = int(np.count_nonzero(chosen[0][:8] != few))
    note("greedy tokens that differ", counts)
    wrong += sum(counts.values())
    note("wrong", wrong)


def bits(a, note, planes=2, layers=None, cpu_seconds=15):
    """Logits of one GPU, all parts and the CPU."""
    weights = opened(a.model, layers or a.layers)
    engine = EngineConfig(8 * planes, context=1024, max_sequences=32, chunk=512)
    with contextlib.ExitStack() as stack:
        gpus = devices(a.parts)
        two = CudaPartsBackend(weights, replace(engine, parts=a.parts), gpus)
        stack.callback(two.close)
        note("devices", f"{two.device}{'' if gpu_count() >= a.parts else ', all of them one'}")
        note("plan of each device", [str(p) for p in two.plans])
        one = CudaBackend(weights, engine, CudaGpu(0))
        stack.callback(one.close)
        note("plan of one device", str(one.plan))
        cpu = CpuBackend(weights, engine)
        stack.callback(cpu.close)
        check(note, {"split": two, "one": one, "cpu": cpu}, cpu_seconds)


# Rates


def rates(a, note):
    """Seconds of each task on one device and on all, in turns."""
    weights = opened(a.model, a.layers)
    engine = EngineConfig(context=4608, max_sequences=32, chunk=2048)
    two = CudaPartsBackend(weights, replace(engine, parts=a.parts), devices(a.parts))
    one = CudaBackend(weights, engine, CudaGpu(0))
    both = {"one": one, "split": two}
    vocab, pages = two.limits.vocabulary, two.limits.positions // 64
    rng = np.random.default_rng(5)
    note("devices", two.device)

    def decode(n):
        texts = Texts(rng, vocab, n, 4)
        for s in range(n):
            b = texts.prompt(s, DEPTH)
            for backend in both.values():
                backend.forward(b)
        tokens, at = texts._ids(n), texts.ends
        return n * STEPS, lambda backend: backend.greedy(tokens, at, texts.pages, STEPS)

    def prefill(n):
        b = Texts(rng, vocab, 1, pages).prompt(0, n)
        return n, lambda backend: backend.forward(b)

    def logits(n):
        texts = Texts(rng, vocab, n, 4)
        b = texts.step()
        return n, lambda backend: backend.forward(b)

    tasks = [(f"decode, {n} sequences", decode, n, 7) for n in (1, 8, 32)]
    tasks += [(f"prefill of {n}", prefill, n, 7) for n in (512, 4096)]
    tasks += [("a step with its logits", logits, 1, 15)]
    for name, make, n, rounds in tasks:
        count, work = make(n)
        seconds = {key: [] for key in both}
        for backend in both.values():  # warms up
            work(backend)
        for _ in range(rounds):
            for key, backend in both.items():
                begun = time.perf_counter()
                work(backend)
                seconds[key].append(time.perf_counter() - begun)
        mid = {key: float(np.median(s)) for key, s in seconds.items()}
        ratios = np.array(seconds["one"]) / np.array(seconds["split"])
        note(
            name,
            {f"{key}, tokens/s": round(count / s, 1) for key, s in mid.items()}
            | {"ratio": round(float(np.median(ratios)), 3)}
            | {"from": round(float(ratios.min()), 3), "to": round(float(ratios.max()), 3)},
        )
    b = Texts(rng, vocab, 1, pages).prompt(0, 512)
    begun = time.perf_counter()
    with one._gpu.rehearsal():
        one.compute(b, LOGITS, None, None)
    middle = time.perf_counter()
    two._rehearse([partial(x.compute, b, LOGITS, None, None) for x in two._here])
    ms = {"one": middle - begun, "split": time.perf_counter() - middle}
    note("host's ms of a prefill of 512", {k: round(1e3 * v, 2) for k, v in ms.items()})
    two.close()
    one.close()


# A device that fails


def lost(a, note):
    """A part that fails, one that does not answer, and a kernel that faults."""
    weights = opened(a.model, FEW)
    engine = EngineConfig(context=256, max_sequences=2, chunk=128, parts=a.parts)
    b = Texts(np.random.default_rng(1), weights.config.vocab, 1, 2).prompt(0, 40)
    expected = None
    for name in ("a part fails", "a part does not answer", "a kernel faults"):
        two = CudaPartsBackend(weights, engine, devices(a.parts))
        logits = two.forward(b)
        expected = logits if expected is None else expected
        note(f"before: {name}", f"{differ(logits, expected)} logits differ")
        part, gpu = two._here[-1], two._gpus[-1]
        compute = part.compute
        if name == "a part fails":

            def broken(*_):
                raise BackendUnavailable("cuda: a device is lost (injected)")

            part.compute = broken
        elif name == "a part does not answer":
            two._flags[1] = 1000

            def late(*arguments, compute=compute):
                time.sleep(3)
                return compute(*arguments)

            part.compute = late
        else:
            gpu.activate()
            gpu.launch("ops/add", "add", (1, 1), (0, 1, 1, 0, 1, 1, 1, 256, 0))
        said = []
        for _ in range(2):
            begun = time.perf_counter()
            try:
                two.forward(b)
                said.append("no error")
            except BackendUnavailable as error:
                said.append(f"{time.perf_counter() - begun:.2f} s: {error}")
        note(name, said)
        if "no error" in said:
            note("wrong", f"{name}: no error")
        with contextlib.suppress(BackendUnavailable):
            two.close()


# A model that does not fit one device


def large(a, note):
    """Bits beside the CPU's, and some steps' time, of a model too large for one device."""
    if gpu_count() < a.parts:
        note("not run", f"needs {a.parts} GPUs")
        return
    weights = opened(LARGE, None)
    taken = sum(w.data.nbytes for w in weights.graph.weights.values())
    note("GB of weights", round(taken / 1e9, 1))
    engine = EngineConfig(context=131072, max_sequences=1, chunk=512)
    try:
        CudaBackend(weights, engine, CudaGpu(0)).close()
        note("one device", "it fits")
    except BackendUnavailable as error:
        note("one device", str(error))
    two = CudaPartsBackend(weights, replace(engine, parts=a.parts), devices(a.parts))
    note("plan of each device", [str(p) for p in two.plans])
    rng = np.random.default_rng()
    texts = Texts(rng, two.limits.vocabulary, 1, two.limits.pages)
    b = texts.prompt(0, 512)
    two.forward(b)
    begun = time.perf_counter()
    two.forward(b)
    note("prefill of 512, tokens/s", round(512 / (time.perf_counter() - begun), 1))
    at = np.array([512], np.int32)
    two.greedy(at, at, texts.pages, 4)
    begun = time.perf_counter()
    two.greedy(at, at, texts.pages, 32)
    note("decode, tokens/s", round(32 / (time.perf_counter() - begun), 1))
    cpu = CpuBackend(weights, EngineConfig(context=512, max_sequences=1))
    texts = Texts(rng, two.limits.vocabulary, 1, 4)
    counts = {"logits": 0, "differ from the CPU": 0}
    for b in [texts.prompt(0, 24), *(texts.step() for _ in range(12))]:
        mine = two.forward(b)
        counts["logits"] += mine.size
        counts["differ from the CPU"] += differ(mine, cpu.forward(b))
        note("bits", dict(counts))
    note("wrong", counts["differ from the CPU"])
    two.close()
    cpu.close()


# Where the time goes


def timeline(a, note):
    """Kernels of steps and prompts on one device, and on the first of all, from the driver's
    timeline (needs torch): launches a layer, and what each kernel adds, by what it follows."""
    from cuda_timeline import table, traced  # noqa: PLC0415

    weights = opened(a.model, TIMED)
    engine = EngineConfig(context=2304, max_sequences=32, chunk=2048, pages=256)
    rng = np.random.default_rng(5)
    for key in ("one", "split"):
        if key == "one":
            backend = CudaBackend(weights, engine, CudaGpu(0))
        else:
            several = replace(engine, parts=a.parts)
            backend = CudaPartsBackend(weights, several, devices(a.parts))

        def show(name, run, passes, key=key):
            for _ in range(3):
                run()
            kernels = sorted(traced(run), key=lambda k: k[3])
            behind = ["", *(k[0] for k in kernels)]
            named = [(f"{k[0]} < {b}", *k[1:]) for k, b in zip(kernels, behind, strict=False)]
            rows, us = table(sorted(named, key=lambda k: k[4]), passes)
            launches = sum(row["a pass"] for row in rows)
            note(
                f"{key}, {name}",
                {"us a pass": round(us, 1), "launches a layer": round(launches / TIMED, 2)}
                | {"kernels": sorted(rows, key=lambda row: -row["us a pass"])},
            )

        vocab = backend.limits.vocabulary
        for n in (1, 8, 32):
            texts = Texts(rng, vocab, n, 4)
            for s in range(n):
                backend.forward(texts.prompt(s, DEPTH))
            greedy = partial(backend.greedy, texts._ids(n), texts.ends, texts.pages, 8)
            show(f"{n} sequences", greedy, 8)
        for n in (512, 2048):
            prompt = Texts(rng, vocab, 1, 36).prompt(0, n)
            show(f"a prompt of {n}", partial(backend.forward, prompt), 1)
        backend.close()


# Within the kernels of a step of one sequence


class Marked(CudaGpu):
    """A device whose fused kernels may be compiled another way, and note when they pass points."""

    more: ClassVar[dict[str, str]] = {}  # definitions besides
    timeline = 0  # where times are noted

    def launch(self, stem, *a, **k):
        if stem.startswith("fusions/decode/"):
            noted = {"TIMELINE": hex(self.timeline) + "ull"} if self.timeline else {}
            k["defines"] = dict(k["defines"]) | self.more | noted
        super().launch(stem, *a, **k)


POINTS = ("start", "waited", "prologue", "products", "experts", "end")
KERNELS = ("qkv", "attn_out", "router", "gate_up", "down", "head", "attention", "merge")
WAYS = {"as it is": {}}


def points(times):
    """When the first, the middle and the last block passed each point, in ns from the first that
    had waited for the layer's input."""
    begin = int(times[1][times[1] > 0].min())
    rows = {}
    for k, row in enumerate(times):
        t = np.sort(row[row > 0].astype(np.int64)) - begin
        if t.size:
            name = f"{KERNELS[k // 10]} {POINTS[k % 10]}"
            rows[name] = [int(t[0]), int(t[len(t) // 2]), int(t[-1]), int(t.size)]
    return dict(sorted(rows.items(), key=lambda kv: kv[1][1]))


def guessed(gpu, decoder, config):
    """Of the experts that the last step chose, the part that was predicted."""
    n, k = config.n_experts, config.n_experts_used
    slots = [s for s in decoder._g.slots if s.name in ("prediction", "chosen")]
    found = {"prediction": [], "chosen": []}
    for slot in slots:
        words = np.empty(1 + n if slot.name == "prediction" else k, np.uint64)
        gpu.download(slot.address, words)
        found[slot.name].append(words)
    words, chosen = (np.array(found[name]) for name in found)
    logits = (words[:, 1:] >> np.uint64(32)).astype(np.uint32).view(np.float32)
    first = np.argsort(-logits, axis=1)[:, :k]
    ids = (chosen >> np.uint64(16) & np.uint64(0xFFFF)).astype(int)
    return round(float(np.mean([np.isin(a, b).mean() for a, b in zip(ids, first, strict=True)])), 3)


def marks(a, note):
    """Steps of one sequence, on one device and on all: how long they take the WAYS, and when
    blocks of a layer pass points of its kernels."""
    weights = opened(a.model, TIMED)
    engine = EngineConfig(context=1024, max_sequences=1, chunk=128)
    driver.cuInit(0)
    several = [Marked(r if gpu_count() >= a.parts else 0) for r in range(a.parts)]
    two = CudaPartsBackend(weights, replace(engine, parts=a.parts), several)
    alone = Marked(0)
    one = CudaBackend(weights, engine, alone)
    both = {"one": (one, [one], [alone]), "split": (two, two._here, several)}
    texts = Texts(np.random.default_rng(5), weights.config.vocab, 1, 4)
    prompt = texts.prompt(0, DEPTH)
    at = texts._ids(1), texts.ends, texts.pages

    def capture(backends):
        for b in backends:
            b._gpu.activate()
            decoder = b._programs.one
            queue = partial(decoder._queue, decoder._pass(1, many=False))
            b._gpu.compile(queue, lambda *_: None)
            with b._gpu.rehearsal():
                decoder.graphs.made[1, False] = b._gpu.capture(queue)

    def microseconds(backend):
        seconds = []
        for _ in range(7):
            begun = time.perf_counter()
            backend.greedy(*at, STEPS)
            seconds.append(time.perf_counter() - begun)
        return round(1e6 * float(np.median(seconds)) / STEPS, 1)

    expected = None
    for key, (backend, here, gpus) in both.items():
        gpu, first = gpus[0], here[0]
        backend.forward(prompt)
        backend.greedy(*at, 4)
        for name, way in WAYS.items() if key == "split" else [("as it is", {})]:
            for each in gpus:
                each.more, each.timeline = way, 0
            capture(here)
            tokens = backend.greedy(*at, STEPS)
            expected = tokens if expected is None else expected
            found = {"us a step": microseconds(backend), "tokens": tokens[:6].ravel().tolist()}
            found["tokens that differ"] = int(np.count_nonzero(tokens != expected))
            gpu.activate()
            found["guessed"] = guessed(gpu, first._programs.one, weights.config)
            with gpu.rehearsal():
                gpu.timeline = buffer = gpu.allocate(1 << 20)
            capture(here[:1])
            backend.greedy(*at, 4)
            gpu.activate()
            gpu.upload(buffer, np.zeros(80 * 256, np.uint64))
            backend.greedy(*at, 1)
            times = np.empty((80, 256), np.uint64)
            gpu.activate()
            gpu.download(buffer, times)
            gpu.timeline = 0
            found["ns: first, median, last, blocks"] = points(times)
            note(f"{key}: {name}", found)
            note("wrong", note.found.get("wrong", 0) + found["tokens that differ"])
    two.close()
    one.close()


# What a library's exchange would take


def nccl(a, note):
    """NCCL's all-gather of what a layer exchanges, of one vector and of prompts (needs torch)."""
    import torch  # noqa: PLC0415
    from torch.cuda import nccl as library  # noqa: PLC0415

    for nbytes in (4 << 10, 64 << 10, 1 << 20, 4 << 20, 8 << 20, 16 << 20, 24 << 20):
        every = range(a.parts)
        mine = [torch.zeros(nbytes // 4, device=f"cuda:{r}") for r in every]
        whole = [torch.zeros(a.parts * nbytes // 4, device=f"cuda:{r}") for r in every]

        def gather(count, mine=mine, whole=whole):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            for _ in range(count):
                library.all_gather(mine, whole)
            events[1].record()
            for r in range(a.parts):
                torch.cuda.synchronize(r)
            return 1e3 * events[0].elapsed_time(events[1]) / count

        gather(10)
        us = min(gather(20) for _ in range(5))
        note(f"all-gather of {nbytes >> 10} KB a part, us", round(us, 1))


WORK = {
    "nccl": nccl,
    "marks": marks,
    "compile": compile_for_all,
    "few_layers": partial(bits, layers=FEW, cpu_seconds=30),
    "bits": bits,
    "rates": rates,
    "lost": lost,
    "one_plane": partial(bits, planes=1, cpu_seconds=10),
    "large": large,
    "timeline": timeline,
}


# All of it


def run(a, stage, seconds):
    """A stage as a process; how it ended."""
    command = [sys.executable, __file__, a.model, a.out, "--stage", stage]
    command += ["--parts", str(a.parts)] + (["--layers", str(a.layers)] if a.layers else [])
    command += ["--only", *a.only]
    child = subprocess.Popen(command, start_new_session=True)
    try:
        code = child.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        return f"ended after {seconds:.0f} s"
    return "ok" if code == 0 else f"exit code {code}"


def table(out, ended):
    """The figures, and whether all is well."""
    found, well = {"ended": ended}, True
    for stage, how in ended.items():
        path = Path(out) / f"{stage}.json"
        found[stage] = json.loads(path.read_text()) if path.exists() else {}
        wrong = found[stage].get("wrong", 0)
        well &= how == "ok" and not wrong
        print(f"{stage:<24} {how}, {found[stage].get('seconds', '-')} s, wrong: {wrong}")
    for name, row in found.get("rates", {}).items():
        if isinstance(row, dict) and "ratio" in row:
            one, many = (v for k, v in row.items() if k.endswith("tokens/s"))
            spread = f"({row['from']} to {row['to']})"
            print(f"{name:<24} {one:10.1f} {many:10.1f}  x {row['ratio']} {spread}")
    for name, row in found.get("marks", {}).items():
        if isinstance(row, dict):
            print(f"{name}: {row['us a step']} us a step, guessed {row['guessed']}")
            for point, ns in row["ns: first, median, last, blocks"].items():
                print(f"  {point:24}", *(f"{n:7d}" for n in ns))
    for name, row in found.get("timeline", {}).items():
        if isinstance(row, dict):
            print(
                f"{name}: {row['us a pass']} us a pass, {row['launches a layer']} launches a layer"
            )
            for k in row["kernels"][:13]:
                print(f"  {k['a pass']:5.1f} x {k['kernel'][:34]:<34} {k['grid']:<12}", end="")
                print(f"{k['own']:8.2f} {k['alone']:8.2f} {k['us a pass']:9.1f}")
    return found, well


def main():
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("out")
    p.add_argument("--seconds", type=float, default=470)
    p.add_argument("--parts", type=int, default=2)
    p.add_argument("--layers", type=int)
    p.add_argument("--stage", choices=STAGES)
    p.add_argument("--only", nargs="+", choices=STAGES, default=STAGES)
    p.add_argument("--commit", default="")
    a = p.parse_args()
    if a.stage:
        WORK[a.stage](a, Notes(a))
        return
    end, ended = time.perf_counter() + a.seconds, {}
    Path(a.out).mkdir(parents=True, exist_ok=True)
    for stage in a.only:
        left = end - time.perf_counter() - 3
        if left < 10:
            ended[stage] = "not run: no time"
            continue
        print(f"{stage} ({a.seconds - left - 3:.0f} s)", flush=True)
        ended[stage] = run(a, stage, min(left, STAGES[stage]))
    found, well = table(a.out, ended)
    found = origin(a.model, a.commit) | {"GPUs": gpu_count()} | found
    (Path(a.out) / "cuda_parts.json").write_text(json.dumps(found, indent=1) + "\n")
    raise SystemExit(not well)


if __name__ == "__main__":
    main()
