"""Every architecture beside llama.cpp on the same files, on the CPU: a table in Markdown.

usage: python benchmarks/models.py LLAMA OUT.json [--rounds 5] [--only NAME,…] [--no-speed]
           [--seed 1] [--commit SHA] [--file MODEL.gguf [--text FILE]]

LLAMA is a folder with llama-perplexity and llama-bench, whose libraries LD_LIBRARY_PATH must name.
Files of random weights are written for the purpose. Perplexity is that of a file in float32, by
llama.cpp with a float32 cache, by the float64 oracle and by isobit: of random weights it says
nothing of a text, but two graphs that differ do not give the same. Speed is that of a larger file
in Q8_0, one thread of each: tokens a second of the processor's time, which other work on the
machine takes no part in. Each round measures isobit, then llama.cpp (many repetitions less a few,
so that loading is not counted); what counts is the median of the ratios. With --file it is one row,
of that model as it is and of that text. A file that OUT has is added to.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from isobit.backends.base import Batch  # noqa: E402
from isobit.backends.cpu import CpuBackend  # noqa: E402
from isobit.backends.hardware import processor  # noqa: E402
from isobit.config import EngineConfig  # noqa: E402
from isobit.gguf.reader import GGUFFile  # noqa: E402
from isobit.model.weights import Weights  # noqa: E402
from isobit.text.tokenizer import Tokenizer  # noqa: E402
from isobit.verify.oracle import Oracle  # noqa: E402
from tests.helpers.random_file import RandomFile  # noqa: E402
from tests.helpers.synth import Geometry, _small_vocabulary, all_in, write_model  # noqa: E402
from tests.model import (  # noqa: E402
    test_deepseek2,
    test_gemma,
    test_glm4moe,
    test_gpt_oss,
    test_granite,
    test_lfm2,
    test_llama,
    test_minimax,
    test_nemotron_h,
    test_olmoe,
    test_qwen3next,
)

TEXT = ROOT / "tests/data/heldout.txt"
CHUNK, CHUNKS, PROMPT, DECODED, REPEATS = 256, 2, 128, 32, 7
VOCABULARY = 900


def qwen3(path: Path, g: Geometry, fmt: str = "Q8_0", **_: Any) -> None:
    write_model(path, g, all_in(fmt), seed=RandomFile.seed or 0)


def gpt_oss(path: Path, fmt: str = "Q8_0", **how: Any) -> None:
    test_gpt_oss.write(path, experts="F32" if fmt == "F32" else "MXFP4", fmt=fmt, **how)


KINDS: dict[str, Callable[..., object]] = {
    "qwen3": qwen3,
    "qwen3moe": qwen3,
    "qwen35": partial(test_qwen3next.write, kind="qwen35"),
    "qwen35moe": partial(test_qwen3next.write, kind="qwen35moe"),
    "gpt-oss": gpt_oss,
    **{k: partial(test_llama.write, kind=k) for k in ("llama", "mixtral", "qwen2", "qwen2moe")},
    "olmoe": partial(test_olmoe.write, kind="several"),
    "glm4moe": partial(test_glm4moe.write, kind="big"),
    "deepseek2": partial(test_deepseek2.write, kind="Glm4MoeLite"),
    "lfm2": partial(test_lfm2.write, kind="lfm2"),
    "lfm2moe": partial(test_lfm2.write, kind="lfm2moe"),
    "minimax-m2": partial(test_minimax.write, kind="M2"),
    "nemotron_h": partial(test_nemotron_h.write, kind="dense"),
    "nemotron_h_moe": partial(test_nemotron_h.write, kind="moe"),
    "granite": partial(test_granite.write, kind="Granite"),
    "granitemoe": partial(test_granite.write, kind="GraniteMoeShared"),
    "qwen3next": test_qwen3next.write,
    "gemma3": partial(test_gemma.write, kind="gemma3"),
    "gemma4": partial(test_gemma.write, kind="gemma4"),
}
DENSE = ("llama", "qwen2", "granite", "gemma3", "lfm2", "nemotron_h", "qwen3", "qwen35")


def geometry(kind: str, *, large: bool) -> Geometry:
    g = Geometry(3, 256, 4, 2, 64, experts=6, experts_used=2, ffn=256, vocab=VOCABULARY)
    if large:
        g = replace(g, layers=9, hidden=768, heads=12, kv_heads=4, experts=16, experts_used=4)
        g = replace(g, ffn=3072 if kind in DENSE else 512)
    g = replace(g, context=1024, tied=kind.startswith(("gemma", "lfm2")))
    if kind.startswith(("glm4moe", "deepseek2")) and not large:  # experts in groups
        g = replace(g, experts=8)
    if kind == "olmoe":  # llama.cpp reads no other
        g = replace(g, kv_heads=g.heads)
    return replace(g, experts=0, experts_used=0) if kind in DENSE else g


def logits(backend: CpuBackend, ids: list[int], first: int, rows: list[int]) -> Any:
    n = len(ids)
    at = np.arange(first, first + n, dtype=np.int32)
    pages = np.arange(4, dtype=np.int32)[None]
    wanted = np.array(rows, np.int32)
    return backend.forward(Batch(np.array(ids, np.int32), at, 0 * at, pages, wanted))


def perplexity(run: Callable[[list[int]], Any], ids: list[int]) -> float:
    """As llama-perplexity counts: of the second half of each chunk."""
    found: list[float] = []
    for i in range(CHUNKS):
        part = ids[i * CHUNK : (i + 1) * CHUNK]
        z = run(part).astype(np.float64)
        z -= z.max(axis=1, keepdims=True)
        z -= np.log(np.exp(z).sum(axis=1, keepdims=True))
        found += [-z[t, part[t + 1]] for t in range(CHUNK // 2, CHUNK - 1)]
    return float(np.exp(np.mean(found)))


def accuracy(path: Path, llama: Path, text: Path) -> dict[str, float]:
    with GGUFFile.open(path) as file:
        weights = Weights.from_file(file)
        tokenizer = Tokenizer.from_metadata(file.metadata, str(path))
        ids = tokenizer.encode(text.read_text(), special=False)[: CHUNK * CHUNKS]
        if tokenizer.vocabulary.add_bos and (bos := tokenizer.vocabulary.bos_id) is not None:
            ids[::CHUNK] = [bos] * CHUNKS  # as llama-perplexity begins a chunk
        oracle = Oracle(weights)
        exact = perplexity(lambda part: oracle.evaluate(part).logits, ids)
        backend = CpuBackend(weights, EngineConfig(context=CHUNK, max_sequences=1))
        ours = perplexity(lambda part: logits(backend, part, 0, list(range(CHUNK))), ids)
        backend.close()
    command = [str(llama / "llama-perplexity"), "-m", str(path), "-f", str(text), "-c", str(CHUNK)]
    command += ["-b", str(CHUNK), "-ctk", "f32", "-ctv", "f32", "-fa", "off"]
    command += ["--chunks", str(CHUNKS)]
    for _ in range(5):  # its log loses lines at the end of a run
        out = subprocess.run(command, capture_output=True, text=True, check=False)
        theirs = re.search(rf"PPL = ([0-9.]+)|\[{CHUNKS}\]([0-9.]+)", out.stdout + out.stderr)
        if theirs is not None:
            return {"exact": exact, "isobit": ours, "llama.cpp": float(theirs[1] or theirs[2])}
    print(out.stderr[-1500:], file=sys.stderr)
    return {"exact": exact, "isobit": ours, "llama.cpp": float("nan")}


def rate(backend: CpuBackend, vocab: int, tokens: int, *, one_by_one: bool) -> float:
    ids = np.random.default_rng().integers(0, vocab, tokens).tolist()
    start = time.process_time()
    if one_by_one:
        for i, token in enumerate(ids):
            logits(backend, [token], i, [0])
    else:
        logits(backend, ids, 0, [tokens - 1])
    return tokens / (time.process_time() - start)


def processor_seconds(*command: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def rate_of_llama(bench: Path, path: Path, prompt: int, decoded: int) -> float:
    command = [str(bench), "-m", str(path), "-t", "1", "-p", str(prompt), "-n", str(decoded)]
    few, many = (processor_seconds(*command, "-r", str(n)) for n in (1, 1 + REPEATS))
    return REPEATS * (prompt + decoded) / (many - few)


def speed(path: Path, llama: Path, rounds: int) -> dict[str, dict[str, float]]:
    """isobit's tokens/s, and the median ratio to llama.cpp."""
    with GGUFFile.open(path) as file:
        weights = Weights.from_file(file)
        engine = EngineConfig(context=256, max_sequences=1, threads=1)
        backend, found = CpuBackend(weights, engine), []
        for _ in range(rounds):
            pairs = []
            for n, step in ((PROMPT, False), (DECODED, True)):
                ours = median(
                    rate(backend, weights.config.vocab, n, one_by_one=step) for _ in range(REPEATS)
                )
                asked = (0, n) if step else (n, 0)
                pairs.append((ours, rate_of_llama(llama / "llama-bench", path, *asked)))
            found.append(pairs)
        backend.close()
    return {
        name: {
            "tokens/s": median(r[i][0] for r in found),
            "ratio": median(r[i][0] / r[i][1] for r in found),
        }
        for i, name in enumerate(("prefill", "decode"))
    }


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("llama", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--only", default=",".join(KINDS))
    p.add_argument("--no-speed", action="store_true")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--commit", default="")
    p.add_argument("--file", type=Path)
    p.add_argument("--text", type=Path, default=TEXT)
    a = p.parse_args()
    RandomFile.seed = a.seed
    found: dict[str, Any] = {
        "commit": a.commit,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": processor(),
        "threads": 1,
        "load average before": os.getloadavg()[0],
        "seed of the weights": a.seed,
        "models": json.loads(a.out.read_text())["models"] if a.out.exists() else {},
    }
    print("| | exact perplexity | isobit | llama.cpp | prefill, tokens/s | decode, tokens/s |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in [a.file.name] if a.file else a.only.split(","):
        row = of_file(a.file, a) if a.file else of_kind(name, a)
        found["models"][name] = row | {"commit": a.commit}
        a.out.write_text(json.dumps(found, indent=1) + "\n")
        cells = [f"{value:.4f}" for value in row["perplexity"].values()]
        for what in ("prefill", "decode"):
            if rate := row.get(what):
                cells.append(f"{rate['tokens/s']:,.0f} ({rate['ratio']:.2f} x)")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def of_file(path: Path, a: argparse.Namespace) -> dict[str, Any]:
    row: dict[str, Any] = {"perplexity": accuracy(path, a.llama, a.text)}
    return row if a.no_speed else row | speed(path, a.llama, a.rounds)


def of_kind(kind: str, a: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of a small file in float32, speed of a larger one in Q8_0."""
    others = dict(_small_vocabulary(Geometry(vocab=VOCABULARY)).items())
    with tempfile.TemporaryDirectory() as folder:
        path, g = Path(folder) / f"{kind}.gguf", geometry(kind, large=False)
        KINDS[kind](path, g=g, fmt="F32", others=others)
        row: dict[str, Any] = {"perplexity": accuracy(path, a.llama, TEXT)}
        if a.no_speed:
            return row
        more = {"scan": (24, 64, 4, 128)} if kind.startswith("nemotron") else {}
        KINDS[kind](path, g=geometry(kind, large=True), others=others, **more)
        return row | speed(path, a.llama, a.rounds)


if __name__ == "__main__":
    main()
