"""What the CPU backend makes of many threads: bits first, then a plain read, decode and prefill.

usage: python benchmarks/cpu_threads.py MODEL.gguf OUT [--threads 1,2,4,8,12,16] [--decode 12]
           [--prompt 128] [--simd LEVEL,LEVEL]

OUT is a folder: report.json has all figures, lscpu.txt the machine. A prompt's logits must be
equal at every SIMD level (of a file above 1 GB: but the portable one) and with fewer threads, else
nothing is timed. Then for each number of threads: a plain read of the file's map and of a copy in
pages of 2 MB (GB/s), tokens/s of decode and of prefill, and how kinds of phases share the time.
What a phase took ends with its barrier; "barriers" is what threads stood at them, of the time of
all. About a minute for 18.6 GB with 16 threads.
"""

import argparse
import itertools
import json
import mmap
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import Batch
from isobit.backends.cpu import CpuBackend, simd_levels
from isobit.backends.cpu.lowering import Lowering
from isobit.config import EngineConfig
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights

Array = NDArray[np.generic]
I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]
PAGES = np.arange(64, dtype=np.int32)[None]


def run(backend: CpuBackend, tokens: I64, start: int = 0) -> Array:
    """The logits of the last of these tokens, at positions from start on."""
    n = len(tokens)
    positions = np.arange(start, start + n, dtype=np.int32)
    rows = np.array([n - 1], np.int32)
    batch = Batch(tokens.astype(np.int32), positions, np.zeros(n, np.int32), PAGES, rows)
    return backend.forward(batch)


def steps(backend: CpuBackend, tokens: I64, start: int) -> None:
    for i in range(len(tokens)):
        run(backend, tokens[i : i + 1], start + i)


def open_backend(weights: Weights, threads: int, simd: str | None = None) -> CpuBackend:
    engine = EngineConfig(context=64 * len(PAGES[0]), max_sequences=1, threads=threads)
    return CpuBackend(weights, engine, simd=simd)


