"""Steps of a few rows, padded steps and mixed batches: bits first, then old and new in turns.

usage: python benchmarks/cuda_rows.py MODEL.gguf OUT [--rounds 5] [--seconds 420] [--no-check]

"Plain" is without kernels of a few rows and without graphs of mixed batches. All of it is lowered
side by side over the same weights, so a turn is a few milliseconds. OUT/cuda_rows.json gets every
figure; the table comes last. Whatever is left when the seconds are over is named as not
run. The exit code is 1 if a bit differs.
"""

import argparse
import contextlib
import json
import time
from pathlib import Path

import numpy as np
from batches import origin
from kernels import asked, compile_all

from isobit.backends.base import Batch
from isobit.backends.cpu import CpuBackend
from isobit.backends.cuda import CudaBackend
from isobit.backends.cuda.device import gpu as device
from isobit.config import EngineConfig
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights

FEW = 2, 3, 4
DEPTHS = 4000, 16000
STEPS, DEPTH = 48, 128


class Texts:
    """Sequences of random tokens, each with pages of its own."""

    def __init__(self, rng, vocab, sequences, pages):
        self.rng, self.vocab = rng, vocab
        self.pages = np.arange(sequences * pages, dtype=np.int32).reshape(sequences, pages)
        self.ends = np.zeros(sequences, np.int32)

    def batch(self, parts, wanted=None):
        """So many tokens more of sequences, and logits of ``wanted`` tokens, else of each last."""
        lengths = [n for _, n in parts]
        first = [int(self.ends[s]) for s, _ in parts]
        for s, n in parts:
            self.ends[s] += n
        at = [np.arange(a, a + n) for a, n in zip(first, lengths, strict=True)]
        rows = np.cumsum(lengths) - 1 if wanted is None else wanted
        return Batch(
            self.rng.integers(0, self.vocab, sum(lengths)).astype(np.int32),
            np.concatenate(at).astype(np.int32),
            np.repeat(np.arange(len(parts)), lengths).astype(np.int32),
            self.pages[[s for s, _ in parts]],
            np.asarray(rows, np.int32),
        )


def check(backend, cpu, rng, vocab, note):
    """Logits of every way to run beside the CPU's; how many differ."""
    texts, wrong, total = Texts(rng, vocab, 32, 4), 0, 0

    def compare(name, *batches):
        nonlocal wrong, total
        different = size = 0
        for batch in batches:
            ours, theirs = np.array(backend.forward(batch)), cpu.forward(batch)
            different += int(np.count_nonzero(ours.view(np.uint32) != theirs.view(np.uint32)))
            size += ours.size
        wrong, total = wrong + different, total + size
        note(f"{name}: logits that differ", different, f"of {size}")

    lengths = rng.integers(1, 12, 32)
    lengths[:4] = 61, 62, 1, 30  # so that drafts pass the edge of a tile
    compare("prompts", texts.batch([(s, int(n)) for s, n in enumerate(lengths)]))
    for n in (1, 2, 3, 4, 7, 8, 16, 32):
        compare(f"{n} together", *(texts.batch([(s, 1) for s in range(n)]) for _ in range(2)))
    for n in FEW:
        every = np.arange(n)
        mine = [[(n - 2, n)], [(0, 1), (1, n - 1)], [(3, n)]]
        compare(f"{n} rows of one", *(texts.batch(parts, every) for parts in mine))
    steps = [(s, 1) for s in range(31)]
    compare("31 steps + 1 without logits", texts.batch([*steps, (31, 1)], np.arange(31)))
    compare("31 steps + 20 of a prompt", texts.batch([*steps, (31, 20)]))
    compare("all logits of 40 tokens", texts.batch([(5, 40)], np.arange(40)))
    return wrong, total


