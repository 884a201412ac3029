"""Stages of cuda_parts.py that compare bits: with one GPU and the CPU, also of a model that one GPU
does not hold; and what a lost GPU does."""

import contextlib
import time

import numpy as np
from parts_models import FEW, Texts, differ, gpu_count, in_parts, opened

from isobit.backends.cpu import CpuBackend
from isobit.backends.cuda import CudaBackend
from isobit.backends.cuda.device.gpu import CudaGpu
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable

LARGE = "235b-a22b"


def kinds(rng, vocab):
    """(name, batches) of every way to run: prompts of each padded size, steps of as many rows."""
    for n, steps in ((4, 64), (1, 64), (2, 8), (3, 8), (8, 8), (32, 4), (130, 2)):
        texts = Texts(rng, vocab, n, 5)
        most = 250 if n < 10 else 5
        prompts = [texts.prompt(s, int(rng.integers(2, most))) for s in range(n)]
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
    engine = EngineConfig(8 * planes, context=1024, max_sequences=130, pages=1024, chunk=512)
    with contextlib.ExitStack() as stack:
        two = in_parts(a, weights, engine)
        stack.callback(two.close)
        note("devices", f"{two.device}{'' if gpu_count() >= a.parts else ', all of them one'}")
        note("plan of each device", [str(p) for p in two.plans])
        one = CudaBackend(weights, engine, CudaGpu(0))
        stack.callback(one.close)
        note("plan of one device", str(one.plan))
        cpu = CpuBackend(weights, engine)
        stack.callback(cpu.close)
        check(note, {"split": two, "one": one, "cpu": cpu}, cpu_seconds)


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
    two = in_parts(a, weights, engine)
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


def lost(a, note):
    """A part that fails, one that does not answer, and a kernel that faults."""
    weights = opened(a.model, FEW)
    engine = EngineConfig(context=256, max_sequences=2, chunk=128)
    b = Texts(np.random.default_rng(1), weights.config.vocab, 1, 2).prompt(0, 40)
    expected = None
    for name in ("a part fails", "a part does not answer", "a kernel faults"):
        two = in_parts(a, weights, engine)
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