def check_bits(weights: Weights, tokens: I64, threads: int, size: int) -> str:
    ways = [(simd, threads) for simd in simd_levels()]
    if size > 1 << 30:
        ways = [(simd, n) for simd, n in ways if simd != "portable"]
    ways.append((simd_levels()[0], threads // 2 + 1))
    found = {}
    for simd, n in ways:
        backend = open_backend(weights, n, simd)
        logits = [run(backend, tokens), run(backend, tokens[:1], len(tokens))]
        found[f"{simd} {n} threads"] = np.concatenate(logits).tobytes()
        backend.close()
    if len(set(found.values())) > 1:
        raise SystemExit(f"logits differ between {', '.join(found)}")
    return f"{logits[0].size * 2} logits equal: {', '.join(found)}"


def read_rate(data: U64, threads: int) -> float:
    """GB/s of a plain read by so many threads, each of a stretch of its own."""
    parts = [np.array_split(part, 8) for part in np.array_split(data, threads)]
    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        list(pool.map(lambda some: [np.bitwise_or.reduce(c) for c in some], parts))
        return data.nbytes / 1e9 / (time.perf_counter() - start)


def in_large_pages(data: U64) -> U64:
    """A copy in pages of 2 MB, where the system has them."""
    memory = mmap.mmap(-1, data.nbytes + (2 << 20))
    memory.madvise(mmap.MADV_HUGEPAGE)
    copy = np.frombuffer(memory, data.dtype, len(data))
    copy[:] = data
    return copy


def large_pages() -> dict[str, int]:
    """MB of this process's memory in pages of 2 MB: of mapped files and its own."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines[1:])
    return {k: int(found[k].split()[0]) >> 10 for k in ("FilePmdMapped", "AnonHugePages")}


def kinds(weights: Weights) -> list[str]:
    """What each phase of the program is called: its first product, or its kind."""
    shown = {"moe_expert_gate": "experts up", "moe_expert_out": "experts down"}
    names = []
    for p in Lowering(weights.graph).program()["phases"]:
        name = p["shows"][0][0] if p["op"] and p["shows"] else p["kind"]
        names.append(shown.get(name, name))
    return names


def timed(
    backend: CpuBackend, names: list[str], threads: int, work: Callable[[], object]
) -> tuple[float, dict[str, float], float]:
    """Seconds of work(), the share of each kind of phase, and of barriers."""
    engine = backend._engine
    assert engine is not None
    before = engine.spent()
    start = time.perf_counter()
    work()
    took = time.perf_counter() - start
    spent: dict[str, float] = defaultdict(float)
    stood = 0.0
    for name, then, now in zip(names, before, engine.spent(), strict=True):
        spent[name] += (now[0] - then[0]) / took
        stood += now[1] - then[1]
    return (
        took,
        {k: round(v, 4) for k, v in sorted(spent.items(), key=lambda kv: -kv[1])},
        stood / took / threads,
    )


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("out", type=Path)
    p.add_argument("--threads", default="1,2,4,8,12,16")
    p.add_argument("--decode", type=int, default=12, help="tokens")
    p.add_argument("--prompt", type=int, default=128, help="tokens")
    p.add_argument("--simd", help="levels; the best, if none is named")
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    most = EngineConfig().cores
    machine = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout
    siblings = Path("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list")
    if siblings.exists():
        machine += f"\nthreads of the first core: {siblings.read_text()}"
    (a.out / "lscpu.txt").write_text(machine)
    file = GGUFFile.open(a.model)
    weights = Weights.from_file(file)
    names, vocab = kinds(weights), weights.config.vocab
    size = Path(a.model).stat().st_size
    rng = np.random.default_rng()
    tokens = rng.integers(0, vocab, a.prompt)
    for name in file.tensors:  # every page of the map
        file.data(name)[::4096].sum()
    report: dict[str, Any] = {"levels": simd_levels()}
    report["bits"] = check_bits(weights, tokens, most, size)
    print(report["bits"], flush=True)
    whole = np.memmap(a.model, np.uint64, "r", shape=(min(6 << 30, size) // 8,))
    whole[::512].max()  # every page of this map, too
    copy = in_large_pages(whole[: 2 << 27])
    report["MB in pages of 2 MB"] = large_pages()
    print("MB in pages of 2 MB:", report["MB in pages of 2 MB"], flush=True)
    rows: list[dict[str, Any]] = []
    numbers = sorted({min(int(n), most) for n in a.threads.split(",")})
    levels = a.simd.split(",") if a.simd else simd_levels()[:1]
    for threads, level in itertools.product(numbers, levels):
        backend = open_backend(weights, threads, level)
        reads = {"read GB/s": read_rate(whole, threads), "large pages": read_rate(copy, threads)}
        run(backend, tokens[:2])
        prefill = timed(backend, names, threads, partial(run, backend, tokens))
        more = rng.integers(0, vocab, a.decode)
        decode = timed(backend, names, threads, partial(steps, backend, more, len(tokens)))
        report["device"] = backend.device.split(",")[0]
        backend.close()
        rows.append(
            {"threads": threads, "level": level, **{k: round(v, 1) for k, v in reads.items()}}
        )
        for name, n, (took, shares, stood) in (
            ("decode", a.decode, decode),
            ("prefill", a.prompt, prefill),
        ):
            rows[-1] |= {
                f"{name} tokens/s": round(n / took, 2),
                f"{name} barriers": round(stood, 3),
                f"{name} shares": shares,
            }
        print(rows[-1], flush=True)
        report["rows"] = rows
        (a.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(report["device"], siblings.read_text().strip() if siblings.exists() else "")
    columns = [k for k in rows[0] if "shares" not in k]
    print(*columns, sep=" | ")
    for row in rows:
        print(*(row[k] for k in columns), sep=" | ")
    for name in ("decode", "prefill"):
        print(f"ms a token of {name}, by kind")
        every = list(rows[-1][f"{name} shares"])
        print("threads", "level", *every, sep=" | ")
        for row in rows:
            ms = 1000 / row[f"{name} tokens/s"]
            each = (f"{row[f'{name} shares'][k] * ms:.3f}" for k in every)
            print(row["threads"], row["level"], *each, sep=" | ")


main()