@contextlib.contextmanager
def only(backend, **what):
    """With these ways to run alone."""
    programs = backend._programs
    before = {name: getattr(programs, name) for name in ("one", "rows", "many", "mixed")}
    for name, value in ({"rows": {}, "mixed": None} | what).items():
        setattr(programs, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(programs, name, value)


class Clock:
    """Times ways to run in turns; microseconds, the median of rounds."""

    def __init__(self, note, rounds, seconds):
        self.note, self.rounds, self.end = note, rounds, time.perf_counter() + seconds
        self.table, self.left = [], []

    def turns(self, name, ways, each=1):
        """ways: of a name, what makes a context, and what is run in it, ``each`` things at once."""
        if time.perf_counter() > self.end:
            self.left.append(name)
            return
        found = {way: [] for way in ways}
        for i in range(self.rounds + 1):
            for way, (context, run) in ways.items():
                with context():
                    start = time.perf_counter()
                    run()
                    seconds = time.perf_counter() - start
                if i:  # the first captures and warms up
                    found[way].append(1e6 * seconds / each)
        first = next(iter(found))
        for way, times in found.items():
            ratios = np.array(times) / np.array(found[first])
            row = name, way, float(np.median(times)), float(np.median(ratios))
            self.note(f"{name}: {way}", {"us": times, "ratio": row[3]})
            self.table.append(row)


def greedy(backend, texts, n, depth, count=STEPS):
    """Run steps of n sequences from a depth on."""
    tokens, at = np.arange(1, n + 1, dtype=np.int32), np.full(n, depth, np.int32)
    return lambda: backend.greedy(tokens, at, texts.pages[:n], count)


def drafts(backend, texts, n, depth, count=16):
    """The same of n rows of one sequence, logits to the host."""
    seq, rows = np.zeros(n, np.int32), np.arange(n, dtype=np.int32)

    def run():
        for _ in range(count):
            backend.forward(Batch(rows + 1, rows + np.int32(depth), seq, texts.pages[:1], rows))

    return run


def mixed(backend, texts, steps, prompt, wanted, count=4):
    """Passes of steps beside a part of a prompt."""
    n = steps + prompt
    positions = np.r_[np.full(steps, DEPTH), np.arange(DEPTH, DEPTH + prompt)]
    tokens = (np.arange(n) % 300).astype(np.int32)
    sequence = np.r_[np.arange(steps), np.full(prompt, steps)]
    rows = np.r_[np.arange(steps), [n - 1] * wanted]
    batch = Batch(
        tokens,
        positions.astype(np.int32),
        sequence.astype(np.int32),
        texts.pages[: steps + 1],
        rows.astype(np.int32),
    )

    def run():
        for _ in range(count):
            backend.forward(batch)

    return run


def of_prompt(backend, texts, n, first):
    """A part of a prompt."""
    at = np.arange(first, first + n, dtype=np.int32)
    last = np.array([n - 1], np.int32)
    batch = Batch((at % 1000).astype(np.int32), at, np.zeros(n, np.int32), texts.pages, last)
    return lambda: backend.forward(batch)


def measure(backend, texts, clock):
    """All comparisons, the ones that matter most first."""
    programs = backend._programs
    rows, many, mix = programs.rows, programs.many, programs.mixed
    old, new = (lambda: only(backend)), (lambda: only(backend, rows=rows, mixed=mix))
    for s in range(len(texts.pages)):  # what is read has been written
        backend.forward(texts.batch([(s, 1024 if s < 4 else DEPTH)]))
    run = greedy(backend, texts, 1, DEPTH)
    clock.turns("1 sequence", {"captured": (new, run)}, STEPS)
    for n in FEW:
        run = greedy(backend, texts, n, DEPTH)
        clock.turns(f"{n} sequences", {"plain": (old, run), "captured": (new, run)}, STEPS)
    for n in FEW:
        run = drafts(backend, texts, n, DEPTH)
        clock.turns(f"{n} rows of one", {"plain": (old, run), "captured": (new, run)}, 16)
    for prompt, wanted in ((1, 0), (1, 1), (32, 1), (200, 1), (512, 1)):
        run = mixed(backend, texts, 31, prompt, wanted)
        name = f"31 steps + {prompt}, {31 + wanted} logits"
        clock.turns(name, {"plain": (old, run), "captured": (new, run)}, 4)
    for n in filter(lambda n: n <= many.most, (5, 8, 16, 20, 32, 64, 128, 256)):
        run = greedy(backend, texts, n, DEPTH, 16)
        clock.turns(f"{n} steps", {"captured": (new, run)}, 16)
    long = Texts(None, 0, 1, DEPTHS[-1] // 64 + 4)
    for depth in DEPTHS:
        run = greedy(backend, long, 1, depth)
        clock.turns(f"1 at {depth:,}", {"captured": (new, run)}, STEPS)
    for n in (512, 2048):
        run = of_prompt(backend, long, n, 0)
        clock.turns(f"prompt of {n:,}", {"captured": (new, run)})
    run = of_prompt(backend, long, 2048, DEPTHS[-1] - 2048)
    clock.turns(f"2,048 of a prompt from {DEPTHS[-1] - 2048:,} on", {"captured": (new, run)})
    for n in (2, 4):
        run = greedy(backend, texts, n, 1000)
        clock.turns(f"{n} sequences at 1,000", {"plain": (old, run), "captured": (new, run)}, STEPS)
    run = mixed(backend, texts, 0, 64, 1)
    clock.turns("prompt of 64", {"plain": (old, run), "captured": (new, run)}, 4)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("out")
    p.add_argument("--commit", default="")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--seconds", type=float, default=420)
    p.add_argument("--sequences", type=int, default=256)
    p.add_argument("--no-check", action="store_true")
    a = p.parse_args()
    begin, found = time.perf_counter(), {}
    Path(a.out).mkdir(parents=True, exist_ok=True)

    def note(name, value, unit=""):
        found[name] = value
        print(f"{time.perf_counter() - begin:6.1f} s  {name}: {str(value)[:90]} {unit}", flush=True)
        text = json.dumps(origin(a.model, a.commit) | found, indent=1)
        (Path(a.out) / "cuda_rows.json").write_text(text + "\n")

    weights = Weights.from_file(GGUFFile.open(a.model))
    rng, vocab, wrong, total = np.random.default_rng(), weights.config.vocab, 0, 0
    backend = None
    planes = (1, 2) if not a.no_check else (2,)
    for p in planes:
        most = a.sequences if p == 2 else 32
        engine = EngineConfig(
            activation_bits=8 * p,
            context=DEPTHS[-1] + 256,
            max_sequences=most,
            chunk=2048,
            pages=max(24 * most, DEPTHS[-1] // 64 + 4),
        )
        gpu = device.CudaGpu()
        kernels = asked(weights, engine, gpu)
        note(f"planes {p}: MB of {len(kernels)} kernels", compile_all(kernels, gpu.arch) / 1e6)
        backend = CudaBackend(weights, engine, gpu)
        note(f"planes {p}: loaded, captured, planned", str(backend.plan))
        note("device", backend.device)
        if not a.no_check:
            settings = EngineConfig(activation_bits=8 * p, context=256, max_sequences=32)
            cpu = CpuBackend(weights, settings)
            counts = check(backend, cpu, rng, vocab, note)
            wrong, total = wrong + counts[0], total + counts[1]
            cpu.close()
        if p != 2:
            backend.close()
    memory = backend.memory()
    note("used GB", (memory.total - memory.free) / 1e9)
    clock = Clock(note, a.rounds, a.seconds - (time.perf_counter() - begin))
    measure(backend, Texts(rng, vocab, a.sequences, 24), clock)
    backend.close()
    print(f"\n{wrong} of {total} logits differ from the CPU's")
    for name, way, us, ratio in clock.table:
        print(f"{name:<28} {way:<16} {us:10.0f} us  x {ratio:.3f}")
    if clock.left:
        print("not run:", ", ".join(clock.left))
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
