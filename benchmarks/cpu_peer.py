"""The CPU backend beside llama.cpp on one model in one run: bits first, then speed in turns.

usage: python benchmarks/cpu_peer.py MODEL.gguf LLAMA OUT.json [--threads N] [--rounds 7]
           [--prompt 128]

The logits of a prompt and of a few decode steps must equal every other SIMD level's and, of a file
below 1 GB, the reference's, else nothing is timed. LLAMA is a folder with llama.cpp's llama-bench,
whose libraries LD_LIBRARY_PATH must name.
Each round times isobit, then llama.cpp; what counts is the median of the rounds' ratios. A model is
added to OUT.json under its file's name.
"""

import argparse
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import numpy as np

from isobit.backends.base import Batch
from isobit.backends.cpu import CpuBackend, simd_levels
from isobit.backends.reference import ReferenceBackend
from isobit.config import EngineConfig
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights

PAGES = np.arange(64, dtype=np.int32)[None]


def run(backend, tokens, start=0, rows=()):
    """The logits of tokens at positions from start on."""
    n = len(tokens)
    positions = np.arange(start, start + n, dtype=np.int32)
    sequence, rows = np.zeros(n, np.int32), np.array(rows, np.int32)
    return backend.forward(Batch(tokens.astype(np.int32), positions, sequence, PAGES, rows))


def check_bits(weights, engine, tokens, size):
    """How many logits were compared; ends the run if one differs."""
    first, *others = simd_levels()
    ours = CpuBackend(weights, engine, simd=first)
    theirs = [(simd, CpuBackend(weights, engine, simd=simd)) for simd in others]
    if size < 1 << 30:
        theirs.append(("reference", ReferenceBackend(weights, engine)))
    passes = [(tokens[:6], 0, range(6)), *((tokens[i : i + 1], i, [0]) for i in (6, 7))]
    want = np.concatenate([run(ours, *p) for p in passes])
    ours.close()
    for name, backend in theirs:
        got = np.concatenate([run(backend, *p) for p in passes])
        backend.close()
        if differing := int((got.view(np.uint32) != want.view(np.uint32)).sum()):
            raise SystemExit(f"{differing} of {want.size} logits of {first} differ from {name}'s")
    return f"{want.size} logits equal: {', '.join([first, *(name for name, _ in theirs)])}"


def prefill_rate(backend, rng, vocab, n):
    tokens = rng.integers(0, vocab, n)
    start = time.perf_counter()
    run(backend, tokens, rows=[n - 1])
    return n / (time.perf_counter() - start)


def decode_rate(backend, rng, vocab, n):
    tokens = rng.integers(0, vocab, n)
    start = time.perf_counter()
    for i in range(n):
        run(backend, tokens[i : i + 1], i, [0])
    return n / (time.perf_counter() - start)


def llama_rates(bench, model, threads, prompt, decoded):
    """Medians of repetitions; the first, in which pages are mapped, is left out."""
    command = [bench, "-m", model, "-t", str(threads), "-p", str(prompt), "-n", str(decoded)]
    out = subprocess.run([*command, "-r", "4", "-o", "json"], capture_output=True, check=True)
    rows = json.loads(out.stdout)
    build = f"{rows[0]['build_commit']} ({rows[0]['build_number']})"
    return [median(row["samples_ts"][1:]) for row in rows], build


def warm(file):
    """Look at every page of the map; the other process may have pushed some out of memory."""
    for name in file.tensors:
        file.data(name)[::4096].sum()


def seconds(*command):
    start = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True)
    return time.perf_counter() - start


def memory():
    """Resident MB that are not pages of the file."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 1024


def processor():
    """Family and model, which tell generations of one name apart; not every system has them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    return {name: fields[name] for name in ("cpu family", "model") if name in fields}


def main():
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("llama")
    p.add_argument("out", type=Path)
    p.add_argument("--threads", type=int, default=EngineConfig().cores)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--prompt", type=int, default=128, help="tokens")
    p.add_argument("--commit", default="")
    a = p.parse_args()
    bench, size = f"{a.llama}/llama-bench", Path(a.model).stat().st_size
    found = {}

    def note(name, value):
        found[name] = value
        print(f"{name:<36} {value}", flush=True)

    file = GGUFFile.open(a.model)
    weights = Weights.from_file(file)
    vocab, rng = weights.config.vocab, np.random.default_rng()
    engine = EngineConfig(context=64 * len(PAGES[0]), max_sequences=1, threads=a.threads)
    note("commit", a.commit)
    note("date", datetime.now(UTC).date().isoformat())
    note("processor", processor())
    note("bits", check_bits(weights, engine, rng.integers(0, vocab, 8), size))
    decoded = 64 if size < 1 << 30 else 32
    backends = {}
    for simd in simd_levels()[:-1]:  # the last is the portable one
        backend = CpuBackend(weights, engine, simd=simd)
        note(f"device {simd}", backend.device)
        backends[simd] = backend
    rounds = []
    for _ in range(a.rounds):
        warm(file)
        row = {}
        for simd, backend in backends.items():
            decode_rate(backend, rng, vocab, decoded)
            prefill = median(prefill_rate(backend, rng, vocab, a.prompt) for _ in range(3))
            row[simd] = prefill, median(decode_rate(backend, rng, vocab, decoded) for _ in range(3))
        row["llama.cpp"], found["llama.cpp"] = llama_rates(
            bench, a.model, a.threads, a.prompt, decoded
        )
        rounds.append(row)
        print(row, flush=True)
    for i, name in enumerate((f"pp{a.prompt}", f"tg{decoded}")):
        note(f"{name} tokens/s", {k: round(median(r[k][i] for r in rounds), 2) for k in rounds[0]})
        for simd in backends:
            ratio = median(r[simd][i] / r["llama.cpp"][i] for r in rounds)
            note(f"{name} ratio {simd}", round(ratio, 3))
    note("resident MB beside the file's pages", round(memory(), 1))
    for backend in backends.values():
        backend.close()
    ours = (sys.executable, "-m", "isobit", "run", a.model, "--backend", "cpu", "-n", "1")
    ours = (*ours, "--tokens", "785,921,308", "-c", "256", "-t", str(a.threads))
    theirs = (bench, "-m", a.model, "-t", str(a.threads), "-p", "3", "-n", "0", "-r", "1")
    starts = []
    for _ in range(a.rounds):
        warm(file)
        starts.append((seconds(*ours), seconds(*theirs, "--no-warmup")))
    note("start to first token, s", [round(median(s[i] for s in starts), 3) for i in (0, 1)])
    note("start ratio", round(median(x / y for x, y in starts), 3))
    every = json.loads(a.out.read_text()) if a.out.exists() else {}
    every[Path(a.model).name] = found
    a.out.write_text(json.dumps(every, indent=1) + "\n")


main()
